"""Our token ids and masks are TRL's, for every shape of row that both accept, every kind of
tokenizer and template.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.data.collate import PackedCollator, PairBatch, PreferenceCollator
from orchestrator.data.pair_cache import tokenized_pairs
from orchestrator.data.pairs import Pairs
from orchestrator.data.tokens import tokenize_pair
from orchestrator.settings.data import DataSpec
from support.tiny_settings import write_jsonl
from support.token_rows import (
    CHATS,
    IMPLICIT_CHATS,
    LONG_CHATS,
    LONG_ROWS,
    MERGING,
    ROWS,
    TOOL_TEMPLATE,
    Row,
    assert_trls,
    settings,
    theirs,
    turn,
    with_template,
)
from support.trl_trainer import need_trl, trl_tokens, trl_trainer

need_trl()


def ours(folder: Path, rows: list[Row], tokenizer: Any, data: DataSpec) -> Pairs:
    source = str(write_jsonl(folder / "rows.jsonl", rows))
    return tokenized_pairs(
        DataSpec(**{**data.model_dump(), "train": source}), "train", tokenizer, folder / "cache"
    )


def mask_of(batch: PairBatch) -> torch.Tensor:
    """[2B, T - 1], 1 where the next token is scored, rebuilt from the indices; checks that those
    agree.
    """
    # chosen and rejected pair by pair
    halves = torch.arange(2 * len(batch.pair_ids)).view(2, -1).t().flatten()
    sequence = halves.repeat_interleave(torch.tensor(batch.scored))
    assert torch.equal(batch.completion_index // batch.input_ids.shape[1], sequence)
    assert torch.equal(
        batch.input_ids.flatten()[batch.completion_index + 1], batch.completion_labels
    )
    mask = torch.zeros(batch.input_ids.numel(), dtype=torch.long)
    mask[batch.completion_index] = 1
    return mask.view_as(batch.input_ids)[:, :-1]


def assert_packed_as(batch: PairBatch, expected: dict[str, torch.Tensor]) -> None:
    """The sequences that a packed row holds, and the tokens that are scored in them, are those of
    TRL's batch.
    """
    assert batch.segments is not None
    row = batch.input_ids[0]
    labels = iter(batch.completion_labels.split(list(batch.scored)))
    for number, span in enumerate(batch.segments.spans):
        chosen = row[span.start : span.rejected]
        rejected = torch.cat([row[span.start : span.fork], row[span.rejected : span.stop]])
        for place, sequence in ((number, chosen), (number + len(batch.pair_ids), rejected)):
            kept = expected["attention_mask"][place].bool()
            scored = expected["completion_mask"][place][kept][1:].bool()
            assert torch.equal(sequence, expected["input_ids"][place][kept])
            assert torch.equal(next(labels), sequence[1:][scored])


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [24, 1024, None])
@pytest.mark.parametrize("name", ROWS)
def test_ids_and_masks_equal_trls(
    name: str, max_length: int | None, truncation: Any, tokenizer: Any, tmp_path: Path
) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    if name == "tools":
        # its prompts are longer than 24
        tokenizer, max_length = (with_template(tokenizer, TOOL_TEMPLATE), None)
    data = settings(max_length=max_length, truncation=truncation)
    pairs = ours(tmp_path, ROWS[name], tokenizer, data)
    other = theirs(ROWS[name], tokenizer, max_length if truncation == "keep_start" else None)
    mine = [pairs[index] for index in range(len(pairs))]

    assert len(mine) == len(other)
    for row, trl_row in zip(mine, other, strict=True):
        assert row["prompt_ids"] == trl_row["prompt_ids"]
        # keep_start is applied when we tokenise, and by TRL's collator
        room = (
            max_length - len(row["prompt_ids"])
            if max_length and truncation == "keep_start"
            else None
        )
        assert row["chosen_ids"] == trl_row["chosen_ids"][:room]
        assert row["rejected_ids"] == trl_row["rejected_ids"][:room]

    padded, packed = PreferenceCollator(tokenizer.pad_token_id, data), PackedCollator(data)
    trl_collator = DataCollatorForPreference(tokenizer.pad_token_id, max_length, truncation)
    # the width of a batch depends on what is in it
    for some in (slice(None), slice(0, 1), slice(1, 3)):
        batch, expected = padded(mine[some]), trl_collator(other[some])
        assert torch.equal(batch.input_ids, expected["input_ids"])
        assert batch.attention_mask is not None
        assert torch.equal(batch.attention_mask, expected["attention_mask"])
        assert torch.equal(mask_of(batch), expected["completion_mask"][:, 1:])
        assert_packed_as(packed(mine[some]), expected)


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_trl_tokens_are_those_its_trainer_trains_on(
    truncation: str, tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    config = AutoConfig.for_model("qwen2", vocab_size=400, num_key_value_heads=1, **sizes)
    # nothing here runs them
    policy, reference = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    trainer = trl_trainer(
        policy,
        tokenizer,
        LONG_CHATS,
        ref_model=reference,
        output_dir=str(tmp_path),
        max_length=24,
        truncation_mode=truncation,
    )
    assert list(trainer.train_dataset) == theirs(
        LONG_CHATS, tokenizer, 24 if truncation == "keep_start" else None
    )
    collator = trainer.data_collator
    assert (
        collator.pad_token_id,
        collator.max_length,
        collator.truncation_mode,
        collator.pad_to_multiple_of,
    ) == (
        tokenizer.pad_token_id,
        24,
        truncation,
        None,
    )


def as_parts(messages: list[Row]) -> list[Row]:
    """Messages whose contents are cut into two parts."""
    cut = [(message["content"][:3], message["content"][3:]) for message in messages]
    parts = [[{"type": "text", "text": text} for text in texts] for texts in cut]
    return [
        {**message, "content": content} for message, content in zip(messages, parts, strict=True)
    ]


PARTS_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ "
    "m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif "
    "%}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% "
    "endif %}"
)
JSON_TEMPLATE = "{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}\n{% endfor %}"


def test_contents_of_parts_give_trls_ids_where_the_template_reads_parts(tokenizer: Any) -> None:
    """Ours joins them for every template; of one that does not read parts TRL trains on Python's
    repr of the list.
    """
    rows = [
        {side: as_parts(messages) for side, messages in row.items()}
        for row in (*CHATS, *IMPLICIT_CHATS[:2])
    ]
    for row in rows:
        assert_trls(row, with_template(tokenizer, PARTS_TEMPLATE))
        plain, _ = tokenize_pair(row, tokenizer, settings())
        assert plain == tokenize_pair(row, with_template(tokenizer, PARTS_TEMPLATE), settings())[0]


def test_a_prompt_text_beside_whole_conversations_gives_what_trl_makes_without_it(
    tokenizer: Any,
) -> None:
    for row in IMPLICIT_CHATS[:2]:
        question = row["chosen"][-2]["content"]
        expected, _ = tokenize_pair(row, tokenizer, settings())
        assert tokenize_pair({"prompt": question, **row}, tokenizer, settings())[0] == expected
        assert_trls(row, tokenizer)


def test_nulls_that_a_table_adds_are_left_out_as_by_trls_own_function(tokenizer: Any) -> None:
    from datasets import Dataset
    from trl.trainer.utils import remove_none_values

    tokenizer, rows = with_template(tokenizer, JSON_TEMPLATE), []
    for row, arguments in zip(CHATS, ({"city": "Rome"}, {"zone": "CET"}), strict=False):
        call = {"function": {"name": "f", "arguments": arguments}}
        answer = [{**turn("assistant", "so"), "tool_calls": [call]}]
        rows.append({**row, "chosen": answer, "tools": [{"name": "f", "parameters": arguments}]})

    def without_nulls(batch: Row) -> Row:
        return {
            name: [remove_none_values(value) for value in column] for name, column in batch.items()
        }

    table = Dataset.from_list(rows)
    assert "None" in str(table[0])
    expected = trl_tokens(table.with_transform(without_nulls), tokenizer)
    for row, theirs_of_row in zip(table, expected, strict=True):
        pair, _ = tokenize_pair(row, tokenizer, settings())
        assert pair._asdict() == {name: theirs_of_row[name] for name in pair._fields}


def test_prompts_that_fill_max_length_are_dropped(tokenizer: Any, tmp_path: Path) -> None:
    """The comparison above would also hold if no row were long enough: some are, and some only just
    fit.
    """
    pairs = ours(tmp_path, LONG_ROWS, tokenizer, settings(max_length=24))
    prompts = pairs.lengths[:, 0].tolist()

    assert pairs.dropped["prompts that fill data.max_length"] > 1
    assert set(pairs.dropped) == {"prompts that fill data.max_length"}
    assert max(prompts) == 23
    assert 24 in [len(tokenizer(row["prompt"])["input_ids"]) for row in LONG_ROWS]
    assert (pairs.lengths[:, 0] + pairs.lengths[:, 1:].max(axis=1)).max() == 24


def test_some_tokens_merge_across_the_boundary(tokenizer: Any, tmp_path: Path) -> None:
    """As above: rows whose prompt alone has other tokens than the prompt within the whole are
    really among them.
    """
    pairs = ours(tmp_path, MERGING, tokenizer, settings())
    alone = [len(tokenizer(row["prompt"])["input_ids"]) for row in MERGING]

    assert all(
        kept < whole for kept, whole in zip(pairs.lengths[:, 0].tolist(), alone, strict=True)
    )
