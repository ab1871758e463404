"""Weights that stay memory-mapped files, shared by the ranks of a node, until an engine cuts each one into shards.

Pages of a mapped file are the kernel's: it holds them once for all processes, and drops them where memory is short.
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
from orchestrator.models.storage import save_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as in the files


def load_mapped(path: str, config: Any, dtype: torch.dtype, **options: Any) -> "tuple[PreTrainedModel, dict[str, Any]]":
    """from_pretrained(path, dtype=dtype, **options), but the parameters keep the type of their files and so remain
    mapped ones.

    Whoever cuts a parameter into shards casts it to `dtype`, which gives what from_pretrained would have given; the
    buffers and the config are those of `dtype` already. transformers maps a tensor of safetensors that it neither casts
    nor converts; the others (.bin files, quantised checkpoints, experts that it merges, in files of several types all
    but those of the widest) become a private copy, as without mapping. options: with output_loading_info=True.
    """
    from transformers import AutoModelForCausalLM

    held = _type_of_files(path, config) or dtype
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=held, **options)
    model, info = loaded
    if held != dtype:
        _leave_only_parameters(model, dtype)
    return model, info


def save_made(model: "PreTrainedModel", folder: Path) -> None:
    """Write weights for `load_made`: as named and shaped in the model, tied ones once."""
    state = model.state_dict()
    weights = {name: state[name].contiguous() for name in state if name not in _tied(model)}
    save_tensors(weights, folder / "model.safetensors")


def load_made(folder: Path, config: Any, dtype: torch.dtype) -> "PreTrainedModel":
    """AutoModelForCausalLM.from_config(config, dtype=dtype) with the weights that `save_made` wrote, mapped."""
    from safetensors.torch import load_file

    model = _without_weights(config, dtype)
    found = load_file(folder / "model.safetensors")
    found |= {name: found[source] for name, source in _tied(model).items()}
    model.load_state_dict(found, assign=True)
    model.tie_weights()
    return model


def mapped_twin(model: "PreTrainedModel") -> "PreTrainedModel":
    """A frozen copy with parameters of its own that lie in the same memory, tied ones tied; the buffers are copied.

    For a copy that an engine is to shard with the model: neither may be changed in place before both have been cut.
    """
    same: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, same)  # deepcopy takes what stands there for copied already


def types_when_cut(model: "PreTrainedModel", dtype: torch.dtype) -> dict[str, torch.dtype]:
    """`dtype` for each parameter of floating point, by its name in this model and in its base without adapters; not for
    buffers, which are what they will be already. Of a base whose type model.lora.base names, nothing is to be cast."""
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p.is_floating_point()]
    return dict.fromkeys([*names, *map(base_name, names)], dtype)


@contextmanager
def weights_aside(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Meanwhile the weights seem to be of `dtype` and take no memory: peft gives a new adapter the type of its base,
    and would round what it draws to the type of a file."""
    held = [(parameter, parameter.data) for parameter in model.parameters()]
    for parameter, data in held:
        parameter.data = torch.zeros((), dtype=dtype, device=data.device).expand(data.shape)
    try:
        yield
    finally:
        for parameter, data in held:
            parameter.data = data


def _type_of_files(path: str, config: Any) -> torch.dtype | None:
    """The type that holds every weight in a model's safetensors files as it is; None where there are none, or where
    transformers does more than read them."""
    from safetensors import safe_open

    if getattr(config, "quantization_config", None) or getattr(config, "transformers_weights", None):
        return None
    found: set[str] = set()
    for file in _safetensors_files(path):
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in tensors.keys() if not name.endswith("inv_freq")]  # noqa: SIM118 - no dict
            found |= {tensors.get_slice(name).get_dtype() for name in names}  # inv_freq: of old, and ignored
    floats = {name for name in found if name != "BOOL" and name[0] not in "IU"}
    if not floats or not floats <= FLOATS.keys():
        return None
    return reduce(torch.promote_types, [FLOATS[name] for name in floats])


def _safetensors_files(path: str) -> list[str]:
    """The files that from_pretrained would read, in a folder or from the hub; none where they are of another kind."""
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    def found(name: str) -> str | None:
        try:
            return cached_file(path, name)
        except OSError:  # not there, or not to be reached, which from_pretrained says better
            return None

    if found("adapter_config.json"):  # from_pretrained goes to the base that it names
        return []
    if whole := found("model.safetensors"):
        return [whole]
    index = found("model.safetensors.index.json")
    return (get_checkpoint_shard_files(path, index)[0] or []) if index else []


def _leave_only_parameters(model: "PreTrainedModel", dtype: torch.dtype) -> None:
    """Give a model that was loaded in another type the buffers and the config that it has in `dtype`: a constant like
    Gemma's embed_scale is rounded to the type in which a model is made."""
    meant = _without_weights(copy.deepcopy(model.config), dtype)
    saved = model.state_dict().keys()
    for name, buffer in meant.named_buffers():
        owner, _, leaf = name.rpartition(".")
        loaded = model.get_buffer(name)
        setattr(model.get_submodule(owner), leaf, loaded.to(buffer.dtype) if name in saved else buffer)
    model.config.dtype = dtype
    for part in model.config.sub_configs:
        if (inner := getattr(model.config, part)) is not None:
            inner.dtype = dtype


def _without_weights(config: Any, dtype: torch.dtype) -> Any:
    """A model whose parameters are on the meta device, and its buffers real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _tied(model: "PreTrainedModel") -> dict[str, str]:
    """The weights that are one with another, by name: head -> embeddings."""
    return model.all_tied_weights_keys
