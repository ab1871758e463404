"""Compare a DeepSpeed config with the settings: find contradictions and unsupported features."""

import difflib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from orchestrator.settings.batch import BatchSpec
from orchestrator.settings.cluster import ClusterSpec
from orchestrator.settings.deepspeed_keys import BLOCKS, FEATURES, GONE, REMOVE, ZERO_KEYS
from orchestrator.settings.engine import EngineSpec
from orchestrator.settings.optim import OptimizerSpec, SchedulerSpec
from orchestrator.settings.precision import PRECISION_TRAITS, Precision
from orchestrator.settings.training import TrainingSpec

AUTO = "auto"  # value in the file for what the settings, or DeepSpeed, decide
AGREE = 'make them equal, or set "auto" in the file'


class ComparedSettings(Protocol):
    """The blocks of a RunSpec that a DeepSpeed config also defines."""

    @property
    def batch(self) -> BatchSpec: ...  # noqa: D102
    @property
    def cluster(self) -> ClusterSpec: ...  # noqa: D102
    @property
    def engine(self) -> EngineSpec: ...  # noqa: D102
    @property
    def optimizer(self) -> OptimizerSpec: ...  # noqa: D102
    @property
    def precision(self) -> Precision: ...  # noqa: D102
    @property
    def scheduler(self) -> SchedulerSpec: ...  # noqa: D102
    @property
    def training(self) -> TrainingSpec: ...  # noqa: D102


class Contradiction(NamedTuple):
    """A key of the file that contradicts the settings or is not supported."""

    path: str  # in the file, dotted
    value: object
    rule: str
    cure: str


# Values of the loss scale used here, and DeepSpeed's defaults: a file with these values changes
# nothing.
LOSS_SCALE = {
    "loss_scale": (0,),
    "initial_scale_power": (16,),
    "loss_scale_window": (2000, 1000),
    "hysteresis": (1, 2),
    "consecutive_hysteresis": (False,),
    "min_loss_scale": (1,),
}

# Default arguments of optimizers, which a file may state.
OPTIMIZER_DEFAULTS = {
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "momentum": 0,
    "amsgrad": False,
    "bias_correction": True,
}
DEEPSPEEDS_OWN = {"FusedAdam": "AdamW", "DeepSpeedCPUAdam": "AdamW"}
SCHEDULES = {
    "WarmupLR": ("constant_with_warmup", "constant"),
    "WarmupDecayLR": ("linear",),
    "WarmupCosineLR": ("cosine",),
}


def contradictions(spec: ComparedSettings) -> Iterator[Contradiction]:
    """Yield each key of engine.deepspeed_config that contradicts the settings or is unsupported."""
    file = spec.engine.deepspeed_config
    if not file:
        return
    for block in BLOCKS:
        if not isinstance(file.get(block, {}), dict) and file[block] != AUTO:
            yield Contradiction(block, file[block], "must be a block of keys", REMOVE)
            return
    yield from _features(file)
    for compare in (_stage, _offload, _sizes, _precision, _loss_scale, _optimizer, _schedule):
        yield from compare(file, spec)


def _value_at(file: dict[str, Any], path: str) -> Any:
    """Return the value at a dotted path; None for "auto", null and missing keys."""
    value: Any = file
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return None if value == AUTO else value


def _block(file: dict[str, Any], path: str) -> dict[str, Any]:
    value = _value_at(file, path)
    return value if isinstance(value, dict) else {}


def _is_off(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("enabled", True) in (False, AUTO) or all(map(_is_off, value.values()))
    return value == AUTO or not value


def _features(file: dict[str, Any]) -> Iterator[Contradiction]:
    for path in GONE:
        if (value := _value_at(file, path)) is not None:
            yield Contradiction(path, value, "is no longer supported by DeepSpeed", REMOVE)
    for path, feature in FEATURES.items():
        value = _value_at(file, path)
        has_no_effect = value in feature.may_be if feature.may_be else _is_off(value)
        if value is not None and not has_no_effect:
            yield Contradiction(path, value, feature.why, feature.cure)
    for name, value in _block(file, "zero_optimization").items():
        if name not in ZERO_KEYS and value != AUTO:
            near = difflib.get_close_matches(name, ZERO_KEYS, n=1)
            cure = f"did you mean {near[0]}?" if near else REMOVE
            yield Contradiction(f"zero_optimization.{name}", value, "is not a DeepSpeed key", cure)


def _stage(file: dict[str, Any], spec: ComparedSettings) -> Iterator[Contradiction]:
    path = "zero_optimization.stage"
    stage = _value_at(file, path)
    if stage == 0:
        cure = "set engine.kind=ddp, or stage 1, 2 or 3 in the file"
        yield Contradiction(path, stage, "shards nothing", cure)
    elif stage not in (None, 1, 2, 3):
        yield Contradiction(path, stage, "is not a ZeRO stage", "set 1, 2 or 3 in the file")
    elif stage not in (None, spec.engine.stage):
        rule = f"contradicts engine.zero_stage = {spec.engine.zero_stage}"
        yield Contradiction(path, stage, rule, AGREE)


def _offload(file: dict[str, Any], spec: ComparedSettings) -> Iterator[Contradiction]:
    offload = spec.engine.offload
    ours = {"offload_optimizer": offload != "none", "offload_param": offload == "parameters"}
    devices = {name: _value_at(file, f"zero_optimization.{name}.device") for name in ours}
    to_host = dict(ours)
    to_host |= {name: device != "none" for name, device in devices.items() if device is not None}
    meant = "optimizer" if to_host["offload_optimizer"] else "none"
    meant = "parameters" if to_host["offload_param"] else meant
    cure = f'set engine.offload={meant}, or "auto" in the file'
    if meant == offload:
        cure = 'set "cpu" in the file'
    for name, device in devices.items():
        path = f"zero_optimization.{name}.device"
        if device == "nvme":
            rule = "is not supported: checkpoints are written from memory"
            yield Contradiction(path, device, rule, 'set "cpu" in the file, and engine.offload')
        elif device not in (None, "none", "cpu"):
            rule = "is not a device that DeepSpeed knows"
            yield Contradiction(path, device, rule, 'set "cpu" or "none" in the file')
        elif to_host[name] != ours[name]:
            yield Contradiction(path, device, f"contradicts engine.offload = {offload}", cure)


def _sizes(file: dict[str, Any], spec: ComparedSettings) -> Iterator[Contradiction]:
    """Compare the numbers and switches that both the file and the settings have."""
    batch, engine = spec.batch, spec.engine
    tokens = "batch.max_tokens_per_microbatch"
    micro_batch: tuple[str, Any] = ("batch.micro_batch_size", batch.micro_batch_size)
    if not batch.micro_batch_size:
        micro_batch = (tokens, batch.max_tokens_per_microbatch)
    sides: dict[str, tuple[str, Any]] = {
        "gradient_clipping": ("training.max_grad_norm", spec.training.max_grad_norm),
        "train_batch_size": ("batch.global_batch_size", batch.global_batch_size),
        "train_micro_batch_size_per_gpu": micro_batch,
    }
    if engine.bucket_size is not None:
        sides["zero_optimization.reduce_bucket_size"] = ("engine.bucket_size", engine.bucket_size)
    if engine.overlap_comm is not None:
        sides["zero_optimization.overlap_comm"] = ("engine.overlap_comm", engine.overlap_comm)
    for path, (key, ours) in sides.items():
        in_file = _value_at(file, path)
        differs = in_file != (ours or 0) or key == tokens  # DeepSpeed's 0: no clipping
        if in_file is not None and differs:
            rule = f"contradicts {key} = {'null' if ours is None else ours}"
            yield Contradiction(path, in_file, rule, AGREE)
    yield from _accumulation(file, spec)


def _accumulation(file: dict[str, Any], spec: ComparedSettings) -> Iterator[Contradiction]:
    path, cluster = "gradient_accumulation_steps", spec.cluster
    in_file, ours = _value_at(file, path), spec.batch.grad_accum(cluster.max_workers)
    if in_file is None:
        return
    if ours is None or cluster.min_workers != cluster.max_workers:
        rule = "is derived from the batch and the number of ranks, or the lengths of pairs"
        yield Contradiction(path, in_file, rule, 'set "auto" in the file')
    elif in_file != ours:
        rule = (
            f"{cluster.max_workers} ranks with micro-batches of {spec.batch.micro_batch_size} "
            f"need {ours} for batch.global_batch_size = {spec.batch.global_batch_size}"
        )
        yield Contradiction(path, in_file, rule, f'set "auto" or {ours} in the file')


def _precision(file: dict[str, Any], spec: ComparedSettings) -> Iterator[Contradiction]:
    switches = {name: _value_at(file, f"{name}.enabled") for name in ("bf16", "fp16")}
    on = [name for name, enabled in switches.items() if enabled]
    off = [name for name, enabled in switches.items() if enabled is False]
    rule, auto = f"contradicts precision = {spec.precision}", 'or "auto" in the file'
    if len(on) == 2:
        also, cure = "bf16.enabled is also true", "enable only one of the two"
        yield Contradiction("fp16.enabled", switches["fp16"], also, cure)
    elif on and on[0] != spec.precision:
        cure = f"set precision={on[0]}, {auto}"
        yield Contradiction(f"{on[0]}.enabled", switches[on[0]], rule, cure)
    elif spec.precision in off:
        cure = f"set another precision, {auto}"
        yield Contradiction(f"{spec.precision}.enabled", False, rule, cure)
    elif len(off) == 2 and spec.precision not in ("fp32", "tf32"):
        rule += ": with fp16.enabled = false it means fp32"
        yield Contradiction("bf16.enabled", False, rule, f"set precision=fp32, {auto}")
    path = "communication_data_type"
    sent = _value_at(file, path)
    if sent not in (None, "fp32") and not PRECISION_TRAITS[spec.precision].is_16_bit:
        rule = f"would send gradients in {sent}, but precision is {spec.precision}"
        yield Contradiction(path, sent, rule, f"set precision=bf16, or {REMOVE}")


def _loss_scale(file: dict[str, Any], spec: ComparedSettings) -> Iterator[Contradiction]:
    if not PRECISION_TRAITS[spec.precision].scales_loss:
        return
    rule = (
        "all engines use the same loss scale: it starts at 65536, halves at each overflow and "
        "doubles after 2000 steps without one"
    )
    for name, may_be in LOSS_SCALE.items():
        value = _value_at(file, f"fp16.{name}")
        if value is not None and value not in may_be:
            yield Contradiction(f"fp16.{name}", value, rule, REMOVE)


def _optimizer(file: dict[str, Any], spec: ComparedSettings) -> Iterator[Contradiction]:
    ours, kind = spec.optimizer, _value_at(file, "optimizer.type")
    params: dict[str, Any] = dict(_block(file, "optimizer.params"))
    params.pop("torch_adam", None)  # selects the implementation, which optimizer.name decides
    # DeepSpeed's Adam is AdamW by default
    decays_weights = params.pop("adam_w_mode", True) is not False
    if kind is not None and not _is_optimizer(str(kind).lower(), ours, decays_weights):
        rule = f"contradicts optimizer.name = {ours.name}"
        yield Contradiction("optimizer.type", kind, rule, AGREE)
    for name, in_file in params.items():
        own = name in ("lr", "weight_decay")
        value = getattr(ours, name) if own else ours.kwargs.get(name, OPTIMIZER_DEFAULTS.get(name))
        value = list(value) if isinstance(value, tuple) else value
        if in_file not in (AUTO, None, value):
            key = f"optimizer.{name}" if own else f"optimizer.kwargs.{name}"
            rule = f"contradicts {key} = {'(not set)' if value is None else value}"
            yield Contradiction(f"optimizer.params.{name}", in_file, rule, AGREE)


def _is_optimizer(kind: str, ours: OptimizerSpec, decays_weights: bool) -> bool:
    """Return whether a type of DeepSpeed's is the optimizer of the settings.

    decays_weights: whether DeepSpeed's Adam is AdamW.
    """
    last = ours.name.replace(":", ".").rpartition(".")[2]
    name = DEEPSPEEDS_OWN.get(last, last).lower()
    same = {"adam": "adamw" if decays_weights else "adam", "adamw": "adamw"}
    if not ours.weight_decay and {kind, name} <= same.keys():  # the same without decay
        return True
    return same.get(kind, kind) == name


def _schedule(file: dict[str, Any], spec: ComparedSettings) -> Iterator[Contradiction]:
    kind, name = _value_at(file, "scheduler.type"), spec.scheduler.name
    rule = "the settings define the schedule"
    cure = (
        'set "auto" in the file, and set scheduler.warmup_steps, scheduler.kwargs or optimizer.lr'
    )
    for param, value in _block(file, "scheduler.params").items():
        if value not in (AUTO, None):
            yield Contradiction(f"scheduler.params.{param}", value, rule, cure)
    same = SCHEDULES.get(str(kind), ())
    if kind is not None and name not in same:
        cure = f"set scheduler.name={same[0]}, or " if same else ""
        cure += "remove the block scheduler from the file"
        yield Contradiction("scheduler.type", kind, f"contradicts scheduler.name = {name}", cure)
