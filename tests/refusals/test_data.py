"""Rows and files that cannot be trained on are refused; rows that may be dropped are counted."""

from pathlib import Path
from typing import Any

import pytest

from support.refusals import (
    CHAT,
    GOOD,
    Refusal,
    Run,
    UserInput,
    assert_refused,
    assert_refused_before_begin,
    case,
    command,
    run_in_process,
    write_input,
)

TIE = {"prompt": "a", "chosen": "b", "rejected": "b"}
LONG_PROMPT = {"prompt": "river " * 200, "chosen": "a", "rejected": "b"}
ANSWER, QUESTION = {"role": "assistant", "content": "yes"}, {"role": "user", "content": "is it?"}
REJECTED = [{"role": "assistant", "content": "no"}]
FIX_ROW = "fix that row of train.jsonl, or set data.on_bad_row=drop to drop such rows"


def bad_row(name: str, row: Any, reason: str, fix: str = "") -> Any:
    """A row of the wrong shape, third of six; of a long one the line shows the beginning."""
    rows = [*GOOD[:2], row, *GOOD[3:]]
    return case(name, "", "data.train row 3", repr(row)[:100], reason, fix + FIX_ROW, rows=rows)


DATA = [
    bad_row(
        "no-chosen",
        {"prompt": "a", "rejected": "b"},
        "has no column 'chosen'; its columns are 'prompt'",
    ),
    case(
        "no-data",
        "data.train=nope.jsonl",
        "data.train",
        "nope.jsonl",
        "does not exist",
        "use a JSONL, JSON, CSV",
    ),
    case(
        "not-json",
        "",
        "data.train row 3",
        '{"prompt": "a", ',
        "is not JSON (",
        "fix that line of train.jsonl",
        rows=[*GOOD[:2], '{"prompt": "a", chosen}', *GOOD[3:]],
    ),
    case(
        "too-few-positions",
        "",
        "data.train row ",
        " tokens'",
        "longer than the model's 16 positions",
        "set data.max_length=16 or less",
        edits={"model.init.config.max_position_embeddings": 16},
    ),
    case(
        "no-eval-data",
        "data.eval=nope.jsonl",
        "data.eval",
        "nope.jsonl",
        "does not exist",
        "use a JSONL, JSON, CSV",
    ),
    case(
        "hub-data-offline",
        "data.train=some/pairs",
        "data.train",
        "'some/pairs'",
        "Couldn't reach",
        "can be reached",
    ),
    bad_row("not-an-object", [1], "is of type list, not an object"),
    bad_row(
        "text-and-messages",
        {"prompt": "a", "chosen": [ANSWER], "rejected": "b"},
        "mixes text and messages",
    ),
    bad_row(
        "message-without-content",
        {"prompt": [QUESTION], "chosen": [{"role": "assistant"}], "rejected": REJECTED},
        "message 1 of chosen has no text in its content",
    ),
    bad_row(
        "completion-is-a-number",
        {"prompt": "a", "chosen": 1, "rejected": "b"},
        "chosen is int, neither text nor",
    ),
    bad_row(
        "tools-not-json",
        {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": REJECTED, "tools": "none"},
        "tools is not JSON (",
    ),
    case(
        "system-prompt-on-text",
        "data.system_prompt=Hello.",
        "data.train row 1",
        repr(GOOD[0])[:100],
        "is plain text, which does not use data.system_prompt",
        "remove data.system_prompt",
        rows=GOOD,
    ),
    bad_row(
        "tools-without-template",
        {
            "prompt": [QUESTION],
            "chosen": [ANSWER],
            "rejected": REJECTED,
            "tools": '[{"name": "f"}]',
        },
        "has tools, not read by the chat template",
        "set data.chat_template to one that does, or ",
    ),
    case(
        "template-variable",
        "data.chat_template_kwargs.mesages=1",
        "data.chat_template_kwargs.mesages",
        "1",
        "is not read by the chat template",
        "did you mean messages?",
        rows=CHAT,
    ),
    case(
        "eval-row",
        "data.eval=held_out.jsonl",
        "data.eval row 1",
        "{'prompt': 'a'}",
        "has no column 'chosen'; its columns are 'prompt'",
        FIX_ROW.replace("train", "held_out"),
        files={"held_out.jsonl": '{"prompt": "a"}\n'},
    ),
    case(
        "all-ties",
        "",
        "data.train",
        "train.jsonl",
        "to train on (3 ties)",
        "chosen and rejected differ",
        rows=[TIE] * 3,
    ),
    case(
        "no-rows",
        "",
        "data.train",
        "train.jsonl",
        "it has no rows",
        "use a file with rows",
        rows=[],
    ),
    case(
        "json-cut-short",
        "data.train=a.json",
        "data.train",
        "a.json",
        "is not JSON",
        "fix",
        files={"a.json": "[{}"},
    ),
    case(
        "prompts-fill",
        "data.max_length=2",
        "data.train",
        "train.jsonl",
        "(32 prompts that fill data.max_length)",
        "raise data.max_length",
    ),
    case(
        "tie-is-an-error",
        "data.on_bad_row=error",
        "data.train row 7",
        repr(TIE)[:100],
        "chosen equals rejected",
        FIX_ROW,
        rows=[*GOOD, TIE],
    ),
    case(
        "long-prompt-is-an-error",
        "data.on_bad_row=error",
        "data.train row 7",
        repr(LONG_PROMPT)[:100],
        "its prompt alone has 201 tokens, data.max_length is 128",
        FIX_ROW,
        rows=[*GOOD, LONG_PROMPT],
    ),
]


@pytest.mark.parametrize(("user_input", "refusal"), DATA)
def test_wrong_data_are_refused(
    user_input: UserInput, refusal: Refusal, tmp_path: Path, models: Path, run_here: Run
) -> None:
    code, _, stderr = run_here(*command(tmp_path, user_input, models))
    assert_refused_before_begin(tmp_path, user_input, code, stderr, refusal)


def test_a_process_refuses_a_wrong_row_with_code_2_and_one_line(tmp_path: Path) -> None:
    rows = [*GOOD[:2], {"prompt": "a", "rejected": "b"}, *GOOD[3:]]
    write_input(tmp_path, UserInput(rows=rows))
    code, _, stderr = run_in_process(tmp_path, "debug", "run.yaml")
    refusal = Refusal("data.train row 3", repr(rows[2]), "has no column 'chosen'", FIX_ROW)
    assert_refused(code, stderr.replace(f"{tmp_path}/", ""), refusal)


# --- rows that are dropped

SILENT = {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": []}
MIXED = {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": "b"}
DROPPED = [
    pytest.param(
        "run.seed=7",
        [*GOOD, TIE, TIE, LONG_PROMPT, SILENT],
        [
            "2 dropped (ties)",
            "1 dropped (prompts that fill data.max_length)",
            "1 dropped (empty completions)",
        ],
        id="default",
    ),
    pytest.param(
        "data.on_bad_row=drop",
        [*GOOD, TIE, {"prompt": "a"}, 5, MIXED],
        ["1 dropped (ties)", "3 dropped (malformed rows)"],
        id="drop",
    ),
]


@pytest.mark.parametrize(("word", "rows", "counts"), DROPPED)
def test_dropped_rows_are_counted(
    word: str, rows: list[Any], counts: list[str], tmp_path: Path, run_here: Run
) -> None:
    write_input(tmp_path, UserInput(rows=rows))
    code, stdout, stderr = run_here("debug", "run.yaml", "training.max_steps=1", word)
    assert code == 0, stderr
    (line,) = [line for line in stdout.splitlines() if " training pairs" in line]
    assert line.startswith(f"{len(GOOD)} training pairs")
    assert [count for count in counts if count not in line] == []
    assert line.count("dropped") == len(counts)
