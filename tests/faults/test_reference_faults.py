"""Another reference than before, or a worse one than allowed, ends a run in one line; a fill that
was cut short or lost leaves no trace in the weights.
"""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from orchestrator.data.refcache import RECORD, _checks
from support.debug_runs import Ended, finish_debug, run_debug
from support.run_callbacks import stops_at
from support.run_files import losses
from support.run_hooks import dies_filling, disk_full_after
from support.tiny_parts import save_adapter, tiny_model, tokenizer
from support.tiny_settings import random_rows, write_jsonl, write_settings

STEPS, STOP = 6, 3
LORA: dict[str, Any] = {"lora": {"r": 4}}
GOES_ON: dict[str, Any] = {"lora": {"adapter_path": "{folder}/adapter"}}
OTHER: dict[str, Any] = {"path": "{folder}/other"}
INT8: dict[str, Any] = {"kind": "int8"}
ADAPTER_OFF: dict[str, Any] = {"kind": "adapter_off"}
PRECOMPUTED: dict[str, Any] = {"kind": "precomputed"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pairs, and in folders of their own a base with its tokenizer, another model and an adapter of
    the base.
    """
    write_jsonl(tmp_path / "train.jsonl", random_rows(32, longest=4))
    write_jsonl(tmp_path / "eval.jsonl", random_rows(8, seed=1, longest=4))
    for seed, name in enumerate(("base", "other")):
        tiny_model(seed, hidden_size=64, initializer_range=0.1).save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    save_adapter(tmp_path / "base", tmp_path / "adapter")
    return tmp_path


def settings_of(folder: Path, model: dict[str, Any] | None = None, **reference: Any) -> Path:
    """Settings of a run in folder/runs/tiny; {folder} stands for the folder in them."""
    words = json.loads(json.dumps([model or {}, reference]).replace("{folder}", str(folder)))
    return write_settings(
        folder,
        model={"init": None, "path": str(folder / "base")} | words[0],
        reference=words[1],
        training={"max_steps": STEPS, "logging_steps": 1},
        batch={"global_batch_size": 4, "micro_batch_size": 2},
        optimizer={"lr": 3e-3},
    )


def errors(ended: Ended) -> list[str]:
    """Return the error line of each rank that fails; all of them print one."""
    lines = error_lines(ended)
    assert len(lines) == sum(code != 0 for code in ended.codes), ended.log
    return lines


def error_lines(ended: Ended) -> list[str]:
    """Return the error lines of a run."""
    assert "Traceback" not in ended.log, ended.log
    return [line for line in ended.log.splitlines() if line.startswith("error")]


def outcome(run_dir: Path) -> tuple[dict[int, float], dict[str, bytes]]:
    """Loss by step and the trained weights, bit by bit."""
    weights = load_file(run_dir / "model" / "model.safetensors")
    return losses(run_dir), {name: value.numpy().tobytes() for name, value in weights.items()}


# --- another one ----------------------------------------------------------------------------------


def other_weights(folder: Path, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / name)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3, 5] += 1e-3
    model.save_pretrained(folder / name)


def other_config(folder: Path, name: str) -> None:
    path = folder / name / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rms_norm_eps": 2 * config["rms_norm_eps"]}))


def other_adapter(folder: Path, name: str) -> None:
    path = folder / name / "adapter_model.safetensors"
    save_file({key: 2 * value for key, value in load_file(path).items()}, path, {"format": "pt"})


def other_alpha(folder: Path, name: str) -> None:
    path = folder / name / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))


def other_tokens(folder: Path, name: str) -> None:
    path = folder / name / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))


def other_template(folder: Path, name: str) -> None:
    (folder / name / "chat_template.jinja").write_text("{{ messages }}")


@pytest.mark.parametrize(
    ("model", "reference", "change", "name", "named"),
    [
        ({}, {}, other_weights, "base", ["reference.weights"]),
        ({}, {}, other_config, "base", ["reference.config.rms_norm_eps (was 1e-06, now 2e-06)"]),
        ({}, {}, other_tokens, "base", ["tokenizer"]),
        ({}, {}, other_template, "base", ["tokenizer", "chat_template"]),
        ({}, OTHER, other_weights, "other", ["reference.weights"]),
        ({}, OTHER | INT8, other_weights, "other", ["reference.weights"]),
        ({}, PRECOMPUTED, other_weights, "base", ["reference.weights"]),
        ({}, OTHER | PRECOMPUTED, other_weights, "other", ["reference.weights"]),
        (LORA, ADAPTER_OFF, other_weights, "base", ["reference.weights"]),
        (LORA, INT8, other_weights, "base", ["base.weights"]),
        (LORA, OTHER, other_weights, "base", ["base.weights"]),
        (LORA, OTHER, other_weights, "other", ["reference.weights"]),
        (GOES_ON, ADAPTER_OFF, other_weights, "base", ["reference.weights"]),
        (GOES_ON, ADAPTER_OFF, other_adapter, "adapter", ["reference.weights"]),
        (GOES_ON, {}, other_adapter, "adapter", ["reference.weights"]),
        (GOES_ON, ADAPTER_OFF, other_alpha, "adapter", ["reference."]),
    ],
)
def test_resume_refuses_another_reference_by_name(
    folder: Path,
    model: dict[str, Any],
    reference: dict[str, Any],
    change: Callable[[Path, str], None],
    name: str,
    named: list[str],
) -> None:
    settings = settings_of(folder, model, **reference)
    stopped = run_debug(settings, stops_at(STOP))
    assert stopped.codes == [3], stopped.log
    kept = folder / "kept"
    shutil.copytree(folder / name, kept)
    change(folder, name)
    refused = run_debug(settings)
    assert refused.codes == [2], refused.log
    [line] = errors(refused)
    assert "is a run that was started with other models or another tokenizer: " in line
    for difference in named:
        assert f" {difference}" in line
    assert "restore them to resume it, or choose another run.name" in line
    assert max(losses(folder / "runs" / "tiny")) == STOP
    shutil.rmtree(folder / name)
    kept.rename(folder / name)
    assert f"resumed after step {STOP}" in finish_debug(settings)


def test_another_reference_is_refused_on_every_rank(folder: Path) -> None:
    settings = settings_of(folder)
    assert run_debug(settings, stops_at(STOP), ranks=2).codes == [3, 3]
    other_weights(folder, "base")
    refused = run_debug(settings, ranks=2)
    assert refused.codes == [2, 2], refused.log
    assert all("reference.weights (was " in line for line in errors(refused))


# --- log-probs that are not the reference's -------------------------------------------------------


def shift_records(folder: Path, by: float) -> int:
    """Add to each kept log-prob, with a checksum that is right; returns how many records
    there are.
    """
    count = 0
    for path in folder.glob("runs/.cache/reference_logps/*/*.logps"):
        records = np.fromfile(path, RECORD)
        records["logps"] += by
        records["check"] = _checks(records)
        records.tofile(path)
        count += len(records)
    return count


@pytest.mark.parametrize(
    "reference", [{}, {"cache": "full"}, PRECOMPUTED], ids=["lazy", "full", "precomputed"]
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_edited_reference_log_probs_are_detected_at_the_first_step(
    folder: Path, reference: dict[str, Any], ranks: int
) -> None:
    settings = settings_of(folder, **reference)
    first = run_debug(settings, stops_at(2), "run.name=first", ranks=ranks)
    assert first.codes == [3] * ranks, first.log
    assert shift_records(folder, 0.25) >= 16  # those of the evaluation and of two steps at least
    ended = run_debug(settings, "run.name=second", ranks=ranks)
    assert ended.codes == [1] * ranks, ended.log
    [line] = error_lines(ended)  # of rank 0: all ranks raise the same
    assert line.startswith("error: step 1: ")
    assert "the policy starts as its reference, but their log-probs differ by 0.2" in line
    assert f"remove {folder}/runs/.cache/reference_logps in case it was edited" in line
    assert not list(folder.glob("runs/second/checkpoints/*"))
    assert "step 1/" not in ended.log


# --- a fill that was cut short, or lost -----------------------------------------------------------


def records(run_dir: Path) -> dict[bytes, bytes]:
    """The log-probs that are kept on disk, by the hash of their pair."""
    data = b"".join(
        path.read_bytes() for path in sorted(run_dir.glob(".cache/reference_logps/*/*.logps"))
    )
    size = RECORD.itemsize
    return {
        data[i : i + 16]: data[i : i + size] for i in range(0, len(data) - len(data) % size, size)
    }


# on one rank 16 micro-batches of training pairs, then 4 of evaluation pairs; on each of two half as
# many
@pytest.mark.parametrize(("ranks", "question"), [(1, 3), (1, 18), (2, 3)])
@pytest.mark.parametrize("model", [{}, GOES_ON], ids=["whole", "adapter"])
def test_a_kill_during_the_fill_leaves_no_trace(
    folder: Path, model: dict[str, Any], ranks: int, question: int
) -> None:
    settings = settings_of(folder, model, **PRECOMPUTED)
    finish_debug(settings, f"run.dir={folder}/whole", ranks=ranks)
    killed = f"run.dir={folder}/killed"
    dead = run_debug(settings, killed, ranks=ranks, hook=partial(dies_filling, question))
    assert dead.codes == [-9] * ranks, dead.log
    assert not list(folder.glob("killed/tiny/checkpoints/*"))
    assert len(records(folder / "killed")) == 2 * (question - 1) * ranks
    finish_debug(settings, killed, ranks=ranks)
    assert records(folder / "killed") == records(folder / "whole")
    assert outcome(folder / "killed" / "tiny") == outcome(folder / "whole" / "tiny")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("model", "reference"),
    [({}, {}), ({"num_frozen_layers": 1}, {}), (LORA, {}), (GOES_ON, {}), ({}, OTHER)],
    ids=["whole", "frozen", "new adapter", "old adapter", "another model"],
)
def test_log_probs_lost_between_stop_and_resume_are_made_again_by_the_start(
    folder: Path, model: dict[str, Any], reference: dict[str, Any], ranks: int
) -> None:
    settings = settings_of(folder, model, **reference, **PRECOMPUTED)
    finish_debug(settings, f"run.dir={folder}/whole", ranks=ranks)
    words = f"run.dir={folder}/lost"
    stopped = run_debug(settings, words, stops_at(STOP), ranks=ranks)
    assert stopped.codes == [3] * ranks, stopped.log
    shutil.rmtree(folder / "lost" / ".cache" / "reference_logps")
    again = finish_debug(settings, words, ranks=ranks)
    assert f"resumed after step {STOP}" in again
    assert "reference cache: 32 training pairs" in again
    assert records(folder / "lost") == records(folder / "whole")
    assert outcome(folder / "lost" / "tiny") == outcome(folder / "whole" / "tiny")


def test_a_disk_that_is_full_during_the_fill_costs_one_rank_nothing(folder: Path) -> None:
    settings = settings_of(folder, **PRECOMPUTED)
    output = finish_debug(settings, hook=partial(disk_full_after, 2))
    assert "cannot be written (No space left on device)" in output
    finish_debug(settings, f"run.dir={folder}/whole")
    assert outcome(folder / "runs" / "tiny") == outcome(folder / "whole" / "tiny")


def test_a_disk_that_is_full_during_the_fill_ends_two_ranks_before_the_first_step(
    folder: Path,
) -> None:
    """Log-probs that one rank could not write would be missing on the other at some later step."""
    settings = settings_of(folder, **PRECOMPUTED)
    full = run_debug(settings, ranks=2, hook=partial(disk_full_after, 2))
    assert full.codes == [2, 2], full.log
    assert "cannot be written (No space left on device)" in full.log
    for line in errors(full):
        assert "error: reference.kind = 'precomputed': " in line
        assert "free space there" in line
    assert "step 1/" not in full.log
    finish_debug(settings, ranks=2)
    finish_debug(settings, f"run.dir={folder}/whole", ranks=2)
    assert outcome(folder / "runs" / "tiny") == outcome(folder / "whole" / "tiny")


# --- one that is too coarse -----------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("model", "reference"),
    [
        ({}, INT8),
        ({}, {"kind": "nf4"}),
        ({}, {"dtype": "bf16"}),
        (GOES_ON, INT8),
        ({}, OTHER | INT8),
    ],
    ids=["int8", "nf4", "bf16", "int8 of an adapter", "int8 of another model"],
)
def test_max_reward_error_limits_the_error_of_a_reference(
    folder: Path, model: dict[str, Any], reference: dict[str, Any], ranks: int
) -> None:
    settings = settings_of(folder, model, **reference)
    refused = run_debug(settings, "reference.max_reward_error=1e-6", ranks=ranks)
    assert refused.codes == [2] * ranks, refused.log
    lines = errors(refused)
    assert not list(folder.glob("runs/tiny/checkpoints/*"))
    output = finish_debug(settings, "reference.max_reward_error=0.5", ranks=ranks)
    measured = re.search(r"reward margins by at most (\S+)", output)
    assert measured
    assert 1e-6 < float(measured[1]) < 0.5
    for line in lines:
        assert "reference.max_reward_error = 1e-06: the reference in " in line
        assert (
            f"changes reward margins by up to {measured[1]}; raise it, or use a reference with "
            "more bits" in line
        )
