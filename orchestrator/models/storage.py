"""List what a model stores (each parameter once, persistent buffers), and write files of
tensors.
"""

from pathlib import Path

import torch
from torch import nn


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that belong to a model's state, by name: the bias of a router, the scale
    of a layer.
    """
    return {
        f"{prefix}.{name}".removeprefix("."): buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def stored_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every tensor that determines what a model computes, by name: tied parameters once."""
    return dict(model.named_parameters()) | persistent_buffers(model)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file with the permissions of the umask.

    safetensors itself writes a temporary file of mode 0600 and renames it.
    """
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode  # that of a new file: the umask cannot be read without setting it
    save_file(tensors, path)
    path.chmod(mode)
