"""A checkpoint becomes a folder that from_pretrained loads, and nothing else of the user's is touched."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_spec
from tiny import ALONE, ids, tiny_model, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.engines.base import Owned
from orchestrator.settings.spec import UserError
from orchestrator.training.checkpoint import save, step_folder
from orchestrator.training.export import export
from orchestrator.training.rundir import RunDir

MODEL = tiny_model(seed=4)


def checkpoint(run_dir: RunDir, step: int, model: Any) -> Path:
    owned = [
        Owned(name, tuple(p.shape), 0, p.numel(), {"param": p.detach().flatten()})
        for name, p in model.named_parameters()
    ]
    return save(run_dir.checkpoints, step, owned, {"pairs_seen": 8 * step}, ALONE)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A run with two checkpoints, of which the second holds MODEL."""
    spec = tiny_spec(tmp_path)
    made = RunDir(spec.run_dir)
    made.begin(spec)
    tokenizer().save_pretrained(made.tokenizer)
    MODEL.config.save_pretrained(made.tokenizer)
    made.metrics.write_text('{"step": 1, "loss": 0.9}\n{"step": 2, "loss": 0.25, "eval_loss": 0.125}\n')
    checkpoint(made, 1, tiny_model(seed=9))
    checkpoint(made, 2, MODEL)
    return made


def weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_newest_checkpoint_becomes_a_model(run_dir: RunDir, dtype: str, expected: torch.dtype) -> None:
    out = run_dir.path / "out"
    assert export(run_dir, out, dtype) == out
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == expected
    assert torch.equal(weights(loaded), weights(MODEL).to(expected))
    assert AutoTokenizer.from_pretrained(out)("Say ab.")["input_ids"] == ids("Say ab.")
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer().chat_template
    assert not (run_dir.path / ".out.partial").exists()


def test_one_checkpoint_can_be_chosen(run_dir: RunDir) -> None:
    out = export(run_dir, run_dir.path / "out", checkpoint=step_folder(run_dir.checkpoints, 1))
    assert torch.equal(weights(AutoModelForCausalLM.from_pretrained(out)), weights(tiny_model(seed=9)))


def test_a_broken_newest_checkpoint_gives_the_one_before(run_dir: RunDir) -> None:
    (step_folder(run_dir.checkpoints, 2) / "rank_00000.safetensors").write_bytes(b"")
    out = export(run_dir, run_dir.path / "out")
    assert torch.equal(weights(AutoModelForCausalLM.from_pretrained(out)), weights(tiny_model(seed=9)))


def test_the_card_says_how_the_model_was_trained(run_dir: RunDir) -> None:
    card = (export(run_dir, run_dir.path / "out") / "README.md").read_text()
    for words in ("# tiny", "library_name: transformers", "- dpo", "| Pairs seen | 16 |", "| Optimizer steps | 2 |"):
        assert words in card
    for words in ("DPO (sigmoid, beta 0.1)", "| loss | 0.2500 |", "| eval_loss | 0.1250 |", "train.jsonl"):
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
    with pytest.raises(UserError, match="other things in it"):
        export(run_dir, out)
    assert (out / "notes.txt").read_text() == "precious"


def test_a_model_that_is_no_export_is_left_alone(run_dir: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "base"
    tiny_model(seed=1).save_pretrained(out)
    with pytest.raises(UserError, match="OUT"):
        export(run_dir, out)
    assert torch.equal(weights(AutoModelForCausalLM.from_pretrained(out)), weights(tiny_model(seed=1)))


def test_a_file_in_the_way_is_refused(run_dir: RunDir, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="OUT"):
        export(run_dir, tmp_path / "file")


def test_a_run_without_a_whole_checkpoint_is_refused(run_dir: RunDir) -> None:
    for step in (1, 2):
        (step_folder(run_dir.checkpoints, step) / "meta.json").unlink()
    with pytest.raises(UserError, match=r"no whole checkpoint .*meta.json: is missing"):
        export(run_dir, run_dir.path / "out")
    assert not (run_dir.path / "out").exists()
