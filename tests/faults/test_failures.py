"""A failure that cannot be survived ends in one line and an exit code, never in a hang or a silent
wrong result.
"""

import json
import shutil
from pathlib import Path

import pytest

from orchestrator.training.manifest import FORMAT, sealed
from support.debug_runs import finish_debug, run_debug
from support.run_files import losses
from support.tiny_settings import TINY_MODEL, random_rows, write_jsonl, write_settings


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    settings = write_settings(tmp_path, optimizer={"lr": 1e30}, scheduler={"name": "constant"})
    ended = run_debug(settings, ranks=2)
    assert ended.codes == [1, 1], ended.log
    assert "the gradient is not finite" in ended.stderr
    assert "step 2: the gradient" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_fp16_skips_the_overflow_and_goes_on(tmp_path: Path) -> None:
    """The first loss scale of 65536 may or may not overflow; whatever it does, lr follows the steps
    that were taken.
    """
    settings = write_settings(
        tmp_path, precision="fp16", scheduler={"name": "linear", "warmup_steps": 2}
    )
    ended = run_debug(settings)
    assert ended.codes == [0], ended.stderr
    assert sorted(losses(tmp_path / "runs" / "tiny")) == [1, 2, 3, 4]


def test_bf16_runs_and_begins_at_ln_2(tmp_path: Path) -> None:
    ended = run_debug(write_settings(tmp_path, precision="bf16"))
    assert ended.codes == [0], ended.stderr
    assert abs(losses(tmp_path / "runs" / "tiny")[1] - 0.6931471805599453) < 1e-6


def test_a_corrupt_checkpoint_is_passed_over(tmp_path: Path) -> None:
    settings = write_settings(
        tmp_path, training={"max_steps": 8, "logging_steps": 1}, checkpoint={"every_steps": 2}
    )
    whole = run_debug(settings, "run.name=whole")
    assert whole.codes == [0], whole.stderr
    run_dir = tmp_path / "runs" / "whole"
    expected = losses(run_dir)
    (run_dir / "result.json").unlink()  # as if the run had died before its end
    shard = run_dir / "checkpoints" / "step_00000008" / "rank_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    again = run_debug(settings, "run.name=whole")
    assert again.codes == [0], again.stderr
    assert "an older checkpoint is used" in again.stderr
    assert "resumed after step 6" in again.stdout
    assert losses(run_dir) == expected
    assert json.loads((run_dir / "result.json").read_text())["status"] == "finished"


@pytest.fixture
def ended_run(tmp_path: Path) -> tuple[Path, Path]:
    """Settings, and the directory of their run with checkpoints of steps 2 and 4, as if it had died
    before its end.
    """
    settings = write_settings(tmp_path, checkpoint={"every_steps": 2, "keep": 2})
    ended = run_debug(settings)
    assert ended.codes == [0], ended.stderr
    run_dir = tmp_path / "runs" / "tiny"
    (run_dir / "result.json").unlink()
    return settings, run_dir


def kept(run_dir: Path) -> dict[Path, bytes]:
    """Every file below the checkpoints that can be read, with its content."""
    return {
        path: path.read_bytes() for path in (run_dir / "checkpoints").rglob("*") if path.is_file()
    }


def test_without_a_whole_checkpoint_a_started_run_does_not_start_over(
    ended_run: tuple[Path, Path],
) -> None:
    settings, run_dir = ended_run
    for step, name in ((2, "index.json"), (4, "meta.json")):
        (run_dir / "checkpoints" / f"step_{step:08d}" / name).write_text("")
    before, logged = kept(run_dir), losses(run_dir)
    for _ in range(2):  # the refusal changes nothing, so the same command is refused again
        again = run_debug(settings)
        assert again.codes == [2], again.stderr
        complaint = (
            f"{run_dir}/checkpoints/step_00000004/meta.json: its content is not what was written"
        )
        assert again.stderr.splitlines() == [
            f"error: run.dir = '{run_dir}': has checkpoints, but none is complete ({complaint}); "
            f"restore their files, or choose another run.name, or remove {run_dir} to "
            "start over"
        ]
        assert (kept(run_dir), losses(run_dir)) == (before, logged)
    shutil.rmtree(run_dir)
    over = run_debug(settings)
    assert over.codes == [0], over.stderr
    assert losses(run_dir) == logged


def test_a_newer_format_is_refused_at_resume(ended_run: tuple[Path, Path]) -> None:
    settings, run_dir = ended_run
    manifest = run_dir / "checkpoints" / "step_00000004" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(sealed({**content, "format": 99})))
    before = kept(run_dir)
    again = run_debug(settings)
    assert again.codes == [2], again.stderr
    assert len(again.stderr.splitlines()) == 1
    assert again.stderr.startswith(
        f"error: {manifest} format = 99: this version reads format {FORMAT}; use the version"
    )
    assert kept(run_dir) == before


def test_a_file_that_cannot_be_read_ends_the_attempt_alone(ended_run: tuple[Path, Path]) -> None:
    settings, run_dir = ended_run
    path = run_dir / "checkpoints" / "step_00000004" / "meta.json"
    path.rename(run_dir / "meta.json")
    path.symlink_to(path)  # opening it fails, for root as well
    before = kept(run_dir)
    failed = run_debug(settings)
    assert failed.codes == [1], failed.stderr
    assert failed.stderr.startswith(
        f"error: {path} cannot be read now (Too many levels of symbolic links); "
    )
    assert len(failed.stderr.splitlines()) == 1
    assert kept(run_dir) == before
    (run_dir / "meta.json").rename(path)
    again = run_debug(settings)
    assert again.codes == [0], again.stderr
    assert "resumed after step 4" in again.stdout


def test_other_rows_under_the_same_name_are_refused(tmp_path: Path) -> None:
    settings = write_settings(tmp_path)
    finish_debug(settings)
    (tmp_path / "runs" / "tiny" / "result.json").unlink()
    write_jsonl(tmp_path / "train.jsonl", [*random_rows(31), random_rows(1, seed=5)[0]])
    again = run_debug(settings)
    assert again.codes == [2], again.stderr
    assert "have changed since this run was started" in again.stderr


SCORES_NOTHING = """
from support.user_collators import plain

def collate(rows):
    made = plain(rows)
    made["completion_mask"].zero_()
    return made
"""


def test_edited_code_and_steps_without_scored_tokens_are_reported(tmp_path: Path) -> None:
    settings = write_settings(
        tmp_path, data={"collator": "my_collator:collate"}, training={"max_steps": 2}
    )
    (tmp_path / "my_collator.py").write_text(SCORES_NOTHING)
    ended = run_debug(settings, cwd=tmp_path)
    assert ended.codes == [0], ended.stderr
    assert ended.stderr.count("no token of a chosen completion is scored") == 1
    (tmp_path / "runs" / "tiny" / "result.json").unlink()
    for edited in (False, True):
        (tmp_path / "my_collator.py").write_text(SCORES_NOTHING + "\n" * edited)
        again = run_debug(settings, cwd=tmp_path)
        assert again.codes == [0], again.stderr
        message = (
            "my_collator:collate was edited since this run started: steps after 2 use the new code"
        )
        assert (message in again.stderr) == edited
        (tmp_path / "runs" / "tiny" / "result.json").unlink()


DRAWS = """
from transformers import TrainerCallback

class StopsOnce(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            open(args.output_dir + "/STOP", "w").close()

class Ends(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2
        return True  # not a TrainerControl: of no account

class EndsEpoch(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step == 2
"""


def test_a_stopped_run_draws_the_same_random_numbers(tmp_path: Path) -> None:
    """A stop is agreed when the next step has drawn its dropout already; the resumed run must draw
    it again.
    """
    (tmp_path / "my_callbacks.py").write_text(DRAWS)
    config = {**TINY_MODEL, "attention_dropout": 0.2}
    model = {
        "init": {"model_type": "qwen2", "vocab_size": 300, "config": config},
        "disable_dropout": False,
    }
    settings = write_settings(tmp_path, model=model)
    whole = run_debug(settings, "run.name=whole", cwd=tmp_path)
    assert whole.codes == [0], whole.stderr
    words = (settings, "run.name=stopped")
    first = run_debug(*words, "callbacks=[my_callbacks:StopsOnce]", cwd=tmp_path)
    assert first.codes == [3], first.stderr
    again = run_debug(*words, cwd=tmp_path)
    assert again.codes == [0], again.stderr
    run_dirs = [tmp_path / "runs" / name for name in ("whole", "stopped")]
    assert losses(run_dirs[0]) == losses(run_dirs[1])
    models = [(run_dir / "model" / "model.safetensors").read_bytes() for run_dir in run_dirs]
    assert models[0] == models[1]


def test_the_end_that_a_callback_asked_for_survives_a_failed_export(tmp_path: Path) -> None:
    (tmp_path / "my_callbacks.py").write_text(DRAWS)
    settings = write_settings(tmp_path, callbacks=["my_callbacks:Ends"])
    run_dir = tmp_path / "runs" / "tiny"
    run_dir.mkdir(parents=True)
    (run_dir / "model").write_text("in the way")
    assert run_debug(settings, cwd=tmp_path).codes == [2]
    (run_dir / "model").unlink()
    again = run_debug(settings, cwd=tmp_path)
    assert again.codes == [0], again.stderr
    assert "finished after step 2 (requested by a callback)" in again.stdout


def test_an_end_of_the_last_epoch_is_that_of_the_callback(tmp_path: Path) -> None:
    (tmp_path / "my_callbacks.py").write_text(DRAWS)
    training = {"max_steps": None, "epochs": 1}
    settings = write_settings(tmp_path, callbacks=["my_callbacks:EndsEpoch"], training=training)
    ended = run_debug(settings, cwd=tmp_path)
    assert ended.codes == [0], ended.stderr
    assert "finished after step 2 (requested by a callback)" in ended.stdout


def test_a_reference_cache_that_cannot_be_made_costs_time_or_is_refused(tmp_path: Path) -> None:
    settings = write_settings(tmp_path, training={"max_steps": 1})
    (tmp_path / "runs" / ".cache").mkdir(parents=True)
    (tmp_path / "runs" / ".cache" / "reference_logps").write_text("in the way")
    lazy = run_debug(settings)
    assert lazy.codes == [0], lazy.stderr
    assert "the reference runs every time" in lazy.stderr + lazy.stdout
    full = run_debug(settings, "run.name=full", "reference.cache=full")
    assert full.codes == [2], full.stderr
    [line] = full.stderr.splitlines()
    assert line.startswith("error: reference.cache = 'full': ")
    assert "set data.cache_dir to a writable folder, or reference.cache=off" in line
