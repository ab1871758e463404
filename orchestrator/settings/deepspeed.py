"""Compare a DeepSpeed JSON with the settings: find contradictions and features that are not
supported.
"""

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from orchestrator.settings.spec import RunSpec

AUTO = "auto"  # value in the file for what the settings, or DeepSpeed, decide
AGREE = 'make them equal, or set "auto" in the file'
REMOVE = "remove it from the file"


class Contradiction(NamedTuple):
    """A key of the file that contradicts the settings or is not supported."""

    path: str  # in the file, dotted
    value: object
    rule: str
    cure: str


class _Feature(NamedTuple):
    """A DeepSpeed feature that is not supported: it would change results, or the work of code
    outside the engine.
    """

    why: str
    cure: str = REMOVE
    may_be: tuple[
        object, ...
    ] = ()  # values that have no effect; when empty, those that switch it off


_COUNTED = "the loss is divided once, by the count of the global batch"
_ZERO_PLUS_PLUS = "sends weights or gradients in fewer bits, or stores weights twice"
_CPU_ADAM = "needs DeepSpeed's own optimizer, with part of its state on the device"
_BATCHES = "only run.seed decides which pairs are in a step"
FEATURES = {
    "activation_checkpointing": _Feature(
        "works only with models that call it",
        "set training.gradient_checkpointing=true, and remove it from the file",
    ),
    "bfloat16": _Feature("was renamed", 'use "bf16"'),
    "compile": _Feature("compiles other hooks into the model"),
    "data_efficiency": _Feature(_BATCHES),
    "data_types.buffer_dtype": _Feature("buffers keep their dtype"),
    "data_types.grad_accum_dtype": _Feature(
        "gradients are added in fp32, or bf16 to save memory", may_be=("fp32", "bf16")
    ),
    "data_types.keep_in_fp32_modules": _Feature("precision decides what computes in 16 bits"),
    "data_types.param_dtype": _Feature(
        "precision decides it", "set precision, and remove it from the file"
    ),
    "dataloader_drop_last": _Feature("every pair is used once per epoch"),
    "expert_parallel": _Feature("expert parallelism is not supported; only ZeRO shards experts"),
    "fp16.auto_cast": _Feature("precision decides what is computed in 16 bits"),
    "fp16.fp16_master_weights_and_grads": _Feature(
        "the weights that the optimizer updates are kept in fp32"
    ),
    "bf16.bf16_master_weights_and_grads": _Feature(
        "the weights that the optimizer updates are kept in fp32"
    ),
    "bf16.bf16_optimizer_states": _Feature("the state of the optimizer is kept in fp32"),
    "bf16.check_grad_overflow": _Feature(
        "a gradient that is not finite is never applied", may_be=(True,)
    ),
    "gradient_allreduce_op": _Feature(_COUNTED, may_be=("mean",)),
    "gradient_predivide_factor": _Feature(_COUNTED, may_be=(1,)),
    "hybrid_engine": _Feature("no text is generated during training"),
    "managed_gradient_accumulation": _Feature(
        "the trainer tells the engine which micro-batch is the last", may_be=(True,)
    ),
    "pipeline": _Feature("pipeline parallelism is not supported"),
    "prescale_gradients": _Feature(_COUNTED),
    "sequence_parallel_size": _Feature("sequence parallelism is not supported", may_be=(1,)),
    "tensor_parallel.autotp_size": _Feature(
        "tensor parallelism is not supported; only ZeRO shards layers", may_be=(0, 1)
    ),
    "torch_autocast": _Feature(
        "precision decides it", "set precision=bf16, and remove it from the file"
    ),
    "wandb": _Feature(
        "the run reports to W&B itself", "use the block wandb, and remove it from the file"
    ),
    "weight_quantization": _Feature("trainable weights are not quantised"),
    "zero_force_ds_cpu_optimizer": _Feature(
        "optimizer.name decides which optimizer runs",
        "set it to false, and, for DeepSpeed's, optimizer.name=deepspeed.ops.adam.DeepSpeedCPUAdam",
    ),
    "zero_optimization.cpu_offload": _Feature(
        "was renamed", 'use "offload_optimizer": {"device": "cpu"}'
    ),
    "zero_optimization.cpu_offload_param": _Feature(
        "was renamed", 'use "offload_param": {"device": "cpu"}'
    ),
    "zero_optimization.legacy_stage1": _Feature("shards the state in another layout"),
    "zero_optimization.offload_optimizer.ratio": _Feature(_CPU_ADAM, may_be=(1,)),
    "zero_optimization.offload_optimizer.super_offload": _Feature(_CPU_ADAM),
    "zero_optimization.zenflow": _Feature("delays part of the gradient by some steps"),
    "zero_optimization.zero_hpz_partition_size": _Feature(_ZERO_PLUS_PLUS, may_be=(0, 1)),
    "zero_optimization.zero_quantized_gradients": _Feature(_ZERO_PLUS_PLUS),
    "zero_optimization.zero_quantized_nontrainable_weights": _Feature(_ZERO_PLUS_PLUS),
    "zero_optimization.zero_quantized_weights": _Feature(_ZERO_PLUS_PLUS),
}

# Keys that DeepSpeed has removed; it raises for any value.
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

# Keys of zero_optimization; DeepSpeed raises for any other.
ZERO_KEYS = """
    allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm
    contiguous_gradients cpu_offload cpu_offload_param cpu_offload_use_pin_memory
    elastic_checkpoint enable_sanity_checks gather_16bit_weights_on_model_save
    ignore_unused_parameters leaf_module legacy_stage1 load_from_fp32_weights
    log_trace_cache_warnings max_live_parameters max_reuse_distance memory_efficient_linear
    model_persistence_threshold module_granularity_threshold offload_optimizer offload_param
    overlap_comm override_module_apply param_persistence_threshold parameter_alignment
    pipeline_loading_checkpoint prefetch_bucket_size reduce_bucket_size reduce_scatter
    round_robin_gradients save_muon_momentum_buffer_in_memory stage stage3_allgather_sequential
    stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
    stage3_max_live_parameters stage3_max_reuse_distance stage3_model_persistence_threshold
    stage3_module_granularity_threshold stage3_param_persistence_threshold
    stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params sub_group_size
    use_all_reduce_for_fetch_params use_multi_rank_bucket_allreduce zenflow
    zero_hpz_partition_size zero_quantized_gradients zero_quantized_nontrainable_weights
    zero_quantized_weights
""".split()  # noqa: SIM905 - one a line would be a page

BLOCKS = (
    "bf16",
    "data_types",
    "fp16",
    "optimizer",
    "scheduler",
    "tensor_parallel",
    "zero_optimization",
)

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


def contradictions(spec: "RunSpec") -> Iterator[Contradiction]:
    """Yield every key of engine.deepspeed_config that contradicts the settings or is not
    supported.
    """
    file = spec.engine.deepspeed_config
    if not file:
        return
    for block in BLOCKS:
        if not isinstance(file.get(block, {}), dict) and file[block] != AUTO:
            yield Contradiction(block, file[block], "must be a block of keys", REMOVE)
            return
    for look in (
        _features,
        _stage,
        _offload,
        _sizes,
        _precision,
        _loss_scale,
        _optimizer,
        _schedule,
    ):
        yield from look(file, spec)


def _at(file: dict[str, Any], path: str) -> Any:
    """Return the value at a dotted path; None for "auto", null and missing keys."""
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
            yield Contradiction(path, value, "is no longer supported by DeepSpeed", REMOVE)
    for path, feature in FEATURES.items():
        value = _at(file, path)
        if value is not None and not (
            value in feature.may_be if feature.may_be else _is_off(value)
        ):
            yield Contradiction(path, value, feature.why, feature.cure)
    for name, value in _block(file, "zero_optimization").items():
        if name not in ZERO_KEYS and value != AUTO:
            near = difflib.get_close_matches(name, ZERO_KEYS, n=1)
            cure = f"did you mean {near[0]}?" if near else REMOVE
            yield Contradiction(f"zero_optimization.{name}", value, "is not a DeepSpeed key", cure)


def _stage(file: dict[str, Any], spec: "RunSpec") -> Iterator[Contradiction]:
    path = "zero_optimization.stage"
    stage = _at(file, path)
    if stage == 0:
        yield Contradiction(
            path, stage, "shards nothing", "set engine.kind=ddp, or stage 1, 2 or 3 in the file"
        )
    elif stage not in (None, 1, 2, 3):
        yield Contradiction(path, stage, "is not a ZeRO stage", "set 1, 2 or 3 in the file")
    elif stage not in (None, spec.engine.stage):
        yield Contradiction(
            path, stage, f"contradicts engine.zero_stage = {spec.engine.zero_stage}", AGREE
        )


def _offload(file: dict[str, Any], spec: "RunSpec") -> Iterator[Contradiction]:
    offload = spec.engine.offload
    ours = {"offload_optimizer": offload != "none", "offload_param": offload == "parameters"}
    devices = {name: _at(file, f"zero_optimization.{name}.device") for name in ours}
    to_host = {
        name: ours[name] if device is None else device != "none" for name, device in devices.items()
    }
    meant = (
        "parameters"
        if to_host["offload_param"]
        else "optimizer"
        if to_host["offload_optimizer"]
        else "none"
    )
    cure = (
        f'set engine.offload={meant}, or "auto" in the file'
        if meant != offload
        else 'set "cpu" in the file'
    )
    for name, device in devices.items():
        path = f"zero_optimization.{name}.device"
        if device == "nvme":
            rule = "is not supported: checkpoints are written from memory"
            yield Contradiction(path, device, rule, 'set "cpu" in the file, and engine.offload')
        elif device not in (None, "none", "cpu"):
            yield Contradiction(
                path,
                device,
                "is not a device that DeepSpeed knows",
                'set "cpu" or "none" in the file',
            )
        elif to_host[name] != ours[name]:
            yield Contradiction(path, device, f"contradicts engine.offload = {offload}", cure)


def _sizes(file: dict[str, Any], spec: "RunSpec") -> Iterator[Contradiction]:
    """Compare the numbers and switches that both the file and the settings have."""
    batch, engine, norm = spec.batch, spec.engine, spec.training.max_grad_norm
    tokens, pairs = "batch.max_tokens_per_microbatch", batch.micro_batch_size
    sides: dict[str, tuple[str, Any]] = {
        "gradient_clipping": ("training.max_grad_norm", norm),
        "train_batch_size": ("batch.global_batch_size", batch.global_batch_size),
        "train_micro_batch_size_per_gpu": (
            ("batch.micro_batch_size", pairs)
            if pairs
            else (tokens, batch.max_tokens_per_microbatch)
        ),
    }
    if engine.bucket_size is not None:
        sides["zero_optimization.reduce_bucket_size"] = ("engine.bucket_size", engine.bucket_size)
    if engine.overlap_comm is not None:
        sides["zero_optimization.overlap_comm"] = ("engine.overlap_comm", engine.overlap_comm)
    for path, (key, ours) in sides.items():
        in_file = _at(file, path)
        if in_file is not None and (
            in_file != (ours or 0) or key == tokens
        ):  # DeepSpeed's 0: no clipping
            yield Contradiction(
                path, in_file, f"contradicts {key} = {'null' if ours is None else ours}", AGREE
            )
    yield from _accumulation(file, spec)


def _accumulation(file: dict[str, Any], spec: "RunSpec") -> Iterator[Contradiction]:
    path, cluster = "gradient_accumulation_steps", spec.cluster
    in_file, ours = _at(file, path), spec.batch.grad_accum(cluster.max_workers)
    if in_file is None:
        return
    if ours is None or cluster.min_workers != cluster.max_workers:
        rule = "is derived from the batch and the number of ranks, or the lengths of pairs"
        yield Contradiction(path, in_file, rule, 'set "auto" in the file')
    elif in_file != ours:
        rule = (
            f"{cluster.max_workers} ranks with micro-batches of {spec.batch.micro_batch_size} "
            f"need {ours} for "
        )
        rule += f"batch.global_batch_size = {spec.batch.global_batch_size}"
        yield Contradiction(path, in_file, rule, f'set "auto" or {ours} in the file')


def _precision(file: dict[str, Any], spec: "RunSpec") -> Iterator[Contradiction]:
    switches = {name: _at(file, f"{name}.enabled") for name in ("bf16", "fp16")}
    on = [name for name, enabled in switches.items() if enabled]
    off = [name for name, enabled in switches.items() if enabled is False]
    rule = f"contradicts precision = {spec.precision}"
    if len(on) == 2:
        yield Contradiction(
            "fp16.enabled",
            switches["fp16"],
            "bf16.enabled is also true",
            "enable only one of the two",
        )
    elif on and on[0] != spec.precision:
        yield Contradiction(
            f"{on[0]}.enabled",
            switches[on[0]],
            rule,
            f'set precision={on[0]}, or "auto" in the file',
        )
    elif spec.precision in off:
        yield Contradiction(
            f"{spec.precision}.enabled", False, rule, 'set another precision, or "auto" in the file'
        )
    elif len(off) == 2 and spec.precision not in ("fp32", "tf32"):
        rule += ": with fp16.enabled = false it means fp32"
        yield Contradiction(
            "bf16.enabled", False, rule, 'set precision=fp32, or "auto" in the file'
        )
    sent = _at(file, "communication_data_type")
    if sent not in (None, "fp32") and spec.precision not in ("bf16", "fp16"):
        rule = f"would send gradients in {sent}, but precision is {spec.precision}"
        yield Contradiction(
            "communication_data_type", sent, rule, f"set precision=bf16, or {REMOVE}"
        )


def _loss_scale(file: dict[str, Any], spec: "RunSpec") -> Iterator[Contradiction]:
    if spec.precision != "fp16":
        return
    for name, may_be in LOSS_SCALE.items():
        value = _at(file, f"fp16.{name}")
        if value is not None and value not in may_be:
            rule = (
                "all engines use the same loss scale: it starts at 65536, halves at each "
                "overflow and doubles "
            )
            yield Contradiction(
                f"fp16.{name}", value, rule + "after 2000 steps without one", REMOVE
            )


def _optimizer(file: dict[str, Any], spec: "RunSpec") -> Iterator[Contradiction]:
    ours, kind = spec.optimizer, _at(file, "optimizer.type")
    params: dict[str, Any] = dict(_block(file, "optimizer.params"))
    params.pop("torch_adam", None)  # selects the implementation, which optimizer.name decides
    decays_weights = (
        params.pop("adam_w_mode", True) is not False
    )  # DeepSpeed's Adam is AdamW by default
    last = ours.name.replace(":", ".").rpartition(".")[2]
    last = DEEPSPEEDS_OWN.get(last, last)
    if kind is not None:
        same = {"adam": "adamw" if decays_weights else "adam", "adamw": "adamw"}
        meant, has = str(kind).lower(), last.lower()
        is_adam = not ours.weight_decay and {meant, has} <= same.keys()  # the same without decay
        if same.get(meant, meant) != has and not is_adam:
            yield Contradiction(
                "optimizer.type", kind, f"contradicts optimizer.name = {ours.name}", AGREE
            )
    for name, in_file in params.items():
        own = name in ("lr", "weight_decay")
        value = getattr(ours, name) if own else ours.kwargs.get(name, OPTIMIZER_DEFAULTS.get(name))
        value = list(value) if isinstance(value, tuple) else value
        if in_file not in (AUTO, None, value):
            key = f"optimizer.{name}" if own else f"optimizer.kwargs.{name}"
            rule = f"contradicts {key} = {'(not set)' if value is None else value}"
            yield Contradiction(f"optimizer.params.{name}", in_file, rule, AGREE)


def _schedule(file: dict[str, Any], spec: "RunSpec") -> Iterator[Contradiction]:
    kind, name = _at(file, "scheduler.type"), spec.scheduler.name
    for param, value in _block(file, "scheduler.params").items():
        if value not in (AUTO, None):
            cure = (
                'set "auto" in the file, and set scheduler.warmup_steps, '
                "scheduler.kwargs or optimizer.lr"
            )
            yield Contradiction(
                f"scheduler.params.{param}", value, "the settings define the schedule", cure
            )
    same = SCHEDULES.get(str(kind), ())
    if kind is not None and name not in same:
        cure = f"set scheduler.name={same[0]}, or " if same else ""
        rule = f"contradicts scheduler.name = {name}"
        yield Contradiction(
            "scheduler.type", kind, rule, f"{cure}remove the block scheduler from the file"
        )
