"""The block model: the policy, its source and which of its weights train."""

from typing import Any, Literal, get_args

from pydantic import Field

from orchestrator.settings.base import FREE, Block, Positive
from orchestrator.settings.errors import UserError
from orchestrator.settings.precision import PRECISION_TRAITS, Precision

Dtype = Literal["fp32", "bf16", "fp16"]
Quantized = Literal["int8", "nf4"]
AttentionName = Literal["auto", "cpu", "varlen", "sdpa", "padded"]


class InitSpec(Block):
    """A small model with random weights and its tokenizer, for quickstarts and tests: nothing is
    downloaded.
    """

    model_type: str = "qwen2"
    """Architecture, a `model_type` of transformers."""
    config: dict[str, Any] = {}
    """Keyword arguments of that architecture's config (hidden_size, num_hidden_layers, ...)."""
    vocab_size: Positive = 1024
    """Vocabulary size of the byte-level BPE tokenizer, which is trained on data.train.

    At least 260.
    """


class LoraSpec(Block):
    """A low-rank adapter on a frozen base. Hu et al. 2021, arXiv 2106.09685."""

    r: Positive | None = None
    """Rank of the two factors; 16 when not set."""
    alpha: float | None = Field(None, gt=0)
    """Numerator of the adapter's weight, alpha / r; twice r when not set."""
    target_modules: list[str] | None = None
    """Names of the linear layers to adapt (q_proj, v_proj, ...); all except the head when not set.
    """
    adapter_path: str | None = None
    """Folder or hub name of an adapter to continue training, with its rank, alpha and layers; the
    reference is then the model with this adapter as it was at the start.
    """
    base: Literal[Dtype, Quantized] | None = None
    """Type of the frozen base's weights: fp32, bf16, fp16 (it also computes in this type, unless
    precision is a 16-bit type), or int8, nf4 of bitsandbytes (QLoRA: Dettmers et al. 2023, arXiv
    2305.14314); fp32 when not set.
    """

    @property
    def quantized_base(self) -> Quantized | None:
        """Return the type of a base in 8 or 4 bits, or None."""
        return next((kind for kind in get_args(Quantized) if kind == self.base), None)

    @property
    def cast_base(self) -> Dtype | None:
        """Return the type to which the base is cast, or None."""
        return next((dtype for dtype in get_args(Dtype) if dtype == self.base), None)

    def check(self) -> None:
        """Check that an adapter to continue determines its own shape."""
        names = ("r", "alpha", "target_modules")
        own = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.adapter_path and own:
            rule = "the adapter at model.lora.adapter_path already determines these"
            raise UserError("model.lora", own, rule, "remove them, or model.lora.adapter_path")


class ModelSpec(Block):
    """The policy: source of its weights and tokenizer, and which weights train."""

    path: str | None = None
    """Folder or hub name of a causal LM of transformers."""
    init: InitSpec | None = None
    """Instead of a path: a config, with random weights from run.seed."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; the model's own when not set."""
    pad_token: str | None = None
    """Padding token, from the tokenizer's vocabulary; needed only when the tokenizer has none."""
    disable_dropout: bool = True
    """Set all dropout of policy and reference to 0, as in TRL."""
    attention: AttentionName = Field("auto", json_schema_extra=FREE)
    """Layout of a pair and its attention kernel. Packed (the prompt computed once, no padding):
    cpu, varlen (GPUs from Ampere on), sdpa (any device, slower); auto selects the one for the
    device. padded: two padded rows per pair, as in TRL; auto selects it, and prints why, for a
    model whose packed log-probs would not be exact.
    """
    num_frozen_layers: Positive | None = None
    """Number of lowest layers that are frozen, together with the embeddings."""
    tied_head: Literal["untie", "freeze"] = "untie"
    """What to do with an output head tied to the embeddings when these are frozen
    (num_frozen_layers, reference.num_shared_layers): untie: its own, trainable weights; freeze: it
    stays tied and frozen.
    """
    lora: LoraSpec | None = None
    """Train an adapter instead of the weights; needs the extra `peft`."""

    def check(self) -> None:
        """Check that the model has one source, and one way to freeze its layers."""
        if self.path and self.init:
            rule = "model.init is also set"
            raise UserError("model.path", self.path, rule, "remove one of the two")
        if not (self.path or self.init):
            cure = "set it to a folder or hub name of a causal LM, or set model.init"
            rule = "either this or model.init is required"
            raise UserError("model.path", self.path, rule, cure)
        if self.init and self.init.vocab_size < 260:
            rule = "a byte-level tokenizer has 256 bytes and 4 special tokens"
            key, size = "model.init.vocab_size", self.init.vocab_size
            raise UserError(key, size, rule, "set it to 260 or more")
        if self.lora and self.num_frozen_layers:
            rule = "model.lora already freezes every layer of the base"
            key, count = "model.num_frozen_layers", self.num_frozen_layers
            raise UserError(key, count, rule, "remove one of the two")
        if self.lora:
            self.lora.check()

    def check_precision(self, precision: Precision) -> None:
        """Check that the base of an adapter is not rounded for a more exact precision.

        Raises:
            UserError: it is.
        """
        base = self.lora.base if self.lora else None
        if base is not None and PRECISION_TRAITS[precision].weights == "fp64":
            rule = "precision fp64 would compute with weights rounded to this type"
            raise UserError("model.lora.base", base, rule, "remove it, or set precision=fp32")

    def check_attention(self, precision: Precision) -> None:
        """Check that the attention kernel supports the precision.

        Raises:
            UserError: it does not.
        """
        is_16_bit = precision == "auto" or PRECISION_TRAITS[precision].is_16_bit
        if self.attention == "varlen" and not is_16_bit:
            rule = f"needs a GPU from Ampere on and precision bf16 or fp16, not {precision}"
            cure = "set precision=bf16, or model.attention=auto"
            raise UserError("model.attention", self.attention, rule, cure)
