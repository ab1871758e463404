"""A DeepSpeed JSON against the settings: what it says otherwise, and what it asks for and would not get."""

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from orchestrator.settings.spec import RunSpec

AUTO = "auto"  # what the file leaves to the settings, or to DeepSpeed
AGREE = 'set one to the other, or "auto" in the file'
REMOVE = "remove it from the file"


class Contradiction(NamedTuple):
    """A key of the file that cannot stand beside the settings."""

    path: str  # in the file, dotted
    value: object
    rule: str
    cure: str


class _Feature(NamedTuple):
    """What would change the numbers of a run, or the work of what stands above an engine."""

    why: str
    cure: str = REMOVE
    may_be: tuple[object, ...] = ()  # values that ask for nothing; when empty, those that are off


_COUNTED = "the loss is divided once, by the count of the global batch"
_ZERO_PLUS_PLUS = "moves weights or gradients in fewer bits, or holds weights twice"
_CPU_ADAM = "needs an optimizer of DeepSpeed's own, with part of its state on the device"
_BATCHES = "which pairs make a step is decided by run.seed alone"
FEATURES = {
    "activation_checkpointing": _Feature(
        "acts only on a model that calls it", "set training.gradient_checkpointing=true, and remove it from the file"
    ),
    "bfloat16": _Feature("is an old name", 'call it "bf16"'),
    "compile": _Feature("compiles other hooks into the model"),
    "data_efficiency": _Feature(_BATCHES),
    "data_types.buffer_dtype": _Feature("buffers keep the type that they have"),
    "data_types.grad_accum_dtype": _Feature(
        "gradients are added in fp32, or bf16 to save memory", may_be=("fp32", "bf16")
    ),
    "data_types.keep_in_fp32_modules": _Feature("precision says what computes in 16 bits"),
    "data_types.param_dtype": _Feature("precision says it", "set precision, and remove it from the file"),
    "dataloader_drop_last": _Feature("every pair is used once in an epoch"),
    "expert_parallel": _Feature("experts are cut over ranks by ZeRO alone"),
    "fp16.auto_cast": _Feature("precision says what is computed in 16 bits"),
    "fp16.fp16_master_weights_and_grads": _Feature("the weights that the optimizer updates are kept in fp32"),
    "bf16.bf16_master_weights_and_grads": _Feature("the weights that the optimizer updates are kept in fp32"),
    "bf16.bf16_optimizer_states": _Feature("the state of the optimizer is kept in fp32"),
    "bf16.check_grad_overflow": _Feature("a gradient that is not finite is never applied", may_be=(True,)),
    "gradient_allreduce_op": _Feature(_COUNTED, may_be=("mean",)),
    "gradient_predivide_factor": _Feature(_COUNTED, may_be=(1,)),
    "hybrid_engine": _Feature("nothing is generated while a run trains"),
    "managed_gradient_accumulation": _Feature("the engine is told which forward pass is a step's last", may_be=(True,)),
    "pipeline": _Feature("the model is not cut into stages here"),
    "prescale_gradients": _Feature(_COUNTED),
    "sequence_parallel_size": _Feature("sequences are not cut over ranks here", may_be=(1,)),
    "tensor_parallel.autotp_size": _Feature("layers are cut over ranks by ZeRO alone", may_be=(0, 1)),
    "torch_autocast": _Feature("precision says it", "set precision=bf16, and remove it from the file"),
    "wandb": _Feature("the run tells W&B by itself", "see the settings wandb, and remove it from the file"),
    "weight_quantization": _Feature("weights that train are not quantised"),
    "zero_force_ds_cpu_optimizer": _Feature(
        "optimizer.name says which optimizer runs",
        "set it to false, and, for DeepSpeed's, optimizer.name=deepspeed.ops.adam.DeepSpeedCPUAdam",
    ),
    "zero_optimization.cpu_offload": _Feature("is an old name", 'call it "offload_optimizer": {"device": "cpu"}'),
    "zero_optimization.cpu_offload_param": _Feature("is an old name", 'call it "offload_param": {"device": "cpu"}'),
    "zero_optimization.legacy_stage1": _Feature("has shards of another shape"),
    "zero_optimization.offload_optimizer.ratio": _Feature(_CPU_ADAM, may_be=(1,)),
    "zero_optimization.offload_optimizer.super_offload": _Feature(_CPU_ADAM),
    "zero_optimization.zenflow": _Feature("applies a part of the gradient steps later"),
    "zero_optimization.zero_hpz_partition_size": _Feature(_ZERO_PLUS_PLUS, may_be=(0, 1)),
    "zero_optimization.zero_quantized_gradients": _Feature(_ZERO_PLUS_PLUS),
    "zero_optimization.zero_quantized_nontrainable_weights": _Feature(_ZERO_PLUS_PLUS),
    "zero_optimization.zero_quantized_weights": _Feature(_ZERO_PLUS_PLUS),
}

# Keys that DeepSpeed has given up and raises for, whatever they say.
GONE = (
    "amp",
    "compression_training",
    "curriculum_learning",
    "eigenvalue",
    "elasticity",
    "graph_harvesting",
    "nebula",
    "progressive_layer_drop",
    "quantize_training",
    "sparse_attention",
    "sparse_gradients",
    "zero_optimization.mics_hierarchical_params_gather",
    "zero_optimization.mics_shard_size",
    "zero_optimization.zeropp_loco_param",
)

# Keys of zero_optimization, which raises for any other.
ZERO_KEYS = """
    allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm contiguous_gradients cpu_offload
    cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks
    gather_16bit_weights_on_model_save ignore_unused_parameters leaf_module legacy_stage1 load_from_fp32_weights
    log_trace_cache_warnings max_live_parameters max_reuse_distance memory_efficient_linear model_persistence_threshold
    module_granularity_threshold offload_optimizer offload_param overlap_comm override_module_apply
    param_persistence_threshold parameter_alignment pipeline_loading_checkpoint prefetch_bucket_size reduce_bucket_size
    reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory stage stage3_allgather_sequential
    stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save stage3_max_live_parameters
    stage3_max_reuse_distance stage3_model_persistence_threshold stage3_module_granularity_threshold
    stage3_param_persistence_threshold stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params
    sub_group_size use_all_reduce_for_fetch_params use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size
    zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights
""".split()  # noqa: SIM905 - one a line would be a page

BLOCKS = ("bf16", "data_types", "fp16", "optimizer", "scheduler", "tensor_parallel", "zero_optimization")

# What the loss scale does here, and what DeepSpeed's would do by default: a file that says so has chosen nothing.
LOSS_SCALE = {
    "loss_scale": (0,),
    "initial_scale_power": (16,),
    "loss_scale_window": (2000, 1000),
    "hysteresis": (1, 2),
    "consecutive_hysteresis": (False,),
    "min_loss_scale": (1,),
}

# Arguments of optimizers that a file may spell out although they are the default.
OPTIMIZER_DEFAULTS = {"betas": [0.9, 0.999], "eps": 1e-8, "momentum": 0, "amsgrad": False, "bias_correction": True}
DEEPSPEEDS_OWN = {"FusedAdam": "AdamW", "DeepSpeedCPUAdam": "AdamW"}
SCHEDULES = {
    "WarmupLR": ("constant_with_warmup", "constant"),
    "WarmupDecayLR": ("linear",),
    "WarmupCosineLR": ("cosine",),
}


def contradictions(spec: "RunSpec") -> Iterator[Contradiction]:
    """Everything in engine.deepspeed_config that cannot stand beside the settings, or here at all."""
    file = spec.engine.deepspeed_config
    if not file:
        return
    for block in BLOCKS:
        if not isinstance(file.get(block, {}), dict) and file[block] != AUTO:
            yield Contradiction(block, file[block], "is no block of keys", REMOVE)
            return
    for look in (_features, _stage, _offload, _sizes, _precision, _loss_scale, _optimizer, _schedule):
        yield from look(file, spec)


def _at(file: dict[str, Any], path: str) -> Any:
    """What stands there; None for "auto", null and nothing."""
    value: Any = file
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return None if value == AUTO else value


def _block(file: dict[str, Any], path: str) -> dict[str, Any]:
    value = _at(file, path)
    return value if isinstance(value, dict) else {}


def _is_off(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("enabled", True) in (False, AUTO) or all(map(_is_off, value.values()))
    return value == AUTO or not value


def _features(file: dict[str, Any], spec: "RunSpec") -> Iterator[Contradiction]:
    for path in GONE:
        if (value := _at(file, path)) is not None:
            yield Contradiction(path, value, "is no longer in DeepSpeed, which raises for it", REMOVE)
    for path, feature in FEATURES.items():
        value = _at(file, path)
        if value is not None and not (value in feature.may_be if feature.may_be else _is_off(value)):
            yield Contradiction(path, value, feature.why, feature.cure)
    for name, value in _block(file, "zero_optimization").items():
        if name not in ZERO_KEYS and value != AUTO:
            near = difflib.get_close_matches(name, ZERO_KEYS, n=1)
            cure = f"did you mean {near[0]}?" if near else REMOVE
            yield Contradiction(f"zero_optimization.{name}", value, "is no key of DeepSpeed's", cure)


def _stage(file: dict[str, Any], spec: "RunSpec") -> Iterator[Contradiction]:
    path = "zero_optimization.stage"
    stage = _at(file, path)
    if stage == 0:
        yield Contradiction(path, stage, "shards nothing", "set engine.kind=ddp, or stage 1, 2 or 3 in the file")
    elif stage not in (None, 1, 2, 3):
        yield Contradiction(path, stage, "is no stage of ZeRO", "set 1, 2 or 3 in the file")
    elif stage not in (None, spec.engine.stage):
        yield Contradiction(path, stage, f"contradicts engine.zero_stage = {spec.engine.zero_stage}", AGREE)


def _offload(file: dict[str, Any], spec: "RunSpec") -> Iterator[Contradiction]:
    offload = spec.engine.offload
    ours = {"offload_optimizer": offload != "none", "offload_param": offload == "parameters"}
    wanted = {name: _at(file, f"zero_optimization.{name}.device") for name in ours}
    to_host = {name: ours[name] if device is None else device != "none" for name, device in wanted.items()}
    meant = "parameters" if to_host["offload_param"] else "optimizer" if to_host["offload_optimizer"] else "none"
    cure = f'set engine.offload={meant}, or "auto" in the file' if meant != offload else 'set "cpu" in the file'
    for name, device in wanted.items():
        path = f"zero_optimization.{name}.device"
        if device == "nvme":
            rule = "checkpoints are written from memory, and state on a disk is not there"
            yield Contradiction(path, device, rule, 'set "cpu" in the file, and engine.offload')
        elif device not in (None, "none", "cpu"):
            yield Contradiction(path, device, "is no place that DeepSpeed knows", 'set "cpu" or "none" in the file')
        elif to_host[name] != ours[name]:
            yield Contradiction(path, device, f"contradicts engine.offload = {offload}", cure)


def _sizes(file: dict[str, Any], spec: "RunSpec") -> Iterator[Contradiction]:
    """What is a number, or a switch, on both sides."""
    batch, engine, norm = spec.batch, spec.engine, spec.training.max_grad_norm
    tokens, pairs = "batch.max_tokens_per_microbatch", batch.micro_batch_size
    sides: dict[str, tuple[str, Any]] = {
        "gradient_clipping": ("training.max_grad_norm", norm),
        "train_batch_size": ("batch.global_batch_size", batch.global_batch_size),
        "train_micro_batch_size_per_gpu": (
            ("batch.micro_batch_size", pairs) if pairs else (tokens, batch.max_tokens_per_microbatch)
        ),
    }
    if engine.bucket_size is not None:
        sides["zero_optimization.reduce_bucket_size"] = ("engine.bucket_size", engine.bucket_size)
    if engine.overlap_comm is not None:
        sides["zero_optimization.overlap_comm"] = ("engine.overlap_comm", engine.overlap_comm)
    for path, (key, ours) in sides.items():
        said = _at(file, path)
        if said is not None and (said != (ours or 0) or key == tokens):  # no clipping is 0 there
            yield Contradiction(path, said, f"contradicts {key} = {'null' if ours is None else ours}", AGREE)
    yield from _accumulation(file, spec)


def _accumulation(file: dict[str, Any], spec: "RunSpec") -> Iterator[Contradiction]:
    path, cluster = "gradient_accumulation_steps", spec.cluster
    said, ours = _at(file, path), spec.batch.grad_accum(cluster.max_workers)
    if said is None:
        return
    if ours is None or cluster.min_workers != cluster.max_workers:
        rule = "follows here from the batch and from how many ranks there are, or how long pairs are"
        yield Contradiction(path, said, rule, 'set "auto" in the file')
    elif said != ours:
        rule = f"{cluster.max_workers} ranks in micro-batches of {spec.batch.micro_batch_size} take {ours} to have "
        rule += f"batch.global_batch_size = {spec.batch.global_batch_size}"
        yield Contradiction(path, said, rule, f'set "auto" or {ours} in the file')


def _precision(file: dict[str, Any], spec: "RunSpec") -> Iterator[Contradiction]:
    said = {name: _at(file, f"{name}.enabled") for name in ("bf16", "fp16")}
    on = [name for name, enabled in said.items() if enabled]
    off = [name for name, enabled in said.items() if enabled is False]
    rule = f"contradicts precision = {spec.precision}"
    if len(on) == 2:
        yield Contradiction("fp16.enabled", said["fp16"], "bf16.enabled is true as well", "leave one of the two")
    elif on and on[0] != spec.precision:
        yield Contradiction(f"{on[0]}.enabled", said[on[0]], rule, f'set precision={on[0]}, or "auto" in the file')
    elif spec.precision in off:
        yield Contradiction(f"{spec.precision}.enabled", False, rule, 'set another precision, or "auto" in the file')
    elif len(off) == 2 and spec.precision not in ("fp32", "tf32"):
        rule += ", as with fp16.enabled = false it means fp32"
        yield Contradiction("bf16.enabled", False, rule, 'set precision=fp32, or "auto" in the file')
    sent = _at(file, "communication_data_type")
    if sent not in (None, "fp32") and spec.precision not in ("bf16", "fp16"):
        rule = f"would send gradients in {sent}, and precision is {spec.precision}"
        yield Contradiction("communication_data_type", sent, rule, f"set precision=bf16, or {REMOVE}")


def _loss_scale(file: dict[str, Any], spec: "RunSpec") -> Iterator[Contradiction]:
    if spec.precision != "fp16":
        return
    for name, may_be in LOSS_SCALE.items():
        value = _at(file, f"fp16.{name}")
        if value is not None and value not in may_be:
            rule = "the loss scale is one for all engines: it starts at 65536, is halved by each overflow, and doubles "
            yield Contradiction(f"fp16.{name}", value, rule + "after 2000 steps without", REMOVE)


def _optimizer(file: dict[str, Any], spec: "RunSpec") -> Iterator[Contradiction]:
    ours, kind = spec.optimizer, _at(file, "optimizer.type")
    params: dict[str, Any] = dict(_block(file, "optimizer.params"))
    params.pop("torch_adam", None)  # which implementation runs: optimizer.name says it
    decays_weights = params.pop("adam_w_mode", True) is not False  # DeepSpeed's Adam is AdamW unless it is told
    last = ours.name.replace(":", ".").rpartition(".")[2]
    last = DEEPSPEEDS_OWN.get(last, last)
    if kind is not None:
        same = {"adam": "adamw" if decays_weights else "adam", "adamw": "adamw"}
        meant, has = str(kind).lower(), last.lower()
        is_adam = not ours.weight_decay and {meant, has} <= same.keys()  # without decay the two are one
        if same.get(meant, meant) != has and not is_adam:
            yield Contradiction("optimizer.type", kind, f"contradicts optimizer.name = {ours.name}", AGREE)
    for name, said in params.items():
        own = name in ("lr", "weight_decay")
        value = getattr(ours, name) if own else ours.kwargs.get(name, OPTIMIZER_DEFAULTS.get(name))
        value = list(value) if isinstance(value, tuple) else value
        if said not in (AUTO, None, value):
            key = f"optimizer.{name}" if own else f"optimizer.kwargs.{name}"
            rule = f"contradicts {key} = {'(not set)' if value is None else value}"
            yield Contradiction(f"optimizer.params.{name}", said, rule, AGREE)


def _schedule(file: dict[str, Any], spec: "RunSpec") -> Iterator[Contradiction]:
    kind, name = _at(file, "scheduler.type"), spec.scheduler.name
    for param, value in _block(file, "scheduler.params").items():
        if value not in (AUTO, None):
            cure = 'set "auto" in the file, and scheduler.warmup_steps, scheduler.kwargs or optimizer.lr'
            yield Contradiction(f"scheduler.params.{param}", value, "the settings have the schedule", cure)
    same = SCHEDULES.get(str(kind), ())
    if kind is not None and name not in same:
        cure = f"set scheduler.name={same[0]}, or " if same else ""
        rule = f"contradicts scheduler.name = {name}"
        yield Contradiction("scheduler.type", kind, rule, f"{cure}remove the block scheduler from the file")
