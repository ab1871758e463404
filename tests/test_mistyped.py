"""A mistake at the command line is answered in one line with what to type instead."""

import sys
from pathlib import Path

import pytest

from orchestrator import cli
from support.tiny_settings import write_settings


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with settings, data, a model and Python code, which is the current one."""
    write_settings(tmp_path)  # run.yaml, train.jsonl, eval.jsonl
    for name, text in {
        "a/rows.jsonl": "{}",
        "model/config.json": "{}",
        "empty/x": "",
        "code.py": "x = 1",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
    (tmp_path / "rows.json").write_text('[{"prompt": "a", "chosen": "b", "rejected": "c"}]')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # main() puts the current folder there


@pytest.mark.parametrize(
    ("typed", "key", "fix"),
    [
        ("tran run.yaml", "VERB = 'tran'", "did you mean train?"),
        ("run.yaml", "VERB = 'run.yaml'", "write orchestrator train run.yaml"),
        ("fly", "VERB = 'fly'", "see orchestrator help"),
        ("--pdb debug run.yaml", "VERB = '--pdb'", "write orchestrator debug --pdb"),
        ("help optimizr", "help = 'optimizr'", "did you mean optimizer?"),
        # files
        ("plan", "FILE = (not set)", "for example orchestrator train configs/quickstart.yaml"),
        ("plan nope.yaml", "settings file = 'nope.yaml'", "its folder contains run.yaml"),
        ("plan runn.yaml", "settings file = 'runn.yaml'", "did you mean run.yaml?"),
        ("plan run", "FILE = 'run'", "did you mean run.yaml?"),
        (
            "plan train.jsonl",
            "FILE = 'train.jsonl'",
            "use a YAML file, followed by data.train=train.jsonl",
        ),
        (
            "plan none.parquet",
            "FILE = 'none.parquet'",
            "use a YAML file, followed by data.train=none.parquet",
        ),
        (
            "plan rows.json",
            "FILE = 'rows.json'",
            "use a YAML file, followed by data.train=rows.json",
        ),
        (
            "plan zero2.json",
            "FILE = 'zero2.json'",
            "set engine.kind=deepspeed engine.deepspeed_config=zero2.json",
        ),
        ("plan code.py", "FILE = 'code.py'", "use a YAML file"),
        ("plan a", "FILE = 'a'", "use a YAML file, followed by data.train=a"),
        ("plan model", "FILE = 'model'", "set model.path=model in a YAML file"),
        ("plan empty", "FILE = 'empty'", "use a YAML file or a run directory"),
        ("plan .", "FILE = '.'", "use a YAML file, followed by data.train=."),
        # overrides
        (
            "plan run.yaml optimizer.lr",
            "override = 'optimizer.lr'",
            "for example optimizer.lr=VALUE",
        ),
        ("plan run.yaml dpo.beta = 4", "override = 'dpo.beta = 4'", "write dpo.beta=4"),
        ("plan run.yaml dpo.beta =4", "override = 'dpo.beta =4'", "write dpo.beta=4"),
        ("plan run.yaml dpo.beta= 4", "override = 'dpo.beta= 4'", "write dpo.beta=4"),
        # flags
        (
            "train run.yaml --lr 1e-5",
            "--lr = '1e-5'",
            "write optimizer.lr=1e-5: settings have no dashes",
        ),
        (
            "train --lr=1e-5 run.yaml",
            "--lr = '1e-5'",
            "write optimizer.lr=1e-5: settings have no dashes",
        ),
        (
            "train run.yaml --dpo.beta=4",
            "--dpo.beta = '4'",
            "write dpo.beta=4: settings have no dashes",
        ),
        (
            "train run.yaml --learning-rate 1",
            "--learning-rate = '1'",
            "write optimizer.lr=1: settings have no dashes",
        ),
        (
            "train run.yaml --max-steps=4",
            "--max-steps = '4'",
            "write training.max_steps=4: settings have no dashes",
        ),
        (
            "train run.yaml --nproc 2",
            "--nproc = '2'",
            "write cluster.num_workers=2: settings have no dashes; --nproc",
        ),
        ("train run.yaml --pdb", "--pdb = (not set)", "--pdb is a flag of debug"),
        (
            "train run.yaml --gradient_accumulation_steps 4",
            "--gradient",
            "did you mean batch.global_batch_size (acc",
        ),
        ("plan run.yaml --show-rws 3", "--show-rws = '3'", "did you mean --show-rows?"),
        ("plan run.yaml --foo", "--foo = (not set)", "settings have no dashes, for example"),
        ("submit run.yaml", "--to = (not set)", "write --to ray or --to slurm"),
        ("verify a b", "verify = 'b'", "see orchestrator help verify"),
        ("debug --replay-step 3", "FILE = (not set)", "for example orchestrator"),
    ],
)
def test_a_mistake_is_answered_with_what_to_type(
    capsys: pytest.CaptureFixture[str], typed: str, key: str, fix: str
) -> None:
    assert cli.main(typed.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {key}")
    assert fix in line.partition("; ")[2]


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("deep.yaml", "a: " + "[" * 3000 + "]" * 3000, "is nested too deeply"),
        ("deep.json", '{"a":' * 3000 + "1" + "}" * 3000, "is nested too deeply"),
        ("number.yaml", "run: {seed: " + "9" * 5000 + "}", "is not YAML"),
        ("loop.yaml", "a: &x [*x]", "is not YAML"),
        ("broken.yaml", "run: {name: '${'}", "is not YAML"),
        ("set.yaml", "a: !!set {x, y}", "is not YAML"),
    ],
)
def test_a_file_that_breaks_its_reader_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, rule: str
) -> None:
    (tmp_path / name).write_text(text)
    assert cli.main(["plan", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: settings file = '{name}': {rule}")


@pytest.mark.parametrize(
    "override", ["a=" + "[" * 3000, "a" + ".a" * 3000 + "=1", "a=" + "9" * 5000, "a=\udc80"]
)
def test_an_override_that_breaks_its_reader_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], override: str
) -> None:
    assert cli.main(["plan", "run.yaml", override]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: override = ")
