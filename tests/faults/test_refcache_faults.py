"""The reference is asked about each pair once, by whatever rank or run, and a kill costs only what
was under way.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file

from orchestrator.data.refcache import RECORD
from support.forkserver import free_port
from support.repository import ROOT
from support.run_files import losses, metric_lines
from support.tiny_settings import write_settings

TRAIN, EVAL = 32, 8
# In a smaller model the last bit of an answer does not depend on the pairs that are asked about
# together.
LARGER = ("model.init.config.hidden_size=256", "model.init.config.intermediate_size=704")
# A process that has imported everything once, watches Reference.logps and forks each rank of
# each run that it is asked for, with torchrun's environment: real processes that really die,
# without seconds of importing for each.
RUNNER = """
import gc, json, os, signal, sys
import torch
from orchestrator import cli
from orchestrator.models import policy, reference
from orchestrator.training import worker
import transformers.models.qwen2.modeling_qwen2

ask, asked = reference.Reference.logps, 0

def watched(self, batch, captured=None):
    global asked
    asked += 1
    dies_at = json.loads(os.environ.get("DIES_AT_QUESTION", "{}"))
    if asked == dies_at.get(os.environ.get("RANK", "0")):
        os.kill(os.getpid(), signal.SIGKILL)
    found = ask(self, batch, captured)
    rows = zip(batch.pair_ids, batch.sequence_tokens, batch.pair_weights)
    pairs = [[int(i), int(n)] for i, n, w in rows if w > 0]
    with open(os.environ["ASKED"], "a") as file:
        file.write(json.dumps({"pairs": pairs, "in_step": torch.is_grad_enabled()}) + "\\n")
    return found

reference.Reference.logps = watched

def rank_of_run(request, rank):
    gc.freeze()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    os.environ.update(request["env"])
    if request["ranks"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= dict.fromkeys(["WORLD_SIZE", "LOCAL_WORLD_SIZE"], str(request["ranks"]))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"])}
    try:
        code = cli.main(["debug", *request["words"]])
    except BaseException as error:
        print(repr(error), flush=True)
        code = 1
    sys.stdout.flush()
    os._exit(code)

for line in sys.stdin:
    request = json.loads(line)
    ranks = []
    for rank in range(request["ranks"]):
        ranks.append(os.fork())
        if not ranks[-1]:
            rank_of_run(request, rank)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    print(json.dumps(codes), flush=True)
"""


class Question(NamedTuple):
    """One call of the reference; fillers left out."""

    pairs: list[tuple[int, int]]  # row number and tokens of its chosen sequence
    in_step: bool  # of training; else of a fill or an evaluation


class Run(NamedTuple):
    """The end of a run, and the questions that it asked the reference."""

    folder: Path
    codes: list[int]
    questions: list[Question]
    log: str

    @property
    def pairs(self) -> Counter[tuple[int, int]]:
        return Counter(pair for question in self.questions for pair in question.pairs)

    @property
    def pairs_in_steps(self) -> list[tuple[int, int]]:
        return [pair for question in self.questions if question.in_step for pair in question.pairs]


@dataclass
class Runner:
    """Starts runs of one settings file, one at a time."""

    process: subprocess.Popen[str]
    settings: Path

    def __call__(self, folder: str, name: str, *words: str, ranks: int = 1, **env: str) -> Run:
        """A run below `folder`, which has a cache of its own.

        A second one of the same name resumes it.
        """
        run_dir = self.settings.parent / folder
        run_dir.mkdir(exist_ok=True)
        attempt = len(list(run_dir.glob("*.log")))
        question_log, log = run_dir / f"asked{attempt}", run_dir / f"{attempt}.log"
        request = {
            "ranks": ranks,
            "words": [str(self.settings), f"run.dir={run_dir}", f"run.name={name}", *words],
            "env": {"ASKED": str(question_log), **env},
            "log": str(log),
            "port": free_port(),
        }
        to, back = self.process.stdin, self.process.stdout
        assert to is not None
        assert back is not None
        to.write(json.dumps(request) + "\n")
        to.flush()
        codes = json.loads(back.readline())
        lines = question_log.read_text().splitlines() if question_log.exists() else []
        values = [json.loads(line) for line in lines]
        questions = [
            Question([(row, tokens) for row, tokens in each["pairs"]], each["in_step"])
            for each in values
        ]
        return Run(run_dir / name, codes, questions, log.read_text())

    def finished(self, folder: str, name: str, *words: str, ranks: int = 1, **env: str) -> Run:
        run = self(folder, name, *words, ranks=ranks, **env)
        assert run.codes == [0] * ranks, run.log
        return run


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    folder = tmp_path_factory.mktemp("refcache")
    settings = write_settings(
        folder,
        training={"max_steps": None, "epochs": 2, "logging_steps": 1},
        checkpoint={"every_steps": 2},
        optimizer={"lr": 3e-3},
    )
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    yield Runner(process, settings)
    process.communicate()  # closes its input, at which it ends


@pytest.fixture(scope="module")
def lazy(runner: Runner) -> Run:
    return runner.finished("lazy", "lazy")


@pytest.fixture(scope="module")
def full(runner: Runner) -> Run:
    return runner.finished("full", "first", "reference.cache=full", ranks=2)


def evaluations(run: Run) -> list[float]:
    return [line["eval_loss"] for line in metric_lines(run.folder) if "eval_loss" in line]


def assert_each_once(pairs: Counter[tuple[int, int]]) -> None:
    assert sum(pairs.values()) == TRAIN + EVAL
    # row 3 of the training pairs and row 3 of the evaluation pairs may by chance be of the same
    # length
    assert Counter(row for row, _ in pairs.elements()) == Counter(
        [*range(1, TRAIN + 1), *range(1, EVAL + 1)]
    )


def test_the_second_epoch_reads_every_reference_log_prob_from_the_cache(lazy: Run) -> None:
    assert len(losses(lazy.folder)) == 2 * TRAIN // 8
    assert_each_once(lazy.pairs)
    assert sorted(row for row, _ in lazy.pairs_in_steps) == list(range(1, TRAIN + 1))


def test_a_cached_answer_gives_the_loss_of_a_fresh_one(runner: Runner, lazy: Run) -> None:
    off = runner.finished("without", "run", "reference.cache='off'")
    assert sum(off.pairs.values()) == 2 * (TRAIN + EVAL)
    assert losses(lazy.folder) == pytest.approx(losses(off.folder), abs=1e-6)
    assert evaluations(lazy) == pytest.approx(evaluations(off), abs=1e-6)
    assert not list((off.folder.parent / ".cache").glob("reference_logps/*/*.logps"))


def test_cache_off_is_valid_yaml_without_quotes(runner: Runner) -> None:
    """YAML reads a bare off as false."""
    assert runner("without", "bare", "reference.cache=off", "training.epochs=0.1").codes == [0]


def test_a_full_cache_runs_the_reference_once_per_pair_before_the_first_step(
    full: Run, lazy: Run
) -> None:
    assert_each_once(full.pairs)
    assert full.pairs_in_steps == []
    assert f"reference cache: {TRAIN} training pairs" in full.log
    assert f"reference cache: {EVAL} evaluation pairs" in full.log
    assert losses(full.folder) == pytest.approx(losses(lazy.folder), abs=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_another_run_with_the_same_reference_and_data_reuses_the_cache(
    runner: Runner, full: Run, ranks: int
) -> None:
    again = runner.finished(
        "full", f"again{ranks}", "reference.cache=full", "optimizer.lr=1e-4", ranks=ranks
    )
    assert again.pairs == Counter()
    assert "reference cache:" not in again.log


def test_a_kill_during_the_fill_loses_only_the_batches_in_progress(runner: Runner) -> None:
    words = ("killed", "killed", "reference.cache=full", "training.epochs=0.5")
    dead = runner(*words, DIES_AT_QUESTION='{"0": 6}')
    assert dead.codes == [-9]
    assert len(dead.questions) == 5
    assert not losses_so_far(dead)
    rerun = runner.finished(*words)
    assert not dead.pairs & rerun.pairs
    assert_each_once(dead.pairs + rerun.pairs)


def test_a_kill_during_the_fill_leaves_no_trace_in_the_weights(runner: Runner) -> None:
    """The rest must be asked in the same micro-batches, or answers differ in the last bit."""
    words = ("reference.cache=full", "batch.micro_batch_size=3", "training.epochs=1", *LARGER)
    whole = runner.finished("unkilled", "run", *words, ranks=2)
    assert (
        runner("killed filling", "run", *words, ranks=2, DIES_AT_QUESTION='{"0": 2}').codes[0] == -9
    )
    resumed = runner.finished("killed filling", "run", *words, ranks=2)
    assert logps_on_disk(resumed) == logps_on_disk(whole)
    assert weights(resumed) == weights(whole)


def logps_on_disk(run: Run) -> dict[bytes, bytes]:
    """The records of its cache, by their keys."""
    [folder] = (run.folder.parent / ".cache" / "reference_logps").iterdir()
    data = b"".join(path.read_bytes() for path in folder.glob("*.logps"))
    records = [data[i : i + RECORD.itemsize] for i in range(0, len(data), RECORD.itemsize)]
    return {record[:16]: record for record in records}


def losses_so_far(run: Run) -> dict[int, float]:
    return losses(run.folder) if (run.folder / "metrics.jsonl").exists() else {}


def test_another_reference_does_not_reuse_cached_log_probs(runner: Runner, lazy: Run) -> None:
    """Nor do log-probs that are summed otherwise."""
    for name, word in (("other", "run.seed=8"), ("desensitised", "dpo.ld_alpha=0.5")):
        assert_each_once(runner.finished("lazy", name, word, "training.epochs=1").pairs)
    actual = (lazy.folder.parent / ".cache" / "reference_logps").glob("*/meta.json")
    metas = [json.loads(meta.read_text()) for meta in actual]
    assert len({meta["reference"]["weights"] for meta in metas}) == 2
    assert sorted(meta.get("ld_alpha", 1.0) for meta in metas) == [0.5, 1.0, 1.0]


def weights(run: Run) -> dict[str, bytes]:
    saved: dict[str, Any] = load_file(run.folder / "model" / "model.safetensors")
    return {name: value.numpy().tobytes() for name, value in saved.items()}


@pytest.fixture(scope="module")
def undisturbed(runner: Runner) -> Run:
    run = runner.finished("undisturbed", "run", *LARGER, ranks=2)
    assert_each_once(run.pairs)
    return run


# In each rank: one question as the ranks settle, two of the evaluation, then two in each step of
# the first epoch. The checkpoint is of step 2; the answers of step 3 are on disk but its update is
# lost.
@pytest.mark.parametrize(("question", "steps", "saved"), [(3, 0, 0), (3 + 2 * 3 + 2, 3, 2)])
def test_killed_and_resumed_the_weights_are_bitwise_the_undisturbed_ones(
    runner: Runner, undisturbed: Run, question: int, steps: int, saved: int
) -> None:
    folder = f"resumed{question}"
    dead = runner(
        folder, "run", *LARGER, ranks=2, DIES_AT_QUESTION=json.dumps({"0": question, "1": question})
    )
    assert dead.codes == [-9, -9], dead.log
    assert max(losses_so_far(dead), default=0) == steps
    resumed = runner.finished(folder, "run", *LARGER, ranks=2)
    assert ("resumed after step 2" in resumed.log) == (saved == 2)
    assert weights(resumed) == weights(undisturbed)
    assert losses(resumed.folder) == losses(undisturbed.folder)
    assert evaluations(resumed) == evaluations(undisturbed)
    # answered in the step under way, in micro-batches of two pairs on two ranks
    again = dead.pairs & resumed.pairs
    assert sum(again.values()) <= 2 * 2
