"""Training and evaluation sets of a run: several with weights, less a held-out part, also after a
kill.
"""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from orchestrator.data.order import epoch_order
from orchestrator.run.local.replay import replay
from orchestrator.settings.load import load_spec
from orchestrator.training.prepare import PreparedRun, prepare
from orchestrator.training.rundir import RunDir
from support.debug_runs import finish_debug, run_debug
from support.run_files import losses, metric_lines
from support.tiny_settings import random_rows, write_jsonl, write_settings

CALLBACKS = """
import json
import os
from pathlib import Path
from transformers import TrainerCallback

class NotesEpochs(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        with open(Path(args.output_dir, "epochs.jsonl"), "a") as file:
            file.write(json.dumps([state.global_step, state.epoch]) + "\\n")

class DiesOnce(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        died = Path(args.output_dir, "died")
        if state.global_step == 5 and not died.exists():
            died.touch()
            os._exit(1)
"""
SEED, BATCH = 7, 8  # of support.raw_settings


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 pairs of text, two to a prompt, and 8 conversations that come two or three times in an
    epoch.
    """
    folder = tmp_path_factory.mktemp("sources")
    (folder / "my_callbacks.py").write_text(CALLBACKS)
    text = [{**row, "prompt": f"Say {number // 2}"} for number, row in enumerate(random_rows(20))]
    chat = str(write_jsonl(folder / "chat.jsonl", random_rows(8, seed=1, conversational=True)))
    sets = [str(write_jsonl(folder / "text.jsonl", text)), {"path": chat, "weight": 2.5}]
    return write_settings(
        folder,
        data={"train": sets, "eval": None, "eval_fraction": 0.25},
        training={"max_steps": None, "epochs": 2},
        checkpoint={"every_steps": 3},
        callbacks=["my_callbacks:NotesEpochs"],
    )


@pytest.fixture(scope="module")
def whole(settings: Path) -> Path:
    """The directory of a run of 2 ranks."""
    finish_debug(settings, ranks=2, cwd=settings.parent)
    return settings.parent / "runs" / "tiny"


@pytest.fixture(scope="module")
def prepared(settings: Path, whole: Path) -> PreparedRun:
    """Return the data that its ranks prepare."""
    return prepare(load_spec(settings, ["callbacks=[]"]))


def test_an_epoch_has_the_shares_of_the_sets(prepared: PreparedRun, whole: Path) -> None:
    train, held_out = prepared.train, prepared.eval[""]
    assert (len(train), len(held_out)) == (21, 7)
    text, chat = train.shares
    assert (text.pairs, chat.pairs) == (text.per_epoch, round(chat.per_epoch / 2.5))
    per_epoch = text.per_epoch + chat.per_epoch
    steps = -(-per_epoch // BATCH)
    ended = [json.loads(line) for line in (whole / "epochs.jsonl").read_text().splitlines()]
    assert ended == [[steps, 1.0], [2 * steps, 2.0]]
    epochs = [line["epoch"] for line in metric_lines(whole) if "loss" in line]
    assert epochs == pytest.approx(
        [
            epoch + min(step * BATCH / per_epoch, 1)
            for epoch in (0, 1)
            for step in range(1, steps + 1)
        ]
    )


def test_a_step_trains_on_its_part_of_the_epoch_and_an_evaluation_on_what_is_held_out(
    prepared: PreparedRun, whole: Path
) -> None:
    train, held_out = prepared.train, prepared.eval[""]
    order = epoch_order(train.shares, SEED, 1)
    step = -(-len(order) // BATCH) + 2
    replayed = replay(RunDir(whole), step, ["callbacks=[]"])
    places = [train.place(train.pair_ids[index]) for index in order[BATCH : 2 * BATCH]]
    assert sorted((pair.source, pair.row) for pair in replayed.pairs) == sorted(
        (place.source, place.row) for place in places
    )
    assert replayed.loss == pytest.approx(losses(whole)[step], abs=1e-6)
    prompts = [
        {str(pairs[index]["prompt_ids"]) for index in range(len(pairs))}
        for pairs in (train, held_out)
    ]
    assert prompts[0].isdisjoint(prompts[1])


def test_known_log_probs_of_the_reference_give_the_same_losses(settings: Path, whole: Path) -> None:
    output = finish_debug(
        settings, "run.name=known", "reference.kind=precomputed", cwd=settings.parent
    )
    assert "reference cache: 21 training pairs" in output
    # the first run has kept what it said of those that are evaluated
    assert "reference cache: 7" not in output
    curve = losses(settings.parent / "runs" / "known")
    assert curve == pytest.approx(losses(whole), abs=1e-5)


def test_a_run_that_was_killed_goes_on_with_the_same_pairs(settings: Path, whole: Path) -> None:
    words = ("run.name=killed", "callbacks=[my_callbacks:DiesOnce]")
    run_dir, chat = settings.parent / "runs" / "killed", settings.parent / "chat.jsonl"
    assert 1 in run_debug(settings, *words, ranks=2, cwd=settings.parent).codes
    rows_before = chat.read_text()
    chat.write_text(rows_before.replace("Say", "Tell", 1))
    refused = run_debug(settings, *words, cwd=settings.parent)
    assert refused.codes == [2]
    assert "data.train" in refused.stderr  # the value is cut where the paths are long
    assert "its rows or the tokenizer have changed since this run was started" in refused.stderr
    chat.write_text(rows_before)
    finish_debug(settings, *words, ranks=2, cwd=settings.parent)
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (run_dir, whole)]
    assert weights[0].keys() == weights[1].keys()
    assert all(tensor.equal(weights[1][name]) for name, tensor in weights[0].items())
    assert losses(run_dir) == losses(whole)
