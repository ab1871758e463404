"""The table of architectures: python tests/architectures/sweep.py [MODEL_TYPE...] > table.md"""

import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import deepspeed  # noqa: E402, F401 - transformers imports it to save a model: once, not in every process
import torch  # noqa: E402
import transformers  # noqa: E402
from checked import Row, checked  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

SECONDS = 90


def _work(model_type: str, sender: object) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        try:
            row = checked(model_type, Path(folder))
        except Exception as error:
            ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/orchestrator/" in frame.filename]
            at = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
            row = Row(model_type, crash=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{at}")
    sender.send(asdict(row))


def swept(model_type: str) -> Row:
    """In a process of its own, so that one that hangs or dies is a line of the table."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_work, args=(model_type, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(SECONDS):
            return Row(**receiver.recv())
        return Row(model_type, crash=f"not done after {SECONDS} s")
    except EOFError:
        return Row(model_type, crash="the process died")
    finally:
        process.kill()
        process.join()


if __name__ == "__main__":
    with open(os.environ.get("SWEEP_OUT", os.devnull), "a") as out:
        for name in sys.argv[1:] or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            row = swept(name)
            out.write(json.dumps({"right": row.is_right, **asdict(row)}) + "\n")
            out.flush()
