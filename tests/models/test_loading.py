"""A model folder is loaded only when its files hold all its weights, and code that comes with it is
never run.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.models.loading import check_weights, config_at, read_model, tokenizer_at
from orchestrator.settings.errors import UserError
from orchestrator.training.prepare import pad_id
from support.tiny_parts import change_weights, tiny_model, with_third_layer, without_layer

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of a model folder, to change."""
    return shutil.copytree(saved, tmp_path / "model")


def change_json(file: Path, **values: Any) -> None:
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**known, **values}))


def refusals(folder: Path, key: str) -> list[str]:
    """Return the errors of the check without values, of loading, and of mapped loading."""
    lines = []
    config = config_at(key, str(folder))
    for load in (
        lambda: check_weights(key, str(folder), config),
        lambda: read_model(key, str(folder), config, torch.float32, mapped=False),
        lambda: read_model(key, str(folder), config, torch.float32, mapped=True),
    ):
        with pytest.raises(UserError) as caught:
            load()
        lines.append(str(caught.value))
    return lines


def with_prefix(weights: Weights) -> Weights:
    return {f"_orig_mod.{name}": value for name, value in weights.items()}


def with_reward_head(weights: Weights) -> Weights:
    return {**weights, "score.weight": torch.ones(1, 32)}


def with_half_a_norm(weights: Weights) -> Weights:
    return {**weights, "model.norm.weight": weights["model.norm.weight"][:7].clone()}


@pytest.mark.parametrize("key", ["model.path", "reference.path"])
@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (without_layer, "model.layers.1."),
        (with_prefix, "'_orig_mod.' of torch.compile"),
        (with_reward_head, "score.weight"),
        (with_third_layer, "does not use"),
        (with_half_a_norm, "model.norm.weight has shape (7,)"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(
    folder: Path, key: str, weights: Any, words: str
) -> None:
    change_weights(folder / "model.safetensors", weights)
    for line in refusals(folder, key):
        assert line.startswith(f"{key} = ")
        assert words in line


@pytest.mark.parametrize("mapped", [False, True])
def test_a_whole_model_is_loaded(saved: Path, mapped: bool) -> None:
    config = config_at("model.path", str(saved))
    check_weights("model.path", str(saved), config)
    loaded = read_model("model.path", str(saved), config, torch.float32, mapped).state_dict()
    assert all(
        torch.equal(value, loaded[name]) for name, value in tiny_model().state_dict().items()
    )


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(folder: Path, value: float, mapped: bool) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    change_weights(
        folder / "model.safetensors",
        lambda weights: {**weights, name: weights[name].index_fill(0, torch.tensor([3]), value)},
    )
    config = config_at("reference.path", str(folder))
    with pytest.raises(UserError, match=rf"reference.path = .*{name} holds (NaN|inf)"):
        read_model("reference.path", str(folder), config, torch.float32, mapped)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8"])
def test_quantised_weights_do_not_train(folder: Path, method: str) -> None:
    change_json(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(UserError, match=rf"model.path = .*quantised \({method}\) and cannot train"):
        config_at("model.path", str(folder))


@pytest.fixture
def no_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(prompt: str = "") -> str:
        raise AssertionError(f"asks on stdin: {prompt}")

    monkeypatch.setattr("builtins.input", ask)


@pytest.mark.usefixtures("no_stdin")
@pytest.mark.parametrize("place", ["mine.", "someone/elsewhere--mine."])
def test_code_of_a_model_is_never_run(folder: Path, place: str) -> None:
    (folder / "mine.py").write_text("raise AssertionError('it ran')\n")
    auto_map = {"AutoConfig": f"{place}Mine", "AutoModelForCausalLM": f"{place}Model"}
    change_json(folder / "config.json", model_type="mine", auto_map=auto_map)
    with pytest.raises(UserError, match="model config needs code that comes with it"):
        config_at("model.path", str(folder))


@pytest.mark.usefixtures("no_stdin")
def test_a_known_architecture_does_not_need_the_code_beside_it(folder: Path) -> None:
    (folder / "mine.py").write_text("raise AssertionError('it ran')\n")
    change_json(
        folder / "config.json",
        auto_map={"AutoModelForCausalLM": "mine.Model", "AutoConfig": "mine.Config"},
    )
    config = config_at("model.path", str(folder))
    model = read_model("model.path", str(folder), config, torch.float32, mapped=False)
    assert type(model).__name__ == "Qwen2ForCausalLM"


@pytest.mark.usefixtures("no_stdin")
def test_code_of_a_tokenizer_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise AssertionError('it ran')\n")
    settings = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    change_json(tmp_path / "tokenizer_config.json", **settings)
    with pytest.raises(UserError, match=r"model.tokenizer = .*its tokenizer"):
        tokenizer_at("model.tokenizer", str(tmp_path))


@pytest.mark.parametrize("key", ["model.path", "reference.path"])
def test_a_pad_token_beyond_the_vocabulary_in_the_config_is_named(folder: Path, key: str) -> None:
    change_json(folder / "config.json", pad_token_id=300)
    for line in refusals(folder, key):
        assert (
            "pad_token_id in its config.json is not a token of its vocabulary; set pad_token_id "
            "to null" in line
        )


def test_a_pad_token_that_the_model_lacks_is_replaced() -> None:
    class Padded:
        pad_token_id, eos_token_id = 300, 257

    config = tiny_model().config
    assert pad_id(Padded, config) == 257
    config.vocab_size = 301
    assert pad_id(Padded, config) == 300
    config.vocab_size = 200
    assert pad_id(Padded, config) == 0
