"""The block reference: the kinds of reference model, the facts about each, and their rules."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from orchestrator.settings.base import FREE, Block, Positive
from orchestrator.settings.engine import EngineSpec
from orchestrator.settings.errors import UserError
from orchestrator.settings.model import Dtype, ModelSpec
from orchestrator.settings.precision import PRECISION_TRAITS, Precision

ReferenceKind = Literal["copy", "shared_layers", "int8", "nf4", "adapter_off", "precomputed"]
CacheMode = Literal["off", "lazy", "full"]


@dataclass(frozen=True)
class ReferenceTraits:
    """Facts about a kind of reference that decide which settings it uses and how it is built."""

    is_copy: bool = False
    """Holds a whole model in a floating-point type: it can be cast and kept in host memory."""
    is_quantized: bool = False
    """Holds its weights in 8 or 4 bits."""
    shares_layers: bool = False
    """Freezes the policy's lowest layers, and shares them."""
    runs_policy: bool = False
    """Runs layers of the policy, whose dropout would act on it."""
    is_precomputed: bool = False
    """Computes all log-probs before the first step, and is then dropped."""
    can_be_sharded: bool = False
    """Has weights of the policy's type, which an engine can shard with the policy's."""


REFERENCE_TRAITS: dict[ReferenceKind, ReferenceTraits] = {
    "copy": ReferenceTraits(is_copy=True, can_be_sharded=True),
    "shared_layers": ReferenceTraits(shares_layers=True, runs_policy=True, can_be_sharded=True),
    "int8": ReferenceTraits(is_quantized=True),
    "nf4": ReferenceTraits(is_quantized=True),
    "adapter_off": ReferenceTraits(runs_policy=True),
    "precomputed": ReferenceTraits(is_precomputed=True),
}


class ReferenceSpec(Block):
    """The frozen reference model; each rank holds its own copy unless it is sharded."""

    kind: ReferenceKind = "copy"
    """copy: a frozen copy of the initial policy, or of another model. shared_layers: the policy's
    lowest layers are frozen, and stored and computed once for both. int8, nf4: a copy quantised by
    bitsandbytes, whose error is measured at the start. adapter_off: the policy without its LoRA
    adapter, or with the one it started from. precomputed: all log-probs are computed before the
    first step, by the initial policy or by the model at path, and no reference stays in memory.
    """
    path: str | None = None
    """Folder or hub name of the reference; the initial policy when not set."""
    num_shared_layers: Positive | None = None
    """Layers of kind shared_layers, counted from the embeddings, which are also shared."""
    dtype: Dtype | None = None
    """Type of a copy's weights; the policy's when not set."""
    sharded: bool = Field(False, json_schema_extra=FREE)
    """Shard the weights of a copy, or the reference's own layers of kind shared_layers, with the
    policy's, if the engine shards weights (deepspeed at stage 3, fsdp); otherwise each rank holds
    them whole.
    """
    offload: bool = Field(False, json_schema_extra=FREE)
    """Keep a copy's weights in host memory, and move each layer to the device when it runs
    (accelerate).
    """
    max_reward_error: float | None = Field(None, gt=0)
    """Stop if a reference with int8, nf4 or its own dtype changes a pair's reward margin by more
    than this at the start. Dimensionless, as rewards are: beta times nats.
    """
    cache: CacheMode = Field("lazy", json_schema_extra=FREE)
    """Cache of reference log-probs on disk, keyed by content and shared by all runs with the same
    reference and tokens. lazy: filled as training sees each pair, so the second epoch needs no
    reference; full: filled before the first step; off: the reference runs every time. data.collator
    and sync_every switch it off; lazy does not cache the pairs of training sets with weights.
    """
    sync_every: Positive | None = None
    """Optimizer steps between updates of the reference towards the policy (TR-DPO: Gorbatovski et
    al. 2024, arXiv 2404.09656); never when not set.
    """
    sync_alpha: float = Field(0.6, gt=0, le=1)
    """Size of an update: reference = sync_alpha * policy + (1 - sync_alpha) * reference."""

    @property
    def traits(self) -> ReferenceTraits:
        """Return the facts about the kind of reference."""
        return REFERENCE_TRAITS[self.kind]

    @property
    def is_approximate(self) -> bool:
        """Return whether the reference only approximates the model that it stands for."""
        return self.traits.is_quantized or self.dtype is not None

    @field_validator("cache", mode="before")
    @classmethod
    def _accept_off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare off as False

    def check(self) -> None:
        """Check that the kind of reference uses each setting that is set."""
        _check_policy_layers(self)
        _check_own_weights(self)
        if self.traits.is_precomputed and self.cache == "off":
            rule = "kind precomputed stores its log-probs in the cache"
            cure = "remove reference.cache, or set reference.kind=copy"
            raise UserError("reference.cache", self.cache, rule, cure)

    def check_model(self, model: ModelSpec, precision: Precision) -> None:
        """Check that this reference exists for the policy and the precision.

        Raises:
            UserError: it does not.
        """
        _check_policy(self, model)
        base = model.lora.quantized_base if model.lora else None
        is_copied = self.traits.is_copy or self.traits.is_quantized
        if is_copied and self.path is None and base is not None:
            rule = f"a base in {base} is frozen, so the reference needs no copy of it"
            raise UserError("reference.kind", self.kind, rule, "set reference.kind=adapter_off")
        if self.traits.is_quantized and PRECISION_TRAITS[precision].weights == "fp64":
            rule = f"a reference of kind {self.kind} computes in 16 or 32 bits"
            cure = "set precision=fp32, or reference.kind=copy"
            raise UserError("precision", precision, rule, cure)

    def check_engine(self, engine: EngineSpec) -> None:
        """Check that the engine can shard this reference, if it should.

        Raises:
            UserError: it cannot.
        """
        if not self.sharded:
            return
        rule, cure = "", "remove it, or set reference.kind=copy"
        if not engine.shards_weights:
            rule = f"{engine.name_and_stage} does not shard weights"
            cure = "remove it, or set engine.kind=fsdp"
        elif not self.traits.can_be_sharded:
            rule = f"kind {self.kind} has no weights to shard"
        elif self.dtype is not None:
            rule = f"the shards have the policy's type, not {self.dtype}"
            cure = "remove it, or reference.dtype"
        elif self.offload:
            rule = "engine.offload decides where shards are stored"
            cure = "remove it, or reference.offload"
        if rule:
            raise UserError("reference.sharded", self.sharded, rule, cure)

    def check_sync(self, model: ModelSpec, engine: EngineSpec, precision: Precision) -> None:
        """Check that the reference can follow the policy, if it should.

        Raises:
            UserError: it cannot.
        """
        if self.sync_every is None:
            return
        rule, cure = _cannot_sync(self, model)
        if not rule and self.sharded and engine.traits.casts_sharded_reference:
            rule, cure = _loses_updates(engine, precision)
        if rule:
            raise UserError("reference.sync_every", self.sync_every, rule, cure)

    def check_ref_model(self, function: str) -> None:
        """Check that the settings do not define the reference that a user's function returns.

        function: its name, for the error.

        Raises:
            UserError: they do.
        """
        if not self.traits.is_copy or self.path is not None or self.dtype is not None:
            rule = "the settings define the reference too"
            cure = "remove reference.kind, reference.path and reference.dtype"
            raise UserError("ref_model", function, rule, cure)

    def check_collator(self, collator: str) -> None:
        """Check that no log-probs are computed before the user's collator runs.

        collator: how the error names it.

        Raises:
            UserError: reference.kind or reference.cache needs log-probs in advance.
        """
        if not self.traits.is_precomputed and self.cache != "full":
            return
        key = "kind" if self.traits.is_precomputed else "cache"
        rule = f"the batches of {collator} are not known in advance"
        cure = "remove it, or return ref_chosen_logps and ref_rejected_logps from the collator"
        raise UserError(f"reference.{key}", getattr(self, key), rule, cure)


def _check_policy_layers(reference: ReferenceSpec) -> None:
    """Check the settings of kinds that run the policy's own layers."""
    kind, count, path = reference.kind, reference.num_shared_layers, reference.path
    shares = reference.traits.shares_layers
    if shares and count is None:
        rule = f"kind {kind} needs the number of layers that both models share"
        cure = "set it, for example to half of the model's layers"
        raise UserError("reference.num_shared_layers", None, rule, cure)
    if not shares and count is not None:
        cure = "set reference.kind=shared_layers; model.num_frozen_layers freezes without sharing"
        raise UserError("reference.num_shared_layers", count, f"is not used by kind {kind}", cure)
    if reference.traits.runs_policy and path is not None:
        rule = f"kind {kind} uses the policy's own base, not another model"
        if shares:
            rule = f"kind {kind} shares the policy's own layers, which another model does not have"
        raise UserError("reference.path", path, rule, "remove it, or set reference.kind=copy")


def _check_own_weights(reference: ReferenceSpec) -> None:
    """Check the settings of kinds that have weights of their own."""
    kind, traits, cure = reference.kind, reference.traits, "remove it, or set reference.kind=copy"
    is_computed_by_policy = traits.is_precomputed and reference.path is None
    takes_dtype = traits.is_copy or (traits.is_precomputed and not is_computed_by_policy)
    if reference.dtype is not None and not takes_dtype:
        rule = f"kind {kind} determines the type of the weights"
        if is_computed_by_policy:
            rule = "the policy itself computes the log-probs, in its own type"
        raise UserError("reference.dtype", reference.dtype, rule, cure)
    if reference.offload and not traits.is_copy:
        rule = f"kind {kind} has no copy of the weights on the device"
        raise UserError("reference.offload", reference.offload, rule, cure)
    limit = reference.max_reward_error
    if limit is not None and not reference.is_approximate:
        rule = f"kind {kind} is exact, so no error is measured"
        raise UserError("reference.max_reward_error", limit, rule, "remove it")


def _check_policy(reference: ReferenceSpec, model: ModelSpec) -> None:
    """Check that the policy has what a kind that runs its layers needs."""
    kind, shares = reference.kind, reference.traits.shares_layers
    if shares and model.lora is not None:
        rule = "with model.lora every layer of the base can be shared"
        raise UserError("reference.kind", kind, rule, "set reference.kind=adapter_off")
    frozen = model.num_frozen_layers
    if shares and frozen not in (None, reference.num_shared_layers):
        rule = "the shared layers are the frozen ones, and reference.num_shared_layers is "
        rule += str(reference.num_shared_layers)
        raise UserError("model.num_frozen_layers", frozen, rule, "remove it")
    if reference.traits.runs_policy and not model.disable_dropout:
        rule = f"with kind {kind} the policy's dropout would also act on the reference"
        cure = "set it to true, or reference.kind=copy"
        raise UserError("model.disable_dropout", model.disable_dropout, rule, cure)
    if kind == "adapter_off" and model.lora is None:
        rule, cure = "there is no adapter to switch off", "set model.lora, or reference.kind=copy"
        raise UserError("reference.kind", kind, rule, cure)


def _cannot_sync(reference: ReferenceSpec, model: ModelSpec) -> tuple[str, str]:
    """Return why the reference cannot follow the policy, and the fix; empty if it can."""
    cure = "remove it, or set reference.kind=copy"
    if model.lora is not None:
        rule = "averaging the factors of two adapters does not average their weights"
        return rule, "remove it, or train without model.lora"
    if reference.traits.is_quantized:
        return f"weights in {reference.kind} cannot represent small updates", cure
    if reference.dtype in ("bf16", "fp16"):
        return f"weights in {reference.dtype} lose small updates", "remove reference.dtype"
    if reference.traits.is_precomputed:
        return "log-probs computed once belong to one fixed reference", cure
    if reference.cache == "full":
        rule = "log-probs cached by reference.cache=full are wrong once the reference is updated"
        return rule, "set reference.cache=off"
    return "", ""


def _loses_updates(engine: EngineSpec, precision: Precision) -> tuple[str, str]:
    """Return why sharded weights in this precision lose updates, and the fix; empty if not."""
    if precision == "auto":
        rule = f"a reference that {engine.kind} shards in 16 bits, as precision=auto may choose, "
        return f"{rule}loses small updates", "set precision=fp32, or reference.sharded=false"
    if PRECISION_TRAITS[precision].is_16_bit:
        rule = f"a reference that {engine.kind} shards in {precision} loses small updates"
        return rule, "set reference.sharded=false"
    return "", ""
