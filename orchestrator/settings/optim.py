"""The blocks optimizer and scheduler, and the optimizers that each engine computes exactly."""

import math
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from orchestrator.settings.base import Block, NonNegative, check_user_code
from orchestrator.settings.engine import EngineSpec
from orchestrator.settings.errors import UserError
from orchestrator.settings.near import folded, nearest

OptimizerKind = Literal["elementwise", "whole", "unknown"]
# Optimizers whose update of an element reads only that element: they stay exact however the state
# is sharded.
# of torch.optim
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
]
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
# transformers' names of schedules that need no metric, and "wsd" for short
SchedulerName = Literal[
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
    "wsd",
]

# Schedules of torch and transformers that cannot be used: rule and fix, by the last part.
_NEEDS_METRIC = (
    "needs a metric at every step",
    "use linear, cosine or another that needs only the step",
)
_IN_PYTHON = "pass it from Python: train(spec, optimizers=(None, optimizer -> schedule))"
USELESS_SCHEDULERS = {
    **dict.fromkeys(
        ("ReduceLROnPlateau", "reduce_lr_on_plateau", "greedy", "GreedyLR"), _NEEDS_METRIC
    ),
    **dict.fromkeys(
        ("SequentialLR", "ChainedScheduler"), ("needs other schedulers as arguments", _IN_PYTHON)
    ),
    **dict.fromkeys(
        ("LambdaLR", "MultiplicativeLR"), ("needs a function as an argument", _IN_PYTHON)
    ),
}
SET_ELSEWHERE = {
    "num_warmup_steps": ("has its own setting", "set scheduler.warmup_steps instead"),
    "num_training_steps": ("is always the length of the run", "remove it"),
    "last_epoch": ("is restored from a checkpoint", "remove it"),
}
"""Arguments of schedules that scheduler.kwargs cannot set: rule and fix."""


class OptimizerSpec(Block):
    """The optimizer; its state is sharded over the ranks."""

    name: str = "torch.optim.AdamW"
    """Dotted name. With every engine: the elementwise optimizers of torch.optim (AdamW, SGD, ...),
    whose state resumes with any engine and number of ranks. With ddp: torch.optim.Muon and
    Adafactor, and those of bitsandbytes.optim (AdamW8bit, PagedAdamW32bit, ...). With deepspeed:
    FusedAdam and DeepSpeedCPUAdam of deepspeed.ops.adam. With ddp and engine.shard_optimizer=false:
    your own, as module:attr.
    """
    lr: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of matrices, multiplied by the learning rate; norms and biases are never
    decayed.
    """
    kwargs: dict[str, Any] = {}
    """Further keyword arguments of the optimizer, for example {momentum: 0.9}."""

    @property
    def compiles_kernels(self) -> bool:
        """Return whether building it compiles kernels, which takes minutes without a GPU."""
        return self.name.startswith("deepspeed.")

    @property
    def is_elementwise(self) -> bool:
        """Return whether its state can be split anywhere, and resumed at any world size."""
        return optimizer_kind(self.name) == "elementwise"

    def check(self) -> None:
        """Check that the optimizer is known, and that no argument has its own setting."""
        if ":" in self.name:
            check_user_code("optimizer.name", self.name)
        else:
            _check_known_optimizer(self.name)
        for key in {"lr", "weight_decay"} & self.kwargs.keys():
            rule, cure = "has its own setting", f"set optimizer.{key} instead"
            raise UserError(f"optimizer.kwargs.{key}", self.kwargs[key], rule, cure)


class SchedulerSpec(Block):
    """The learning rate as a function of the optimizer steps actually taken."""

    name: str = "linear"
    """linear, cosine, constant, cosine_with_min_lr, wsd (warmup_stable_decay) or another schedule
    of transformers, or the dotted name of a torch scheduler (torch.optim.lr_scheduler.StepLR).
    """
    warmup_steps: NonNegative = 0
    """Optimizer steps of linear warm-up, for the schedules of transformers."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Warm-up as a fraction of all steps, rounded up."""
    kwargs: dict[str, Any] = {}
    """Keyword arguments of the schedule: {min_lr_rate: 0.1}, {num_decay_steps: 100}, {step_size:
    30, gamma: 0.1}.
    """

    def warmup(self, total_steps: int) -> int:
        """Return the warm-up steps in a run of `total_steps`."""
        return (
            self.warmup_steps
            if self.warmup_ratio is None
            else math.ceil(self.warmup_ratio * total_steps)
        )

    def check(self) -> None:
        """Check that the schedule is known, and uses each setting that is set."""
        _check_known_schedule(self.name)
        _check_warmup(self)
        without = ("linear", "constant", "constant_with_warmup")
        if self.name in without and self.kwargs:
            rule = f"{self.name} has no arguments"
            raise UserError("scheduler.kwargs", self.kwargs, rule, "remove scheduler.kwargs")
        for key in SET_ELSEWHERE.keys() & self.kwargs.keys():
            raise UserError(f"scheduler.kwargs.{key}", self.kwargs[key], *SET_ELSEWHERE[key])


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


def _check_known_optimizer(name: str) -> None:
    module, _, last = name.rpartition(".")
    if last in OPTIMIZERS.get(module, ()) or name in USELESS_OPTIMIZERS:
        return
    homes = ((home, end) for home, ends in OPTIMIZERS.items() for end in ends)
    dotted = {end: f"{home}.{end}" for home, end in homes if module in ("", home)}
    near = nearest(last, dotted)
    meant = TRL_OPTIMIZERS.get(folded(name)) or (dotted[near] if near else "")
    rule = "is neither a supported optimizer of torch, bitsandbytes or deepspeed nor a module:attr"
    cure = "use one of torch.optim." + ", ".join(ELEMENTWISE_OPTIMIZERS)
    raise UserError("optimizer.name", name, rule, f"did you mean {meant}?" if meant else cure)


def check_optimizer(key: str, name: str, engine: EngineSpec) -> None:
    """Check that an optimizer computes exactly under an engine.

    key: the setting or argument that names the optimizer. name: dotted name, or module:attr.

    Raises:
        UserError: the engine would change its results.
    """
    module, _, last = name.rpartition(".")
    adamw = "use torch.optim.AdamW"
    if name in USELESS_OPTIMIZERS:
        raise UserError(key, name, USELESS_OPTIMIZERS[name], adamw)
    if module == "deepspeed.ops.adam" and engine.kind != "deepspeed":
        cure = f"set engine.kind=deepspeed, or {adamw}"
        raise UserError(key, name, "works only under deepspeed", cure)
    _check_shards(key, name, engine)
    if last == "DeepSpeedCPUAdam" and engine.offload == "none":
        rule, cure = "updates weights in host memory", "set engine.offload=optimizer"
        raise UserError(key, name, rule, f"{cure}, or use deepspeed.ops.adam.FusedAdam")
    if last == "FusedAdam" and engine.offload != "none":
        rule = f"updates weights on the GPU, but engine.offload is {engine.offload}"
        cure = "use deepspeed.ops.adam.DeepSpeedCPUAdam or torch.optim.AdamW"
        raise UserError(key, name, rule, cure)


def _check_shards(key: str, name: str, engine: EngineSpec) -> None:
    """Check that an optimizer computes exactly on the part of a parameter that a rank holds."""
    kind, is_whole = optimizer_kind(name), engine.traits.keeps_parameters_whole
    cure = "set engine.kind=ddp, or use torch.optim.AdamW"
    if kind == "unknown" and (not is_whole or engine.deals_parameters):
        rule = "is user code, which may need more than the shard that a rank holds"
        cure = "set engine.kind=ddp and engine.shard_optimizer=false"
        raise UserError(key, name, rule, cure)
    if kind == "whole" and not is_whole:
        rule = f"works on whole matrices, and under {engine.kind} a rank holds only some rows of "
        rule += "each"
        if name.startswith("bitsandbytes."):
            rule = f"keeps its state in 8-bit blocks or pages, which the shards of {engine.kind} "
            rule += "would split"
        elif engine.kind == "deepspeed":
            rule = "works on matrices, which deepspeed flattens into one vector: it would "
            rule += "raise" if name.endswith(".Muon") else "silently compute something else"
        raise UserError(key, name, rule, cure)
    if name == "torch.optim.Adagrad" and engine.kind == "deepspeed":
        rule = "is rebuilt by deepspeed with one parameter group, so norms and biases would be "
        cure = "set engine.kind=ddp or fsdp, or use torch.optim.AdamW"
        raise UserError(key, name, f"{rule}decayed", cure)


def _check_known_schedule(name: str) -> None:
    last, key = name.rpartition(".")[2], "scheduler.name"
    if last in USELESS_SCHEDULERS:
        raise UserError(key, name, *USELESS_SCHEDULERS[last])
    names = get_args(SchedulerName)
    if name not in names and not name.startswith("torch.optim.lr_scheduler."):
        ending = f"torch.optim.lr_scheduler.{last}" if last.endswith("LR") else ""
        meant = nearest(name, names) or ending
        rule = "is neither a schedule of transformers nor a torch.optim.lr_scheduler.NAME"
        cure = f"did you mean {meant}?" if meant else "use one of " + ", ".join(names)
        raise UserError(key, name, rule, cure)


def _check_warmup(scheduler: SchedulerSpec) -> None:
    steps, ratio = scheduler.warmup_steps, scheduler.warmup_ratio
    if steps and ratio is not None:
        rule = f"scheduler.warmup_steps ({steps}) is also set"
        raise UserError("scheduler.warmup_ratio", ratio, rule, "remove one of the two")
    key, value = ("warmup_steps", steps) if ratio is None else ("warmup_ratio", ratio)
    if value and scheduler.name.startswith("torch.optim.lr_scheduler."):
        rule = f"is not used by {scheduler.name}"
        cure = "remove it, or use linear, cosine or constant"
        raise UserError(f"scheduler.{key}", value, rule, cure)
