"""The block engine: the kinds of engine, the facts about each, and how weights are sharded."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, field_validator

from orchestrator.settings.base import FREE, Block, Positive
from orchestrator.settings.errors import UserError
from orchestrator.settings.model import ModelSpec
from orchestrator.settings.os_errors import read_regular
from orchestrator.settings.precision import PRECISION_TRAITS, Precision

EngineKind = Literal["ddp", "deepspeed", "fsdp"]
ZeroStage = Literal[1, 2, 3]
EngineOffload = Literal["none", "optimizer", "parameters"]


@dataclass(frozen=True)
class EngineTraits:
    """Facts about an engine that decide which settings it uses and how a run is built for it."""

    own_settings: tuple[str, ...]
    """Settings of the block engine that only this engine uses."""
    shards_weights: bool = False
    """Can hold only a shard of each weight between forward passes (deepspeed: at stage 3)."""
    holds_16_bit_weights: bool = False
    """In a 16-bit precision it computes with weights of that type, not under autocast."""
    moves_weights: bool = False
    """Moves weights from host memory to the device itself, when it wraps them."""
    keeps_parameters_whole: bool = False
    """Its optimizer updates whole parameters, not flattened or cut ones."""
    updates_in_fp32: bool = False
    """Accumulates gradients and updates weights in fp32, whatever the precision."""
    casts_sharded_reference: bool = False
    """In a 16-bit precision it stores the shards of a reference in that type."""
    offloads_optimizer: bool = False
    """Can keep the optimizer's state in host memory, and the weights on the device."""
    has_buckets: bool = False
    """Reduces gradients in buckets of engine.bucket_size elements."""


ENGINE_TRAITS: dict[EngineKind, EngineTraits] = {
    "ddp": EngineTraits(("shard_optimizer",), keeps_parameters_whole=True, has_buckets=True),
    "deepspeed": EngineTraits(
        ("zero_stage", "deepspeed_config", "overlap_comm"),
        shards_weights=True,
        holds_16_bit_weights=True,
        moves_weights=True,
        updates_in_fp32=True,
        casts_sharded_reference=True,
        offloads_optimizer=True,
        has_buckets=True,
    ),
    "fsdp": EngineTraits(
        ("reshard_after_forward",),
        shards_weights=True,
        holds_16_bit_weights=True,
        moves_weights=True,
    ),
}


class EngineSpec(Block):
    """Sharding of weights, gradients and optimizer state; in fp32 it affects only speed and
    memory.
    """

    kind: EngineKind = Field("ddp", json_schema_extra=FREE)
    """ddp: whole weights on every rank, optimizer state sharded. deepspeed: ZeRO at
    engine.zero_stage. fsdp: weights, gradients and optimizer state sharded by torch's fully_shard
    (FSDP2).
    """
    zero_stage: ZeroStage | None = Field(None, json_schema_extra=FREE)
    """What DeepSpeed shards: 1: optimizer state, 2: gradients too, 3: weights too. 2 when neither
    this nor engine.deepspeed_config sets it. Rajbhandari et al. 2019, arXiv 1910.02054.
    """
    deepspeed_config: dict[str, Any] | None = Field(None, json_schema_extra=FREE)
    """A DeepSpeed config, as the path of a JSON or as its content; "auto" is filled from the
    settings, and a contradiction with them is an error.
    """
    shard_optimizer: bool = Field(True, json_schema_extra=FREE)
    """ddp: shard the optimizer state (ZeroRedundancyOptimizer): each parameter's state is on one
    rank.
    """
    offload: EngineOffload = Field("none", json_schema_extra=FREE)
    """What to keep in host memory. optimizer: its state and the weights that it updates
    (deepspeed); parameters: also all weights while they are not used (deepspeed at stage 3; fsdp).
    """
    reshard_after_forward: bool = Field(True, json_schema_extra=FREE)
    """fsdp: free a layer's gathered weights after its forward pass, and gather them again for the
    backward pass.
    """
    bucket_size: Positive | None = Field(None, json_schema_extra=FREE)
    """Gradient elements per communication bucket (deepspeed, ddp); the engine's default when not
    set.
    """
    overlap_comm: bool | None = Field(None, json_schema_extra=FREE)
    """deepspeed: reduce gradients during the backward pass; DeepSpeed's default when not set."""

    @field_validator("deepspeed_config", mode="before")
    @classmethod
    def _read_file(cls, value: Any) -> Any:
        return deepspeed_json(value) if isinstance(value, str) else value

    @property
    def stage(self) -> ZeroStage:
        """Return the ZeRO stage that deepspeed runs."""
        zero = (self.deepspeed_config or {}).get("zero_optimization")
        in_file = zero.get("stage") if isinstance(zero, dict) else None
        return self.zero_stage or next(
            (stage for stage in get_args(ZeroStage) if stage == in_file), 2
        )

    @property
    def traits(self) -> EngineTraits:
        """Return the facts about the engine, at any stage."""
        return ENGINE_TRAITS[self.kind]

    @property
    def shards_weights(self) -> bool:
        """Return whether a rank holds only a shard of each weight between forward passes."""
        return self.traits.shards_weights and (self.kind != "deepspeed" or self.stage == 3)

    @property
    def deals_parameters(self) -> bool:
        """Return whether each parameter's optimizer state is whole, on one of the ranks."""
        return self.traits.keeps_parameters_whole and self.shard_optimizer

    @property
    def label(self) -> str:
        """Return the engine's name in printed lines: ZeRO-2, fsdp; empty for ddp, the default."""
        if self.kind == "deepspeed":
            return f"ZeRO-{self.stage}"
        return "" if self.kind == "ddp" else self.kind

    @property
    def name_and_stage(self) -> str:
        """Return the engine's name in errors: ddp, fsdp, deepspeed at stage 2."""
        return f"deepspeed at stage {self.stage}" if self.kind == "deepspeed" else self.kind

    def check(self) -> None:
        """Check that the engine uses each setting that is set."""
        for owner, traits in ENGINE_TRAITS.items():
            for name in traits.own_settings if owner != self.kind else ():
                value = getattr(self, name)
                if value != EngineSpec.model_fields[name].default:
                    rule = f"is not used by engine.kind {self.kind}"
                    cure = f"set engine.kind={owner}, or remove it"
                    raise UserError(f"engine.{name}", value, rule, cure)
        if self.bucket_size is not None and not self.traits.has_buckets:
            rule = f"is not used by engine.kind {self.kind}, which reduces gradients layer by layer"
            raise UserError("engine.bucket_size", self.bucket_size, rule, "remove it")
        _check_offload(self)

    def check_model(self, model: ModelSpec, precision: Precision) -> None:
        """Check that the engine computes exactly with these weights and this precision.

        Raises:
            UserError: it does not.
        """
        if self.traits.updates_in_fp32 and PRECISION_TRAITS[precision].weights == "fp64":
            rule = f"{self.kind} accumulates gradients and updates weights in fp32"
            cure = "set engine.kind=ddp or fsdp, or precision=fp32"
            raise UserError("precision", precision, rule, cure)
        base = model.lora.quantized_base if model.lora else None
        if base is not None and self.shards_weights:
            rule = f"{self.name_and_stage} cannot shard quantised weights"
            cure = "set engine.kind=ddp, or engine.kind=deepspeed and engine.zero_stage=2, or "
            raise UserError("model.lora.base", base, rule, f"{cure}model.lora.base=bf16")


def _check_offload(engine: EngineSpec) -> None:
    key, offload, kind = "engine.offload", engine.offload, engine.kind
    if offload == "optimizer" and not engine.traits.offloads_optimizer:
        rule, cure = f"{kind} does not support offload", "set engine.kind=deepspeed"
        if engine.shards_weights:
            rule = f"under {kind} the state is stored with the weights"
            cure = "set engine.offload=parameters"
        raise UserError(key, offload, rule, cure)
    if offload == "parameters" and not engine.shards_weights:
        rule = f"{engine.name_and_stage} keeps the whole weights on every rank's device"
        cure = "set engine.kind=fsdp, or engine.kind=deepspeed and engine.zero_stage=3"
        if kind == "deepspeed":
            cure = "set engine.zero_stage=3, or engine.offload=optimizer"
        raise UserError(key, offload, rule, cure)


def deepspeed_json(source: str | dict[str, Any] | None) -> dict[str, Any]:
    """Return the content of engine.deepspeed_config, read from its file if it is a path; empty if
    it is not set.

    Raises:
        UserError: there is no such file, or it is not a JSON object.
    """
    if not isinstance(source, str):
        return source or {}
    path, cure = source, "use a DeepSpeed JSON, for example configs/deepspeed/zero2.json"
    try:
        config = json.loads(read_regular(Path(path).expanduser()))
    except OSError as error:
        rule = f"cannot be read ({error.strerror})"
        raise UserError("engine.deepspeed_config", path, rule, cure) from None
    except ValueError as error:
        raise UserError(
            "engine.deepspeed_config", path, f"is not valid JSON: {error}", cure
        ) from None
    if not isinstance(config, dict):
        raise UserError("engine.deepspeed_config", path, "is not a JSON object", cure)
    return config
