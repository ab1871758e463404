"""Put the packed kernels behind transformers' attention interface, and decide where they are exact.

Legend: T tokens of the packed row, N positions that score a token.

The layout is passed as a forward keyword to every attention layer, so that gradient checkpointing,
which calls a layer again in another thread, passes the same layout again.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from orchestrator.data.collate import Segments
from orchestrator.models.kernels import KERNELS
from orchestrator.models.layers import decoder_layers
from orchestrator.models.rope import fixed_up_to
from orchestrator.settings.errors import UserError
from orchestrator.settings.model import AttentionName
from orchestrator.settings.precision import PRECISION_TRAITS, Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYOUT = "pair_segments"
"""The forward keyword that passes Segments."""

# Architectures for which tests/models/test_attention.py compares packed with padded log-probs.
CHECKED = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gpt2")

# In the last layer, the hidden state of a token that scores nothing (most of the prompt) is not
# used: only its key and value are. These modules of that layer, by architecture, process each token
# on its own and skip such tokens.
ATTENTION = {**dict.fromkeys(CHECKED, "self_attn"), "gpt2": "attn"}
SKIPPING = {
    **dict.fromkeys(CHECKED, ("self_attn.q_proj", "self_attn.o_proj", "mlp")),
    "gpt2": ("attn.c_proj", "mlp"),  # its query, key and value are one projection
}


def choose_kernel(name: AttentionName, device: torch.device, precision: Precision) -> AttentionName:
    """Return the kernel for packed rows.

    Raises:
        UserError: the kernel in the settings does not run on this device with this precision.
    """
    flash_types = PRECISION_TRAITS[precision].is_16_bit
    best: AttentionName = "cpu" if device.type == "cpu" else "sdpa"
    if device.type == "cuda" and flash_types and torch.cuda.get_device_capability(device)[0] >= 8:
        best = "varlen"
    if name == "auto":
        return best
    if name in ("cpu", "varlen") and name != best:
        needs = "a CPU" if name == "cpu" else "a GPU from Ampere on and precision bf16 or fp16"
        raise UserError("model.attention", name, f"needs {needs}", f"use {best} or auto")
    return name


def not_exact(config: Any, longest: int) -> str | None:
    """Return why packed rows would change this model's log-probs; None if they do not."""
    text = config.get_text_config()
    window = (
        getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    )
    if text.model_type not in CHECKED:
        return (
            f"{text.model_type} is not among the architectures checked for it "
            f"({', '.join(CHECKED)})"
        )
    if window is not None and longest > window:
        return f"its sliding window has {window} tokens and the longest sequence {longest}"
    if (fixed := fixed_up_to(config)) is not None and longest > fixed:
        return (
            f"its rotary embedding depends on a sequence's length beyond {fixed} tokens, and a "
            "pair has two lengths"
        )
    if getattr(text, "use_bidirectional_attention", None):
        return "its attention is bidirectional"
    if any(
        value for name, value in vars(text).items() if name in ("attention_dropout", "attn_pdrop")
    ):
        return "it has dropout in its attention (model.disable_dropout=true removes it)"
    return None


def use_packed_attention(model: "PreTrainedModel", kernel: AttentionName) -> None:
    """Use packed attention for batches with segments; any other forward pass (generate) keeps
    torch's SDPA.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        segments = options.pop(LAYOUT, None)
        if segments is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, **options
            )
        # rotary embeddings return query and key in fp32
        if torch.is_autocast_enabled(query.device.type):
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        return KERNELS[kernel](
            query, key, value, segments, scaling, hasattr(module, "skips_unscored")
        ), None

    name = f"packed_pairs_{kernel}"  # with "flash" in it transformers would look for that package
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)
    _skip_unscored(model)


def packed_arguments(segments: Segments, input_ids: torch.Tensor) -> dict[str, Any]:
    """Return the keyword arguments of a model's forward for a packed row. transformers uses a mask
    of four dimensions as it is, and so builds none.
    """
    return {LAYOUT: segments, "attention_mask": input_ids.new_empty(1, 1, 0, 0)}


def _skip_unscored(model: "PreTrainedModel") -> None:
    """Make the last layer skip tokens whose hidden state is not used."""
    layers = decoder_layers(model)
    kind = model.config.get_text_config().model_type
    attention = layers[-1].get_submodule(ATTENTION[kind])
    if hasattr(attention, "skips_unscored"):
        return  # a second kernel for the same model: two sets of hooks would skip twice
    skipping = _Skipping()
    attention.skips_unscored = True  # pyright: ignore[reportArgumentType]
    attention.register_forward_pre_hook(skipping.begin, with_kwargs=True)
    for name in SKIPPING[kind]:
        layers[-1].get_submodule(name).register_forward_pre_hook(skipping.pick)
        layers[-1].get_submodule(name).register_forward_hook(skipping.put_back)


class _Skipping:
    """Hooks of one layer. Its attention runs first and receives the layout as a keyword, also when
    recomputed.
    """

    def __init__(self) -> None:
        self.scoring: torch.Tensor | None = None  # [N] of the current forward pass
        self.tokens = 0

    def begin(self, _: nn.Module, __: Any, options: dict[str, Any]) -> None:
        segments = options.get(LAYOUT)
        self.scoring = None if segments is None else segments.scoring

    def pick(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Select the scoring tokens: [1, T, features] -> [1, N, features]."""
        if self.scoring is None:
            return inputs
        self.tokens = inputs[0].shape[1]
        return (inputs[0].index_select(1, self.scoring),)

    def put_back(self, _: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        """Scatter the output back: [1, N, features] -> [1, T, features], with zeros, finite and
        unused, elsewhere.
        """
        if self.scoring is None:
            return output
        whole = output.new_zeros(1, self.tokens, output.shape[-1])
        return whole.index_copy(1, self.scoring, output)
