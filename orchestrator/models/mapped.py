"""Load weights as memory-mapped files, shared by the ranks of a node, until an engine shards them.

The kernel holds the pages of a mapped file once for all processes, and drops them when memory is
short.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from orchestrator.models.adapters import base_name
from orchestrator.models.dtypes import SAFETENSORS_DTYPES
from orchestrator.models.storage import save_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_mapped(
    path: str, config: Any, dtype: torch.dtype, **options: Any
) -> "tuple[PreTrainedModel, dict[str, Any]]":
    """Call from_pretrained(path, dtype=dtype, **options), but keep the parameters in the dtype of
    their files, mapped.

    The engine casts a parameter to `dtype` when it shards it, with the same result as
    from_pretrained's. Buffers and config have `dtype` already. transformers maps a safetensors
    tensor that it neither casts nor converts. All others become a private copy, as without mapping:
    .bin files, quantised checkpoints, experts that it merges, and in files of several dtypes all
    tensors but those of the widest. options must include output_loading_info=True.
    """
    from transformers import AutoModelForCausalLM

    held = _type_of_files(path, config) or dtype
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=held, **options)
    model, info = loaded
    if held != dtype:
        _leave_only_parameters(model, dtype)
    return model, info


def save_mapped(model: "PreTrainedModel", folder: Path) -> None:
    """Write weights for `load_saved`, with the names and shapes of the model, tied ones once."""
    state = model.state_dict()
    weights = {name: state[name].contiguous() for name in state if name not in _tied(model)}
    save_tensors(weights, folder / "model.safetensors")


def load_saved(folder: Path, config: Any, dtype: torch.dtype) -> "PreTrainedModel":
    """Build AutoModelForCausalLM.from_config(config, dtype=dtype) with the weights written by
    `save_mapped`, mapped.
    """
    from safetensors.torch import load_file

    model = _without_weights(config, dtype)
    weights = load_file(folder / "model.safetensors")
    weights |= {name: weights[source] for name, source in _tied(model).items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model


def mapped_twin(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return a frozen copy whose parameters share memory with the model's; tied ones stay tied,
    buffers are copied.

    An engine shards the copy together with the model: neither may be changed in place before both
    are sharded.
    """
    same: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    return copy.deepcopy(model, same)  # deepcopy does not copy objects in its memo


def types_when_cut(model: "PreTrainedModel", dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype that each parameter is cast to when it is sharded, by its name in this model
    and in its base without adapters.

    Buffers are left out: they have their final dtype. If model.lora.base sets the dtype, no weight
    is cast, and the result does not apply.
    """
    names = [
        name for name, p in model.named_parameters(remove_duplicate=False) if p.is_floating_point()
    ]
    return dict.fromkeys([*names, *map(base_name, names)], dtype)


@contextmanager
def weights_aside(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Replace the weights by empty ones of `dtype` within the context: peft creates a new adapter
    in the dtype of its base, and would round the initial weights to the dtype of the files.
    """
    held = [(parameter, parameter.data) for parameter in model.parameters()]
    for parameter, data in held:
        parameter.data = torch.zeros((), dtype=dtype, device=data.device).expand(data.shape)
    try:
        yield
    finally:
        for parameter, data in held:
            parameter.data = data


def _type_of_files(path: str, config: Any) -> torch.dtype | None:
    """Return the dtype that represents every weight in a model's safetensors files exactly; None if
    there are none, or if transformers does more than read them.
    """
    from safetensors import safe_open

    if getattr(config, "quantization_config", None) or getattr(
        config, "transformers_weights", None
    ):
        return None
    dtypes: set[str] = set()
    for file in _safetensors_files(path):
        with safe_open(file, framework="pt") as tensors:
            # inv_freq is of old releases and ignored
            names = [name for name in iter(tensors.keys()) if not name.endswith("inv_freq")]
            dtypes |= {tensors.get_slice(name).get_dtype() for name in names}
    floats = {name for name in dtypes if name != "BOOL" and name[0] not in "IU"}
    if not floats or not floats <= SAFETENSORS_DTYPES.keys():
        return None
    return reduce(torch.promote_types, [SAFETENSORS_DTYPES[name] for name in floats])


def _safetensors_files(path: str) -> list[str]:
    """Return the safetensors files that from_pretrained would read, in a folder or from the hub;
    empty if it would read other files.
    """
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    def cached(name: str) -> str | None:
        try:
            return cached_file(path, name)
        except OSError:  # missing or unreachable, which from_pretrained reports better
            return None

    if cached("adapter_config.json"):  # from_pretrained would load the base named in it
        return []
    if whole := cached("model.safetensors"):
        return [whole]
    index = cached("model.safetensors.index.json")
    return (get_checkpoint_shard_files(path, index)[0] or []) if index else []


def _leave_only_parameters(model: "PreTrainedModel", dtype: torch.dtype) -> None:
    """Give a model that was loaded in another dtype the buffers and the config that it has in
    `dtype`: a constant like Gemma's embed_scale is rounded to the dtype in which a model is
    created.
    """
    meant = _without_weights(copy.deepcopy(model.config), dtype)
    saved = model.state_dict().keys()
    for name, buffer in meant.named_buffers():
        owner, _, leaf = name.rpartition(".")
        loaded = model.get_buffer(name)
        setattr(
            model.get_submodule(owner), leaf, loaded.to(buffer.dtype) if name in saved else buffer
        )
    model.config.dtype = dtype
    for part in model.config.sub_configs:
        if (inner := getattr(model.config, part)) is not None:
            inner.dtype = dtype


def _without_weights(config: Any, dtype: torch.dtype) -> Any:
    """Return a model whose parameters are on the meta device, but with real buffers."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _tied(model: "PreTrainedModel") -> dict[str, str]:
    """Return the tied weights by name: head -> embeddings."""
    return model.all_tied_weights_keys
