"""Save, restore and seed the random state of this process."""

import json
import random

import numpy as np
import torch

RngState = dict[str, torch.Tensor]


def seed_everything(seed: int) -> None:
    """Seed torch (CPU and GPU), numpy and Python."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> RngState:
    """Return the random state of this process: torch (CPU and GPU), numpy, Python."""
    name, words, position, *gauss = np.random.get_state()
    assert name == "MT19937", "numpy's global generator is always this one"
    assert not isinstance(words, str)
    python = json.dumps(random.getstate()).encode()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.append(words.astype(np.int64), position)),
        "numpy_gauss": torch.tensor(gauss, dtype=torch.float64),
        "python": torch.frombuffer(bytearray(python), dtype=torch.uint8),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: RngState, device: torch.device) -> None:
    """Restore a result of `rng_state`."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    words = state["numpy"].numpy().astype(np.uint32)
    has_gauss, cached = state["numpy_gauss"].tolist()  # randn draws two numbers and caches one
    np.random.set_state(("MT19937", words[:-1], int(words[-1]), int(has_gauss), cached))
    version, python, gauss = json.loads(state["python"].numpy().tobytes())
    random.setstate((version, tuple(python), gauss))
