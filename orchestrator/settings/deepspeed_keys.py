"""Keys of a DeepSpeed config: features that are not supported, removed keys, and known blocks."""

from typing import NamedTuple

REMOVE = "remove it from the file"


class Feature(NamedTuple):
    """A DeepSpeed feature that is not supported: it would change results, or the work of code
    outside the engine.
    """

    why: str
    cure: str = REMOVE
    may_be: tuple[object, ...] = ()
    """Values that have no effect; when empty, those that switch it off."""


_COUNTED = "the loss is divided once, by the count of the global batch"
_ZERO_PLUS_PLUS = "sends weights or gradients in fewer bits, or stores weights twice"
_CPU_ADAM = "needs DeepSpeed's own optimizer, with part of its state on the device"
_BATCHES = "only run.seed decides which pairs are in a step"
FEATURES = {
    "activation_checkpointing": Feature(
        "works only with models that call it",
        "set training.gradient_checkpointing=true, and remove it from the file",
    ),
    "bfloat16": Feature("was renamed", 'use "bf16"'),
    "compile": Feature("compiles other hooks into the model"),
    "data_efficiency": Feature(_BATCHES),
    "data_types.buffer_dtype": Feature("buffers keep their dtype"),
    "data_types.grad_accum_dtype": Feature(
        "gradients are added in fp32, or bf16 to save memory", may_be=("fp32", "bf16")
    ),
    "data_types.keep_in_fp32_modules": Feature("precision decides what computes in 16 bits"),
    "data_types.param_dtype": Feature(
        "precision decides it", "set precision, and remove it from the file"
    ),
    "dataloader_drop_last": Feature("every pair is used once per epoch"),
    "expert_parallel": Feature("expert parallelism is not supported; only ZeRO shards experts"),
    "fp16.auto_cast": Feature("precision decides what is computed in 16 bits"),
    "fp16.fp16_master_weights_and_grads": Feature(
        "the weights that the optimizer updates are kept in fp32"
    ),
    "bf16.bf16_master_weights_and_grads": Feature(
        "the weights that the optimizer updates are kept in fp32"
    ),
    "bf16.bf16_optimizer_states": Feature("the state of the optimizer is kept in fp32"),
    "bf16.check_grad_overflow": Feature(
        "a gradient that is not finite is never applied", may_be=(True,)
    ),
    "gradient_allreduce_op": Feature(_COUNTED, may_be=("mean",)),
    "gradient_predivide_factor": Feature(_COUNTED, may_be=(1,)),
    "hybrid_engine": Feature("no text is generated during training"),
    "managed_gradient_accumulation": Feature(
        "the trainer tells the engine which micro-batch is the last", may_be=(True,)
    ),
    "pipeline": Feature("pipeline parallelism is not supported"),
    "prescale_gradients": Feature(_COUNTED),
    "sequence_parallel_size": Feature("sequence parallelism is not supported", may_be=(1,)),
    "tensor_parallel.autotp_size": Feature(
        "tensor parallelism is not supported; only ZeRO shards layers", may_be=(0, 1)
    ),
    "torch_autocast": Feature(
        "precision decides it", "set precision=bf16, and remove it from the file"
    ),
    "wandb": Feature(
        "the run reports to W&B itself", "use the block wandb, and remove it from the file"
    ),
    "weight_quantization": Feature("trainable weights are not quantised"),
    "zero_force_ds_cpu_optimizer": Feature(
        "optimizer.name decides which optimizer runs",
        "set it to false, and, for DeepSpeed's, optimizer.name=deepspeed.ops.adam.DeepSpeedCPUAdam",
    ),
    "zero_optimization.cpu_offload": Feature(
        "was renamed", 'use "offload_optimizer": {"device": "cpu"}'
    ),
    "zero_optimization.cpu_offload_param": Feature(
        "was renamed", 'use "offload_param": {"device": "cpu"}'
    ),
    "zero_optimization.legacy_stage1": Feature("shards the state in another layout"),
    "zero_optimization.offload_optimizer.ratio": Feature(_CPU_ADAM, may_be=(1,)),
    "zero_optimization.offload_optimizer.super_offload": Feature(_CPU_ADAM),
    "zero_optimization.zenflow": Feature("delays part of the gradient by some steps"),
    "zero_optimization.zero_hpz_partition_size": Feature(_ZERO_PLUS_PLUS, may_be=(0, 1)),
    "zero_optimization.zero_quantized_gradients": Feature(_ZERO_PLUS_PLUS),
    "zero_optimization.zero_quantized_nontrainable_weights": Feature(_ZERO_PLUS_PLUS),
    "zero_optimization.zero_quantized_weights": Feature(_ZERO_PLUS_PLUS),
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
