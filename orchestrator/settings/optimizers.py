"""Which optimizers there are, by name, and under which engine the maths of each survives."""

from typing import Literal

from orchestrator.settings.spec import EngineSpec, UserError

OptimizerKind = Literal["elementwise", "whole", "unknown"]

# Optimizers whose update of an element reads that element alone: they stay exact however the state is sharded.
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
# By the module that they are named by; those beside the elementwise ones and DeepSpeed's read more of a parameter.
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
    "torch.optim.LBFGS": "needs a closure, and looks across all parameters, of which a rank has some",
    "torch.optim.SparseAdam": "takes sparse gradients only, and a language model's are dense",
}
# What TRL calls them.
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
    """What an optimizer, by its dotted name or module:attr, reads in order to update an element of a parameter.

    elementwise: that element alone, so that its state may be cut anywhere, and resumed by any engine at any world size.
    whole: more of the same parameter. unknown: code of a user's.
    """
    module, _, last = name.rpartition(".")
    if module == "deepspeed.ops.adam" or (module == "torch.optim" and last in ELEMENTWISE_OPTIMIZERS):
        return "elementwise"
    return "whole" if module in OPTIMIZERS else "unknown"


def check_optimizer(key: str, name: str, engine: EngineSpec) -> None:
    """Refuse an optimizer whose maths that engine would change.

    key: the setting, or argument, that it comes from. name: dotted, or module:attr.

    Raises:
        UserError: with the reason.
    """
    module, _, last = name.rpartition(".")
    kind, adamw = optimizer_kind(name), "take torch.optim.AdamW"
    if name in USELESS_OPTIMIZERS:
        raise UserError(key, name, USELESS_OPTIMIZERS[name], adamw)
    if module == "deepspeed.ops.adam" and engine.kind != "deepspeed":
        raise UserError(key, name, "is DeepSpeed's own", f"set engine.kind=deepspeed, or {adamw}")
    if kind == "unknown" and (engine.kind != "ddp" or engine.shard_optimizer):
        rule = "is code of yours, whose maths may need more than the shard that a rank holds"
        raise UserError(key, name, rule, "set engine.kind=ddp and engine.shard_optimizer=false")
    if kind == "whole" and engine.kind != "ddp":
        why = "works on whole matrices, and under fsdp a rank holds some rows of each"
        if module == "bitsandbytes.optim":
            why = f"keeps its state in blocks of 8 bits or in pages, which the shards of {engine.kind} would cut"
        elif engine.kind == "deepspeed":
            why = "works on matrices, and deepspeed makes one long vector of them: it would "
            why += "raise" if last == "Muon" else "silently compute something else"
        raise UserError(key, name, why, f"set engine.kind=ddp, or {adamw}")
    if name == "torch.optim.Adagrad" and engine.kind == "deepspeed":
        rule = "is made anew by deepspeed, with one group of weights, so that norms and biases would be decayed"
        raise UserError(key, name, rule, f"set engine.kind=ddp or fsdp, or {adamw}")
    if last == "DeepSpeedCPUAdam" and engine.offload == "none":
        rule, cure = "updates weights that lie in the host's memory", "set engine.offload=optimizer"
        raise UserError(key, name, rule, f"{cure}, or take deepspeed.ops.adam.FusedAdam")
    if last == "FusedAdam" and engine.offload != "none":
        rule = f"updates weights that lie on the GPU, and engine.offload is {engine.offload}"
        raise UserError(key, name, rule, "take deepspeed.ops.adam.DeepSpeedCPUAdam, or torch.optim.AdamW")
