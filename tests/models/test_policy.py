"""Settings become a tokenizer and a trainable model: loaded or made, the same for the same seed,
refused in words.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.data.order import PairCost
from orchestrator.data.sources import Place
from orchestrator.models.attention import use_packed_attention
from orchestrator.models.head import Head
from orchestrator.models.logps import body_hidden
from orchestrator.models.policy import build_policy, load_config, load_tokenizer, pair_cost
from orchestrator.models.policy_checks import check_fit
from orchestrator.settings.errors import UserError
from orchestrator.settings.run import RunSpec
from support.tiny_parts import both_layouts, pair_batch, tiny_model, tokenizer
from support.tiny_settings import TINY_MODEL, tiny_spec


class Long:
    """Pairs of up to 17 tokens, ids up to 250."""

    lengths = np.array([[10, 6, 2], [10, 2, 7], [3, 1, 1]])
    pair_ids = np.array([4, 9, 11])
    largest_id = 250

    def place(self, pair_id: int) -> Place:
        """As of a single set."""
        return Place("data.train", "train.jsonl", pair_id)


LONG: Any = Long()


def with_model(folder: Path, config: dict[str, Any] | None = None, **init: Any) -> RunSpec:
    return tiny_spec(
        folder,
        model={"init": {"vocab_size": 300, **init, "config": {**TINY_MODEL, **(config or {})}}},
    )


def policy(spec: RunSpec) -> Any:
    return build_policy(spec, tokenizer(), torch.float32)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def saved_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_is_trained_on_the_data_and_saved(tmp_path: Path) -> None:
    spec = with_model(tmp_path)
    first = load_tokenizer(spec)
    [folder] = (spec.cache_dir / "tokenizers").glob("*/")
    made_at = folder.stat().st_mtime_ns
    again = load_tokenizer(spec)
    assert folder.stat().st_mtime_ns == made_at
    text = "Say red river ü 你好 \n\t"
    assert first.decode(first(text)["input_ids"]) == text
    assert again.get_vocab() == first.get_vocab()
    assert len(first) == 300
    assert first.pad_token_id != first.eos_token_id
    chat = first.apply_chat_template(
        [{"role": "user", "content": "Say"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nSay<|im_end|>\n<|im_start|>assistant\n"


def test_the_pad_token_can_be_set(tmp_path: Path, saved_tokenizer: str) -> None:
    spec = tiny_spec(tmp_path, model={"tokenizer": saved_tokenizer, "pad_token": "<end>"})
    assert load_tokenizer(spec).pad_token == "<end>"


def test_the_chat_template_can_be_set_and_is_saved_with_the_tokenizer(
    tmp_path: Path, saved_tokenizer: str
) -> None:
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    spec = tiny_spec(
        tmp_path, model={"tokenizer": saved_tokenizer}, data={"chat_template": template}
    )
    load_tokenizer(spec).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == template


@pytest.mark.parametrize(
    ("model", "missing", "key", "words"),
    [
        ({"pad_token": "nowhere"}, None, "model.pad_token", "not in the tokenizer's vocabulary"),
        ({}, "pad_token", "model.tokenizer", "without a pad token; set model.pad_token='<end>'"),
        ({"pad_token": "<pad>"}, "eos_token", "model.tokenizer", "without an end token"),
    ],
)
def test_a_tokenizer_that_lacks_a_token_is_refused(
    tmp_path: Path, model: dict[str, Any], missing: str | None, key: str, words: str
) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "lacking"
    tokenizer().save_pretrained(folder)
    if missing:
        lacking = AutoTokenizer.from_pretrained(folder)
        setattr(lacking, missing, None)
        lacking.save_pretrained(folder)
    with pytest.raises(UserError, match=words) as caught:
        load_tokenizer(tiny_spec(tmp_path, model={"tokenizer": str(folder), **model}))
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("model", "key", "words"),
    [
        ({"init": None, "path": "/no/such/folder"}, "model.path", "is not a folder"),
        ({"tokenizer": "/no/such/folder"}, "model.tokenizer", "is not a folder"),
        ({"init": None, "path": "{empty}"}, "model.path", "tokenizer cannot be loaded"),
        (
            {"init": None, "path": "no-such-owner/no-such-model"},
            "model.path",
            "tokenizer cannot be loaded",
        ),
    ],
)
def test_a_tokenizer_that_is_not_there_is_refused(
    tmp_path: Path, model: dict[str, Any], key: str, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    filled = {
        name: value.format(empty=tmp_path / "empty") if value else None
        for name, value in model.items()
    }
    with pytest.raises(UserError, match=words) as caught:
        load_tokenizer(tiny_spec(tmp_path, model=filled))
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("init", "config"),
    [
        ({"model_type": "qwen99"}, {}),
        ({}, {"hidden_size": "wide"}),
        ({}, {"num_attention_heads": 3}),
    ],
    ids=["no such architecture", "wrong type", "heads that do not divide"],
)
def test_a_config_without_a_causal_lm_is_refused(
    tmp_path: Path, init: dict[str, Any], config: dict[str, Any]
) -> None:
    with pytest.raises(UserError) as caught:
        policy(with_model(tmp_path, config, **init))
    assert caught.value.key.startswith("model.init")


def test_random_weights_depend_only_on_the_seed(tmp_path: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights(policy(with_model(tmp_path)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(weights(policy(with_model(tmp_path))), first)
    other = tiny_spec(tmp_path, run={"seed": 8}, model={"init": {"config": TINY_MODEL}})
    assert not torch.equal(weights(policy(other)), first)


def test_built_and_loaded_models_have_the_requested_type_and_train(tmp_path: Path) -> None:
    model = policy(with_model(tmp_path))
    model.save_pretrained(tmp_path / "model")
    spec = tiny_spec(tmp_path, model={"init": None, "path": str(tmp_path / "model")})
    loaded = build_policy(spec, tokenizer(), torch.float64)
    assert model.training
    assert loaded.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    assert all(p.requires_grad for p in loaded.parameters())
    assert torch.equal(weights(loaded).float(), weights(model))


def test_a_model_built_from_a_config_gets_the_tokenizers_ids(tmp_path: Path) -> None:
    config = load_config(with_model(tmp_path), tokenizer())
    assert config.vocab_size == len(tokenizer())
    assert (config.eos_token_id, config.pad_token_id) == (
        tokenizer().eos_token_id,
        tokenizer().pad_token_id,
    )
    assert load_config(with_model(tmp_path, {"vocab_size": 320}), tokenizer()).vocab_size == 320


@pytest.mark.parametrize("disable", [True, False])
@pytest.mark.parametrize("is_loaded", [False, True])
def test_dropout_is_off_by_default(tmp_path: Path, disable: bool, is_loaded: bool) -> None:
    small = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model: dict[str, Any] = {
        "init": {"model_type": "gpt2", "config": small},
        "disable_dropout": disable,
    }
    built_policy = policy(tiny_spec(tmp_path, model=model))
    if is_loaded:
        built_policy.config.resid_pdrop = built_policy.config.embd_pdrop = (
            built_policy.config.attn_pdrop
        ) = 0.1
        built_policy.save_pretrained(tmp_path / "model")
        model = {"init": None, "path": str(tmp_path / "model"), "disable_dropout": disable}
        built_policy = policy(tiny_spec(tmp_path, model=model))
    rates = {m.p for m in built_policy.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == ({0.0} if disable else {0.1})
    ids = torch.arange(20)[None]
    assert (
        torch.equal(built_policy(input_ids=ids).logits, built_policy(input_ids=ids).logits)
        is disable
    )


@both_layouts
def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path, packed: bool) -> None:
    grads, batch = [], pair_batch(2, packed=packed)
    for is_on in (False, True):
        model = policy(tiny_spec(tmp_path, training={"gradient_checkpointing": is_on}))
        assert model.is_gradient_checkpointing is is_on
        if packed:
            use_packed_attention(model, "cpu")
        body_hidden(model, batch).flatten(0, 1)[batch.completion_index].square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("qwen2", {}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 8.0}),
        ("hyperclovax", {"logits_scaling": 8.0}),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 0.01}),
    ],
)
def test_a_head_that_scales_or_caps_its_logits_is_honoured(
    tmp_path: Path, model_type: str, config: dict[str, Any]
) -> None:
    model = policy(
        with_model(tmp_path, {**config, "initializer_range": 0.2}, model_type=model_type)
    ).eval()
    ids = torch.arange(20)[None]
    logits = model(input_ids=ids).logits
    assert torch.allclose(
        Head.of(model)(model.base_model(input_ids=ids).last_hidden_state), logits, atol=1e-6
    )
    plain = model.lm_head(model.base_model(input_ids=ids).last_hidden_state)
    assert torch.allclose(plain, logits, atol=1e-6) is (model_type == "qwen2")


def test_a_model_that_does_something_else_to_its_logits_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Qwen2ForCausalLM

    policy(with_model(tmp_path)).save_pretrained(tmp_path / "model")
    original = Qwen2ForCausalLM.forward

    def forward(self: Any, *args: Any, **options: Any) -> Any:
        actual = original(self, *args, **options)
        actual.logits = 1.01 * actual.logits
        return actual

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", forward)
    for spec in (
        with_model(tmp_path),
        tiny_spec(tmp_path, model={"init": None, "path": str(tmp_path / "model")}),
    ):
        with pytest.raises(UserError, match="changes its logits after the head"):
            policy(spec)


def test_the_cost_of_a_pair_counts_the_multiplications_of_the_model() -> None:
    model = tiny_model()  # hidden 32, feed-forward 64, 4 heads of 8 with 2 for keys and values
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    assert pair_cost(model) == PairCost(token=2 * layer, scored=300 * 32, seen=2 * 2 * 32)
    assert pair_cost(tiny_model(tie_word_embeddings=False)) == pair_cost(model)


def test_a_pair_longer_than_the_model_has_positions_is_refused_by_its_row(tmp_path: Path) -> None:
    spec, config = tiny_spec(tmp_path), tiny_model(max_position_embeddings=17).config
    check_fit(config, LONG, "data.train", spec)
    config.max_position_embeddings = 16
    with pytest.raises(UserError, match=r"data.train row 9 = '17 tokens'.*set data.max_length=16"):
        check_fit(config, LONG, "data.train", spec)


def test_a_long_pair_fits_when_its_end_is_kept(tmp_path: Path) -> None:
    config = tiny_model(max_position_embeddings=8).config
    check_fit(
        config,
        LONG,
        "data.train",
        tiny_spec(tmp_path, data={"max_length": 8, "truncation": "keep_end"}),
    )
    with pytest.raises(UserError, match=r"set data\.max_length=8"):
        check_fit(
            config,
            LONG,
            "data.train",
            tiny_spec(tmp_path, data={"max_length": 9, "truncation": "keep_end"}),
        )


@pytest.mark.parametrize(
    ("model", "key"), [({}, "model.init.config"), ({"tokenizer": "org/other"}, "model.tokenizer")]
)
def test_tokens_beyond_the_models_vocabulary_are_refused(
    tmp_path: Path, model: dict[str, Any], key: str
) -> None:
    spec, config = tiny_spec(tmp_path, model=model), tiny_model(vocab_size=251).config
    check_fit(config, LONG, "data.train", spec)
    config.vocab_size = 250
    with pytest.raises(
        UserError, match=r"has 250 tokens, the tokenizer returned id 250 for data\.train"
    ) as caught:
        check_fit(config, LONG, "data.train", spec)
    assert caught.value.key == key
