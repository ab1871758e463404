"""Print the table of architectures, each in its own process.

Usage: python tests/support/architecture_sweep.py [MODEL_TYPE...]
"""

import multiprocessing
import os
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from support.architecture_check import Row, checked

SECONDS = 240


def swept(model_type: str) -> Row:
    """Check a type in a process of its own, so that one that hangs or dies is a line of the
    table.
    """
    with suppress(ImportError):
        # transformers imports it to save a model: once, not in every process
        import deepspeed  # noqa: F401
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_work, args=(model_type, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(SECONDS):
            return receiver.recv()
        return Row(model_type, crash=f"not done after {SECONDS} s")
    except EOFError:
        return Row(model_type, crash="the process died")
    finally:
        process.kill()
        process.join()


def _work(model_type: str, sender: Any) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        try:
            row = checked(model_type, Path(folder))
        except Exception as error:
            ours = [
                frame
                for frame in traceback.extract_tb(error.__traceback__)
                if "/orchestrator/" in frame.filename
            ]
            at = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
            row = Row(
                model_type,
                crash=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{at}",
            )
    sender.send(row)


if __name__ == "__main__":
    print(Row.HEADER, flush=True)
    for name in sys.argv[1:] or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        print(swept(name).line, flush=True)
