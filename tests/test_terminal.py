"""Output reaches terminals that are not UTF-8, and ends quietly where its reader has gone."""

import codecs
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import terminal
from orchestrator.run import rows
from support.command_line import orchestrator
from support.tiny_settings import write_settings


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_symbol_has_something_to_stand_for_it(encoding: str) -> None:
    codecs.register_error(terminal.PLAIN_SYMBOLS, terminal.plain_symbols)
    out = io.BytesIO()
    with io.TextIOWrapper(out, encoding, terminal.PLAIN_SYMBOLS, write_through=True) as stream:
        stream.write(f"{rows.LEGEND} {rows.BARS} \u00e9 \u4e2d \udc80")
        text = out.getvalue().decode(encoding)
    plain = "[[ ]] enclose the scored tokens"
    assert (plain in text) is (encoding != "utf-8")
    assert ("12345678" in text) is (encoding != "utf-8")
    assert ("\\u4e2d" in text) is (encoding != "utf-8")
    assert "\\udc80" in text  # which is not Unicode


@pytest.mark.parametrize("keeps_going", [True, False])
def test_a_reader_that_has_gone_ends_the_output_alone_or_the_process(
    capfd: pytest.CaptureFixture[str], keeps_going: bool
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = io.TextIOWrapper(
        io.BufferedWriter(terminal._Output(writer, keeps_going)), line_buffering=True
    )
    if keeps_going:
        print("no one reads this", file=stream)
    else:
        with pytest.raises(SystemExit) as ended:
            print("no one reads this", file=stream)
        assert ended.value.code == 141
    print("nor this", file=stream)  # goes nowhere
    stream.close()
    os.close(writer)


def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator", "help", "settings"],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.decode() == "error: [Errno 28] No space left on device\n"


@pytest.mark.slow
@pytest.mark.parametrize("stderr", [subprocess.PIPE, subprocess.STDOUT])
def test_a_run_whose_stdout_is_closed_finishes(tmp_path: Path, stderr: int) -> None:
    command = [sys.executable, "-m", "orchestrator", "debug", str(write_settings(tmp_path))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr) as run:
        assert run.stdout is not None
        run.stdout.close()
        if run.stderr is not None:
            assert b"stdout was closed; the run continues" in run.stderr.read()
    assert run.returncode == 0
    assert (tmp_path / "runs" / "tiny" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_every_verb_prints_on_a_terminal_that_knows_ascii_only(tmp_path: Path) -> None:
    settings, plain = write_settings(tmp_path), {"PYTHONIOENCODING": "ascii", "LC_ALL": "POSIX"}
    run_dir = tmp_path / "runs" / "tiny"
    for words in (
        ["plan", settings, "--show-rows", "2"],
        ["debug", settings],
        ["debug", run_dir],
        ["debug", run_dir, "--replay-step", "2"],
        ["pairs", run_dir],
        ["verify", run_dir],
        ["export", run_dir, tmp_path / "out"],
        ["stop", run_dir],
    ):
        done = orchestrator(*words, env=plain)
        assert done.returncode == 0, done.stderr
        assert (done.stdout + done.stderr).isascii()
