"""TRL, an fp64 computation and the product on the same steps, and how far they are apart."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orchestrator.settings.run import RunSpec
from orchestrator.training import worker
from orchestrator.training.rundir import RunDir
from orchestrator.training.session import LocalSession
from orchestrator.world import World
from support.run_files import metric_lines, without_times
from support.tiny_settings import tiny_spec
from support.trl_trainer import trl_trainer

STEPS, PAIRS, BETA = 5, 8, 0.1
MAX_LENGTH = 40  # tokens; two of the sequences are longer
# Weights this large give gradients, and Adam a rate, at which five steps of correct fp32 arithmetic
# stay within a fifth of TOLERANCE, while the losses fall to a quarter and the gradient norms from
# above the limit of clipping to below it. With weights of 0.2, at a quarter of this rate, the
# rounding of the model's own fp32 arithmetic already grows to 1.5e-6 in our rewards and to 2.3e-6
# in TRL's: no program of that precision could be held to 1e-6 there.
LR, INITIALIZER_RANGE = 2e-3, 0.1
TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-4
METRICS = [
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
    "num_tokens",
    "grad_norm",
    "learning_rate",
]
Trace = list[dict[str, float]]  # the metrics of each step
Row = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A model to train, and how."""

    model_type: str
    tied: bool
    weight_decay: float = 0.0


KINDS = {
    "qwen2": Kind("qwen2", tied=False),
    "qwen2_tied": Kind("qwen2", tied=True),
    "llama": Kind("llama", tied=False, weight_decay=0.1),  # norms are not decayed, by TRL neither
}


@dataclass(frozen=True)
class Case:
    """A model saved to a folder, with TRL's prepared rows, its five steps and first gradient."""

    kind: Kind
    folder: Path
    trl_rows: list[Row]  # token ids, by TRL's tokenisation
    trl_trace: Trace
    trl_gradient: dict[str, torch.Tensor]
    exact_trace: Trace
    exact_gradient: dict[str, torch.Tensor]

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def spec(self, name: str, **blocks: Any) -> RunSpec:
        """Settings of a run of ours on the same pairs; keyword arguments are merged block by
        block.
        """
        ours: dict[str, dict[str, Any]] = {
            "run": {"dir": str(self.folder / name), "name": name},  # a cache of its own
            "model": {"init": None, "path": str(self.model)},
            "data": {
                "train": str(self.folder / "pairs.jsonl"),
                "eval": None,
                "max_length": MAX_LENGTH,
            },
            "dpo": {"beta": BETA},
            "batch": {"global_batch_size": PAIRS, "micro_batch_size": PAIRS},
            "optimizer": {"lr": LR, "weight_decay": self.kind.weight_decay},
            "training": {"max_steps": STEPS, "logging_steps": 1, "max_grad_norm": 1.0},
        }
        merged = {
            key: {**ours.get(key, {}), **block}
            for key, block in blocks.items()
            if isinstance(block, dict)
        }
        return tiny_spec(self.folder, **{**ours, **blocks, **merged})


def ours(spec: RunSpec) -> Trace:
    """The metrics of each step, from metrics.jsonl of a run in this process."""
    run_dir = RunDir(spec.run_dir)
    run_dir.begin(spec)
    with kept_signals():
        worker.run(spec, World(0, 1, 0, torch.device("cpu")), LocalSession(run_dir, 0))
    return [without_times(line) for line in metric_lines(run_dir.path) if "loss" in line]


@contextmanager
def kept_signals() -> Iterator[None]:
    """A LocalSession takes SIGINT and SIGTERM, which are pytest's."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exact_norm(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    """RMSNorm without the cast to fp32 that transformers makes whatever the model's type."""
    return (
        norm.weight
        * hidden
        * (hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    )


def exact_model(path: Path) -> Any:
    """The saved model, all of it in fp64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(exact_norm, module)
    return model


def exact_terms(model: Any, rows: list[Row], side: str) -> tuple[torch.Tensor, dict[str, float]]:
    """Return log-probs [pairs] of one side of all pairs, and sums over tokens.

    Each sequence alone: no padding.
    """
    totals, sums = [], {"tokens": 0.0, "fed": 0.0, "logits": 0.0, "entropy": 0.0, "top1": 0.0}
    for row in rows:
        ids = torch.tensor(row["prompt_ids"] + row[side])[:MAX_LENGTH]
        logits = model(input_ids=ids[None]).logits[0, len(row["prompt_ids"]) - 1 : -1]
        labels = ids[len(row["prompt_ids"]) :]
        log_probs = logits.log_softmax(-1)
        totals.append(log_probs[torch.arange(len(labels)), labels].sum())
        sums["tokens"] += len(labels)
        sums["fed"] += len(ids)
        sums["logits"] += float(logits.detach().mean(-1).sum())
        sums["entropy"] -= float((log_probs.exp() * log_probs).detach().sum())
        sums["top1"] += int((logits.argmax(-1) == labels).sum())
    return torch.stack(totals), sums


def exact_steps(
    model: Any,
    rows: list[Row],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    beta: float = BETA,
    pairs: int = PAIRS,
) -> tuple[Trace, dict[str, torch.Tensor]]:
    """Five steps of DPO as the paper writes it: their metrics, and the gradient of the first before
    clipping.

    Other than the true `beta` and `pairs`, the divisor of the loss, are for showing that a wrong
    one is noticed.
    """
    trace: Trace = []
    gradient: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        ref_chosen, ref_rejected = (
            exact_terms(model, rows, side)[0] for side in ("chosen_ids", "rejected_ids")
        )
    for step in range(STEPS):
        logps_chosen, chosen = exact_terms(model, rows, "chosen_ids")
        logps_rejected, rejected = exact_terms(model, rows, "rejected_ids")
        r_chosen, r_rejected = (
            beta * (logps_chosen - ref_chosen),
            beta * (logps_rejected - ref_rejected),
        )
        loss = (1 + (r_rejected - r_chosen).exp()).log().sum() / pairs
        loss.backward()
        gradient = gradient or {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        line = {
            "loss": loss,
            "rewards/chosen": r_chosen.mean(),
            "rewards/rejected": r_rejected.mean(),
            "rewards/accuracies": (r_chosen > r_rejected).double().mean(),
            "rewards/margins": (r_chosen - r_rejected).mean(),
            "logps/chosen": logps_chosen.mean(),
            "logps/rejected": logps_rejected.mean(),
            "logits/chosen": chosen["logits"] / chosen["tokens"],
            "logits/rejected": rejected["logits"] / rejected["tokens"],
            "entropy": (chosen["entropy"] + rejected["entropy"])
            / (chosen["tokens"] + rejected["tokens"]),
            "mean_token_accuracy": chosen["top1"] / chosen["tokens"],
            "num_tokens": (chosen["fed"] + rejected["fed"]) * (step + 1),
            "grad_norm": norm,
            "learning_rate": scheduler.get_last_lr()[0],
        }
        trace.append({name: float(value) for name, value in line.items()})
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return trace, gradient


def exact_adam(
    path: Path, rows: list[Row], weight_decay: float = 0.0, **wrong: Any
) -> tuple[Trace, dict[str, torch.Tensor]]:
    """`exact_steps` by AdamW with a rate that falls linearly to 0."""
    model = exact_model(path)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: max(0, STEPS - step) / STEPS
    )
    return exact_steps(model, rows, optimizer, scheduler, **wrong)


def trl_side(
    folder: Path, path: Path, tokenizer: Any, rows: list[Row], kind: Kind
) -> tuple[list[Row], Trace, dict[str, torch.Tensor]]:
    """TRL's prepared rows, its five steps, and its first gradient."""
    from transformers import AutoModelForCausalLM

    trainer = trl_trainer(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        tokenizer,
        rows,
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=PAIRS,
        learning_rate=LR,
        weight_decay=kind.weight_decay,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        beta=BETA,
        max_length=MAX_LENGTH,
    )
    trainer.model.train()
    inputs = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    trainer.compute_loss(trainer.model, inputs).backward()
    gradient = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    for metrics in trainer._metrics.values():
        metrics.clear()
    trainer._total_train_tokens = 0  # that batch was ours to look at, not part of training
    trainer.train()
    return (
        list(trainer.train_dataset),
        [line for line in trainer.state.log_history if "loss" in line],
        gradient,
    )


def disagreements(
    left: Trace, right: Trace, tolerance: float, slack: Trace | None = None
) -> list[str]:
    """Where two traces differ by more than tolerance * max(1, |value|), beyond how far `slack` is
    from `right`.
    """
    if len(left) != STEPS or len(right) != STEPS:
        return [f"{len(left)} and {len(right)} steps"]
    values = []
    for step in range(STEPS):
        for name in METRICS:
            a, b = left[step][name], right[step][name]
            allowed = tolerance * max(1.0, abs(b)) + (abs(slack[step][name] - b) if slack else 0.0)
            if not abs(a - b) <= allowed:  # so that a NaN disagrees
                values.append(
                    f"step {step + 1} {name}: {a!r} and {b!r}, apart {abs(a - b):.1e} > "
                    f"{allowed:.1e}"
                )
    return values


def worst(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The largest relative L2 distance of any tensor."""
    assert left.keys() == right.keys()
    return max(
        float((left[n].double() - right[n]).norm() / right[n].double().norm()) for n in right
    )
