"""Notes on settings that are allowed but unusual, one line each; `plan` and the start of a run
print them.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

from orchestrator.settings.counts import counted
from orchestrator.settings.data import SourceSpec
from orchestrator.settings.run import RunSpec

# Highest usual learning rate, by the last part of the optimizer's name; optimizers not listed are
# like Adam.
HIGHEST_LR = {
    "SGD": 10.0,
    "ASGD": 10.0,
    "Adadelta": 10.0,
    "Rprop": 10.0,
    "Adagrad": 1.0,
    "Muon": 1.0,
    "Adafactor": 0.1,
}
HIGHEST_LR_OF_ADAM, LOWEST_LR = 1e-2, 1e-10
TYPICAL_LR = "usual values for DPO with AdamW are 1e-7 to 1e-5, with model.lora up to 1e-4"
ODD_BETA = (1e-3, 5.0)
MANY_EPOCHS = 10


class Known(NamedTuple):
    """Facts about a run besides its settings; None for those not known yet."""

    steps: int | None = None
    pairs: int | None = None  # in an epoch
    epochs: float | None = None
    positions: int | None = None  # of the model
    gpus: int | None = None  # on this machine


def notes(spec: RunSpec, known: Known) -> list[str]:
    """Return a line, `key = value: what is unusual; fix`, for each unusual setting."""
    return [line for rule in (_learning, _length, _models, _data) for line in rule(spec, known)]


def _line(key: str, value: object, what: str, fix: str) -> str:
    return f"{key} = {value}: {what}; {fix}"


def _learning(spec: RunSpec, known: Known) -> Iterator[str]:
    name, lr, beta = spec.optimizer.name, spec.optimizer.lr, spec.dpo.beta
    highest = HIGHEST_LR.get(name.rpartition(".")[2], HIGHEST_LR_OF_ADAM)
    if lr > highest and ":" not in name:
        yield _line("optimizer.lr", f"{lr:g}", f"is very high for {name}", TYPICAL_LR)
    if lr < LOWEST_LR:
        yield _line(
            "optimizer.lr", f"{lr:g}", "is so low that fp32 weights hardly change", TYPICAL_LR
        )
    is_per_token = any(traits.beta_is_per_token for traits in spec.dpo.traits)
    if not ODD_BETA[0] <= beta <= ODD_BETA[1] and not is_per_token:
        how = (
            "the reference hardly constrains the policy"
            if beta < 1
            else "the policy can hardly leave the reference"
        )
        yield _line("dpo.beta", f"{beta:g}", how, "usual values are 0.01 to 1")
    if spec.dpo.label_smoothing >= 0.5 and "exo_pair" not in spec.dpo.loss_types:
        what = "assumes that at least half of all labels are wrong"
        yield _line(
            "dpo.label_smoothing", spec.dpo.label_smoothing, what, "usual values are 0 to 0.3"
        )


def _length(spec: RunSpec, known: Known) -> Iterator[str]:
    steps = known.steps
    if steps is not None:
        warmup = spec.scheduler.warmup(steps)
        if warmup >= steps and warmup > 1:
            key = (
                "scheduler.warmup_steps"
                if spec.scheduler.warmup_ratio is None
                else "scheduler.warmup_ratio"
            )
            value = getattr(spec.scheduler, key.rpartition(".")[2])
            what = (
                f"the run has {counted(steps, 'step')} and ends during the warm-up, before it "
                "reaches optimizer.lr"
            )
            yield _line(
                key, value, what, f"lower it, for example scheduler.warmup_steps={steps // 10}"
            )
        for key, every, what in _intervals(spec):
            if every is not None and every > steps:
                yield _line(
                    key,
                    every,
                    f"the run has {counted(steps, 'step')}: {what}",
                    f"set it to {steps} or less",
                )
    if known.epochs is not None and known.epochs > MANY_EPOCHS:
        what = f"every pair is seen {known.epochs:.4g} times, and DPO overfits after a few epochs"
        by_steps = spec.training.max_steps is not None
        key = "training.max_steps" if by_steps else "training.epochs"
        yield _line(
            key,
            getattr(spec.training, key.rpartition(".")[2]),
            what,
            "watch the evaluation, or train less",
        )
    if known.pairs is not None and spec.batch.global_batch_size > known.pairs:
        what = f"an epoch has {counted(known.pairs, 'pair')}, so each step uses all of them"
        yield _line(
            "batch.global_batch_size",
            spec.batch.global_batch_size,
            what,
            "lower it for more than one step",
        )


def _intervals(spec: RunSpec) -> Iterator[tuple[str, int | None, str]]:
    """Yield (setting, its interval in steps, effect of an interval longer than the run)."""
    yield (
        "training.logging_steps",
        spec.training.logging_steps,
        "only the last training step is logged",
    )
    yield (
        "evaluation.every_steps",
        spec.evaluation.every_steps,
        "evaluation runs only before and after training",
    )
    yield "checkpoint.every_steps", spec.checkpoint.every_steps, "the only checkpoint is the last"
    yield "reference.sync_every", spec.reference.sync_every, "the reference is never updated"


def _models(spec: RunSpec, known: Known) -> Iterator[str]:
    if (
        spec.model.lora is not None
        and spec.reference.kind == "copy"
        and spec.reference.path is None
    ):
        what = "with model.lora each rank stores the frozen base twice"
        yield _line(
            "reference.kind",
            "copy",
            what,
            "reference.kind=adapter_off is as exact and needs no copy",
        )
    if known.positions is not None and (spec.data.max_length or 0) > known.positions:
        what = f"the model has {known.positions} positions, and a longer row is an error"
        yield _line(
            "data.max_length", spec.data.max_length, what, f"set it to {known.positions} or less"
        )
    if known.gpus == 0 and spec.cluster.resources.get("GPU"):
        what = "this machine has no GPU, so debug trains on the CPU"
        yield _line(
            "cluster.resources",
            spec.cluster.resources,
            what,
            "use train or submit where the GPUs are",
        )


def _data(spec: RunSpec, known: Known) -> Iterator[str]:
    trained = {_place(source, "train"): key for key, source in spec.data.sources("train").items()}
    for key, source in spec.data.sources("eval").items():
        if (same := trained.get(_place(source, "test"))) is not None:
            what = f"is also the source of {same}, so its loss does not measure generalisation"
            yield _line(key, source.path, what, "set data.eval_fraction=0.05 instead")
    if (spec.data.eval_fraction or 0) > 0.5:
        what = "more pairs are held out than trained on"
        yield _line(
            "data.eval_fraction", spec.data.eval_fraction, what, "usual values are 0.01 to 0.1"
        )


def _place(source: SourceSpec, default_split: str) -> tuple[str, str | None, str | None]:
    """Return a key that identifies a source: (path, name, split); a file has no splits."""
    path = os.path.realpath(source.path)
    if os.path.isfile(path):
        return path, None, None
    return path if os.path.exists(path) else source.path, source.name, source.split or default_split
