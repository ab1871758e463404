"""The examples of configs/examples as they stand there, shortened: settings and Python give one
loss curve, under debug and on Ray.
"""

import json
import os
import runpy
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import cli
from support.cluster_nodes import RAY_START_S, wait_until
from support.forkserver import free_port
from support.repository import ROOT
from support.run_files import losses, metric_lines
from support.trl_trainer import need_trl

FOLDER = Path("configs/examples")
STEPS = 6
EXAMPLES = {  # with what only a run with the example's own part says
    "optimizers": "step 1/6: loss 0.6931",
    "shared_layers": ", 0.283 MB of memory",  # a copy has more than 1
    "int8_reference": "; reference int8;",
    "callbacks": "\nStep 1: {'loss': ",
    "metrics": ", guessed_tokens 0",
    "precision": "1 rank on cpu in fp16",
    "collator": "DataCollatorForPreference must truncate 0 of them",
}
OF_ITS_OWN = {"collator": ["data.truncation=keep_end"]}


class Place:
    """Where the examples of one test run: at the root of the repository, on a few of its pairs."""

    def __init__(
        self, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]
    ) -> None:
        self.folder, self.patch, self.capture = folder, patch, capture
        patch.chdir(ROOT)
        self.words = [f"run.dir={folder}", f"training.max_steps={STEPS}", "training.epochs=null"]
        self.words += [
            "batch.global_batch_size=4",
            "batch.micro_batch_size=2",
            "evaluation.every_steps=null",
        ]
        # each run asks its own, and not what its twin has kept
        self.words += ["reference.cache=off"]
        for split, pairs in (("train", 32), ("eval", 4)):
            few = (
                (ROOT / "configs/sample" / f"{split}.jsonl")
                .read_text()
                .splitlines(keepends=True)[:pairs]
            )
            (folder / f"{split}.jsonl").write_text("".join(few))
            self.words.append(f"data.{split}={folder / split}.jsonl")

    def curve(self, example: str, language: str, verb: str) -> dict[int, float]:
        """The losses of a run, by step, once it has said what it has to."""
        name = f"{example}-{language}-{verb}"
        words = [*self.words, *OF_ITS_OWN.get(example, []), f"run.name={name}"]
        self.capture.readouterr()
        if language == "yaml":
            assert (
                cli.main([verb, str(FOLDER / "base.yaml"), str(FOLDER / f"{example}.yaml"), *words])
                == cli.DONE
            )
        else:
            program = str(FOLDER / f"{example}.py")
            self.patch.setattr(
                sys, "argv", [program, *(["--debug"] if verb == "debug" else []), *words]
            )
            runpy.run_path(program, run_name="__main__")
        assert EXAMPLES[example] in self.capture.readouterr().out
        ours = losses(self.folder / name)
        assert len(ours) == STEPS
        return ours


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Place:
    return Place(tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize("example", EXAMPLES)
def test_settings_and_python_give_one_curve(example: str, place: Place) -> None:
    if example == "collator":
        need_trl()
    by_settings, in_python = (
        place.curve(example, language, "debug") for language in ("yaml", "python")
    )
    assert in_python == pytest.approx(by_settings, abs=1e-5)
    if example == "optimizers":
        for language in ("yaml", "python"):
            lines = metric_lines(place.folder / f"optimizers-{language}-debug")
            assert [line["learning_rate"] for line in lines if "loss" in line] == pytest.approx(
                [0.1] * 5 + [0.05]
            )


def test_every_example_is_here() -> None:
    for language in ("yaml", "py"):
        assert {path.stem for path in (ROOT / FOLDER).glob(f"*.{language}")} - {"base"} == set(
            EXAMPLES
        )


@pytest.fixture(scope="module")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray of this machine that stays from run to run."""
    folder = tmp_path_factory.mktemp("ray")
    token, log, port = folder / "token", folder / "log", free_port()
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    words = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
    ]
    words += [
        f"--port={port}",
        "--node-ip-address=127.0.0.1",
        "--include-dashboard=false",
        "--num-cpus=2",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        with open(log, "w") as file:
            head = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )
        try:
            wait_until(
                lambda: "Ray runtime started" in log.read_text() or head.poll() is not None,
                RAY_START_S,
            )
            assert head.poll() is None, log.read_text()
            patch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
            yield os.environ["RAY_ADDRESS"]
        finally:
            head.terminate()
            head.wait()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_on_ray_have_the_curve_of_debug(
    example: str, place: Place, ray_address: str
) -> None:
    if example == "collator":
        need_trl()
    assert ray_address
    here = place.curve(example, "yaml", "debug")
    there = {language: place.curve(example, language, "train") for language in ("yaml", "python")}
    far = {
        language: max(abs(curve[step] - here[step]) for step in here)
        for language, curve in there.items()
    }
    print(json.dumps({example: far}))
    for curve in there.values():
        assert curve == pytest.approx(here, abs=1e-5)
