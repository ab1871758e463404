"""A checkpoint becomes a folder that from_pretrained loads, and nothing else of the user's is
touched.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from orchestrator.engines.base import Shard
from orchestrator.settings.errors import UserError
from orchestrator.training.checkpoint_reader import Reader
from orchestrator.training.checkpoint_writer import save
from orchestrator.training.export import export
from orchestrator.training.manifest import step_folder
from orchestrator.training.rundir import RunDir
from support.debug_runs import finish_debug
from support.run_callbacks import KeepsLogps
from support.tiny_parts import ALONE, ids, pair_rows, save_adapter, tiny_model, tokenizer
from support.tiny_settings import tiny_spec, write_settings

MODEL = tiny_model(seed=4)


def checkpoint(run_dir: RunDir, step: int, model: Any) -> Path:
    owned = [
        Shard(name, tuple(p.shape), 0, p.numel(), {"param": p.detach().flatten()})
        for name, p in model.named_parameters()
    ]
    meta = {"pairs_seen": 8 * step, "callbacks": {"best_global_step": None}}
    return save(run_dir.checkpoints, step, owned, meta, ALONE)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A run with two checkpoints, of which the second holds MODEL."""
    spec = tiny_spec(tmp_path)
    directory = RunDir(spec.run_dir)
    directory.begin(spec)
    tokenizer().save_pretrained(directory.tokenizer)
    MODEL.config.save_pretrained(directory.tokenizer)
    directory.metrics.write_text(
        '{"step": 1, "loss": 0.9}\n'
        '{"step": 2, "loss": 0.25, "eval_odd_loss": 0.125, "eval_odd_rewards/accuracies": 1}\n'
    )
    checkpoint(directory, 1, tiny_model(seed=9))
    checkpoint(directory, 2, MODEL)
    return directory


def weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_export_writes_the_newest_checkpoint(
    run_dir: RunDir, dtype: str, expected: torch.dtype
) -> None:
    out = run_dir.path / "out"
    assert export(run_dir, out, dtype) == out
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == expected
    assert torch.equal(weights(loaded), weights(MODEL).to(expected))
    assert AutoTokenizer.from_pretrained(out)("Say ab.")["input_ids"] == ids("Say ab.")
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer().chat_template
    assert not (run_dir.path / ".out.partial").exists()


def test_export_writes_a_chosen_checkpoint(run_dir: RunDir) -> None:
    out = export(run_dir, run_dir.path / "out", checkpoint=step_folder(run_dir.checkpoints, 1))
    assert torch.equal(
        weights(AutoModelForCausalLM.from_pretrained(out)), weights(tiny_model(seed=9))
    )


def test_a_broken_newest_checkpoint_gives_the_one_before(run_dir: RunDir) -> None:
    (step_folder(run_dir.checkpoints, 2) / "rank_00000.safetensors").write_bytes(b"")
    out = export(run_dir, run_dir.path / "out")
    assert torch.equal(
        weights(AutoModelForCausalLM.from_pretrained(out)), weights(tiny_model(seed=9))
    )


def test_the_best_of_a_run_without_a_metric_is_refused(run_dir: RunDir) -> None:
    with pytest.raises(
        UserError, match=r"has no best checkpoint \(evaluation\.metric_for_best was not set\)"
    ):
        export(run_dir, run_dir.path / "out", which="best")


def test_the_card_says_how_the_model_was_trained(run_dir: RunDir) -> None:
    card = (export(run_dir, run_dir.path / "out") / "README.md").read_text()
    for words in (
        "# tiny",
        "library_name: transformers",
        "- dpo",
        "| Pairs seen | 16 |",
        "| Optimizer steps | 2 |",
    ):
        assert words in card
    for words in (
        "DPO (sigmoid, beta 0.1)",
        "| loss | 0.2500 |",
        "| eval_odd_loss | 0.1250 |",
        "train.jsonl",
    ):
        assert words in card
    assert str(run_dir.path) not in card  # no path of the machine


def test_a_run_that_was_killed_while_logging_is_exported(run_dir: RunDir) -> None:
    with open(run_dir.metrics, "a") as file:
        file.write('{"step": 3, "lo')
    assert "| loss | 0.2500 |" in (export(run_dir, run_dir.path / "out") / "README.md").read_text()


def test_an_earlier_export_is_replaced(run_dir: RunDir) -> None:
    out = export(run_dir, run_dir.path / "out", checkpoint=step_folder(run_dir.checkpoints, 1))
    export(run_dir, out)
    assert torch.equal(weights(AutoModelForCausalLM.from_pretrained(out)), weights(MODEL))


def test_a_folder_with_other_things_is_left_alone(run_dir: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match="with other files"):
        export(run_dir, out)
    assert (out / "notes.txt").read_text() == "precious"


def test_export_does_not_replace_a_model_it_did_not_write(run_dir: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "base"
    tiny_model(seed=1).save_pretrained(out)
    with pytest.raises(UserError, match="OUT"):
        export(run_dir, out)
    assert torch.equal(
        weights(AutoModelForCausalLM.from_pretrained(out)), weights(tiny_model(seed=1))
    )


def test_a_file_in_the_way_is_refused(run_dir: RunDir, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="OUT"):
        export(run_dir, tmp_path / "file")


def test_a_run_without_a_whole_checkpoint_is_refused(run_dir: RunDir) -> None:
    for step in (1, 2):
        (step_folder(run_dir.checkpoints, step) / "meta.json").unlink()
    with pytest.raises(UserError, match=r"no complete checkpoint .*meta.json: is missing"):
        export(run_dir, run_dir.path / "out")
    assert not (run_dir.path / "out").exists()


# --- a run that trained part of a model -----------------------------------------------------------

LORA: dict[str, Any] = {"r": 4}
UNTIED = {"tie_word_embeddings": False}


@pytest.fixture
def base(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A model with its tokenizer on disk; a parameter is for its config."""
    out = tmp_path / "base"
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "initializer_range": 0.1}
    tiny_model(**sizes, **getattr(request, "param", {})).save_pretrained(out)
    tokenizer().save_pretrained(out)
    return out


@pytest.fixture
def adapter(base: Path) -> dict[str, Any]:
    """Settings that go on from an adapter of the base."""
    save_adapter(base, base.parent / "adapter")
    return {"adapter_path": str(base.parent / "adapter")}


tied_or_not = pytest.mark.parametrize("base", [{}, UNTIED], ids=["tied", "untied"], indirect=True)


def trained(base: Path, reference: dict[str, Any], **model: Any) -> RunDir:
    """A run of a few large steps, whose callback has kept what the policy in its memory says at the
    end.
    """
    settings = write_settings(
        base.parent,
        model={"init": None, "path": str(base), **model},
        reference=reference,
        data={"eval": None},
        optimizer={"lr": 2e-2},
        callbacks=["support.run_callbacks:KeepsLogps"],
    )
    finish_debug(settings)
    return RunDir(base.parent / "runs" / "tiny")


@torch.no_grad()
def logps(model: Any) -> torch.Tensor:
    """Return the log-probs that KeepsLogps keeps, one sequence at a time by transformers alone."""
    pairs, values = pair_rows(KeepsLogps.PAIRS), []
    for side in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            tokens = torch.tensor([pair["prompt_ids"] + pair[side]])
            of_each = (
                model(tokens).logits[0, :-1].double().log_softmax(-1).gather(1, tokens[0, 1:, None])
            )
            values.append(of_each[len(pair["prompt_ids"]) - 1 :].sum())
    return torch.stack(values)


def assert_says_what_the_policy_said(run_dir: RunDir, base: Path, tolerance: float = 1e-5) -> Any:
    """Compare the exported model, which is returned, with the policy; it must be far from the
    base.
    """
    exported, loading = AutoModelForCausalLM.from_pretrained(
        run_dir.model, output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    policy = torch.load(run_dir.path / "logps.pt")
    output = logps(AutoModelForCausalLM.from_pretrained(base))
    assert (output - policy).abs().max() > max(0.5, 5 * tolerance)
    assert (logps(exported) - policy).abs().max() < tolerance
    return exported


@tied_or_not
@pytest.mark.parametrize("kind", ["adapter_off", "copy"])
def test_a_new_adapter_is_merged(base: Path, kind: str) -> None:
    exported = assert_says_what_the_policy_said(trained(base, {"kind": kind}, lora=LORA), base)
    assert (
        exported.config.tie_word_embeddings == AutoConfig.from_pretrained(base).tie_word_embeddings
    )


@tied_or_not
@pytest.mark.parametrize("kind", ["adapter_off", "copy"])
def test_export_merges_a_continued_adapter_with_its_new_weights(
    base: Path, adapter: dict[str, Any], kind: str
) -> None:
    assert_says_what_the_policy_said(trained(base, {"kind": kind}, lora=adapter), base)


# int8 on a CPU quantises activations too, and bf16 rounds them, which the merged model does not
BASES = [("bf16", 0.1), ("fp16", 0.015), ("int8", 0.2), ("nf4", 1e-5)]
TARGETS = {"all": None, "some": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("base", "held", "tolerance", "targets"),
    [  # every two of them together: heads are tied and untied in turn
        pytest.param(
            UNTIED if (number + which) % 2 else {}, *held, TARGETS[name], id=f"{held[0]}-{name}"
        )
        for number, held in enumerate(BASES)
        for which, name in enumerate(TARGETS)
    ],
    indirect=["base"],
)
def test_an_adapter_is_merged_with_a_base_of_fewer_bits(
    base: Path, held: str, tolerance: float, targets: list[str] | None
) -> None:
    """Layers without an adapter are held in fewer bits, too."""
    run_dir = trained(
        base, {"kind": "adapter_off"}, lora=LORA | {"base": held, "target_modules": targets}
    )
    exported = assert_says_what_the_policy_said(run_dir, base, tolerance)
    assert exported.dtype == torch.float32


def test_a_merged_model_can_be_written_in_16_bits(base: Path) -> None:
    run_dir = trained(base, {"kind": "adapter_off"}, lora=LORA)
    whole, half = (
        load_file(run_dir.model / "model.safetensors"),
        export(run_dir, run_dir.path / "half", "bf16"),
    )
    assert all(
        torch.equal(v, whole[k].bfloat16())
        for k, v in load_file(half / "model.safetensors").items()
    )


@pytest.mark.parametrize("tied_head", ["untie", "freeze"])
@pytest.mark.parametrize("sharing", [True, False])
def test_a_head_that_was_untied_from_frozen_embeddings_stays_so(
    base: Path, tied_head: str, sharing: bool
) -> None:
    shared = {"kind": "shared_layers", "num_shared_layers": 2}
    run_dir = trained(base, shared if sharing else {}, tied_head=tied_head, num_frozen_layers=2)
    exported, start = (
        assert_says_what_the_policy_said(run_dir, base),
        AutoModelForCausalLM.from_pretrained(base),
    )
    is_untied = tied_head == "untie"
    assert exported.config.tie_word_embeddings != is_untied
    assert torch.equal(exported.lm_head.weight, start.lm_head.weight) != is_untied
    assert torch.equal(exported.model.embed_tokens.weight, start.model.embed_tokens.weight)
    assert torch.equal(
        exported.model.layers[1].mlp.up_proj.weight, start.model.layers[1].mlp.up_proj.weight
    )
    assert not torch.equal(
        exported.model.layers[2].mlp.up_proj.weight, start.model.layers[2].mlp.up_proj.weight
    )


@pytest.mark.parametrize(
    "reference", [{"kind": "adapter_off"}, {"kind": "copy"}, {"kind": "int8"}, {"path": "{base}"}]
)
def test_an_adapter_is_not_merged_into_another_base(base: Path, reference: dict[str, Any]) -> None:
    other = base.parent / "other"
    shutil.copytree(base, other)
    run_dir = trained(
        base, {k: v.replace("{base}", str(other)) for k, v in reference.items()}, lora=LORA
    )
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"model.path = .*its weights are not those that the adapter was trained on"
    ):
        export(run_dir, run_dir.path / "out")
    assert not (run_dir.path / "out").exists()
    shutil.rmtree(base)
    with pytest.raises(UserError, match=r"model.path = .*is not a folder"):
        export(run_dir, run_dir.path / "out")


def test_a_checkpoint_of_an_adapter_holds_nothing_of_the_base(base: Path) -> None:
    run_dir = trained(base, {"kind": "adapter_off"}, lora=LORA)
    reader = Reader(next(run_dir.checkpoints.glob("step_*")))
    assert len(reader.shapes) == 2 * 7 * 3  # two factors of each linear layer
    assert all(".lora_" in name for name in reader.shapes)
    [tensors] = reader.folder.glob("rank_*.safetensors")
    assert (
        3 * sum(math.prod(shape) for shape in reader.shapes.values()) * 4 <= tensors.stat().st_size
    )
    assert tensors.stat().st_size < 0.6 * (run_dir.model / "model.safetensors").stat().st_size
