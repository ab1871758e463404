"""Table of supported optimizers, and the engines under which each computes exactly."""

from typing import Literal

from orchestrator.settings.spec import EngineSpec, UserError

OptimizerKind = Literal["elementwise", "whole", "unknown"]

# Optimizers whose update of an element reads only that element: they stay exact however the state
# is sharded.
ELEMENTWISE_OPTIMIZERS = [
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
]  # of torch.optim
# By module. All but the elementwise ones and DeepSpeed's read more of a parameter than one element
# per update.
OPTIMIZERS: dict[str, list[str]] = {
    "torch.optim": [*ELEMENTWISE_OPTIMIZERS, "Muon", "Adafactor"],
    "bitsandbytes.optim": [
        "Adam8bit",
        "AdamW8bit",
        "PagedAdam8bit",
        "PagedAdamW8bit",
        "PagedAdamW32bit",
        "Lion8bit",
        "PagedLion8bit",
        "AdEMAMix8bit",
        "PagedAdEMAMix8bit",
    ],
    "deepspeed.ops.adam": ["FusedAdam", "DeepSpeedCPUAdam"],
}
USELESS_OPTIMIZERS = {
    "torch.optim.LBFGS": "needs a closure and reads all parameters, of which a rank holds only "
    "some",
    "torch.optim.SparseAdam": "works only on sparse gradients, and those of a language model are "
    "dense",
}
# TRL's names of optimizers.
TRL_OPTIMIZERS = {
    "adamw": "torch.optim.AdamW",
    "adamw_torch": "torch.optim.AdamW",
    "adamw_hf": "torch.optim.AdamW",
    "adamw_torch_fused": "torch.optim.AdamW with optimizer.kwargs={fused: true}",
    "adam": "torch.optim.Adam",
    "sgd": "torch.optim.SGD",
    "adagrad": "torch.optim.Adagrad",
    "rmsprop": "torch.optim.RMSprop",
    "adafactor": "torch.optim.Adafactor",
    "muon": "torch.optim.Muon",
    "adamw_8bit": "bitsandbytes.optim.AdamW8bit",
    "adamw_bnb_8bit": "bitsandbytes.optim.AdamW8bit",
    "paged_adamw": "bitsandbytes.optim.PagedAdamW32bit",
    "paged_adamw_32bit": "bitsandbytes.optim.PagedAdamW32bit",
    "paged_adamw_8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "lion_8bit": "bitsandbytes.optim.Lion8bit",
    "paged_lion_8bit": "bitsandbytes.optim.PagedLion8bit",
    "ademamix_8bit": "bitsandbytes.optim.AdEMAMix8bit",
    "paged_ademamix_8bit": "bitsandbytes.optim.PagedAdEMAMix8bit",
}


def optimizer_kind(name: str) -> OptimizerKind:
    """Return how much of a parameter an optimizer reads to update one element.

    name: dotted name, or module:attr.

    Returns: "elementwise": only that element, so its state can be split anywhere and resumed by any
        engine at any world size; "whole": more of the same parameter; "unknown": user code.
    """
    module, _, last = name.rpartition(".")
    if module == "deepspeed.ops.adam" or (
        module == "torch.optim" and last in ELEMENTWISE_OPTIMIZERS
    ):
        return "elementwise"
    return "whole" if module in OPTIMIZERS else "unknown"


def check_optimizer(key: str, name: str, engine: EngineSpec) -> None:
    """Check that an optimizer computes exactly under an engine.

    key: the setting or argument that names the optimizer. name: dotted name, or module:attr.

    Raises:
        UserError: the engine would change its results.
    """
    module, _, last = name.rpartition(".")
    kind, adamw = optimizer_kind(name), "use torch.optim.AdamW"
    if name in USELESS_OPTIMIZERS:
        raise UserError(key, name, USELESS_OPTIMIZERS[name], adamw)
    if module == "deepspeed.ops.adam" and engine.kind != "deepspeed":
        raise UserError(
            key, name, "works only under deepspeed", f"set engine.kind=deepspeed, or {adamw}"
        )
    if kind == "unknown" and (engine.kind != "ddp" or engine.shard_optimizer):
        rule = "is user code, which may need more than the shard that a rank holds"
        raise UserError(key, name, rule, "set engine.kind=ddp and engine.shard_optimizer=false")
    if kind == "whole" and engine.kind != "ddp":
        why = "works on whole matrices, and under fsdp a rank holds only some rows of each"
        if module == "bitsandbytes.optim":
            why = (
                f"keeps its state in 8-bit blocks or pages, which the shards of {engine.kind} "
                "would split"
            )
        elif engine.kind == "deepspeed":
            why = "works on matrices, which deepspeed flattens into one vector: it would "
            why += "raise" if last == "Muon" else "silently compute something else"
        raise UserError(key, name, why, f"set engine.kind=ddp, or {adamw}")
    if name == "torch.optim.Adagrad" and engine.kind == "deepspeed":
        rule = (
            "is rebuilt by deepspeed with one parameter group, so norms and biases would be decayed"
        )
        raise UserError(key, name, rule, f"set engine.kind=ddp or fsdp, or {adamw}")
    if last == "DeepSpeedCPUAdam" and engine.offload == "none":
        rule, cure = "updates weights in host memory", "set engine.offload=optimizer"
        raise UserError(key, name, rule, f"{cure}, or use deepspeed.ops.adam.FusedAdam")
    if last == "FusedAdam" and engine.offload != "none":
        rule = f"updates weights on the GPU, but engine.offload is {engine.offload}"
        raise UserError(
            key, name, rule, "use deepspeed.ops.adam.DeepSpeedCPUAdam or torch.optim.AdamW"
        )
