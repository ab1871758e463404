"""Note settings that are allowed but unusual, one line each, for `plan` and the start of a run."""

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
    rules = (_learning, _steps, _epochs, _models, _data)
    return [line for rule in rules for line in rule(spec, known)]


def _line(key: str, value: object, what: str, fix: str) -> str:
    return f"{key} = {value}: {what}; {fix}"


def _learning(spec: RunSpec, known: Known) -> Iterator[str]:
    name, lr, beta = spec.optimizer.name, spec.optimizer.lr, spec.dpo.beta
    highest = HIGHEST_LR.get(name.rpartition(".")[2], HIGHEST_LR_OF_ADAM)
    if lr > highest and ":" not in name:
        yield _line("optimizer.lr", f"{lr:g}", f"is very high for {name}", TYPICAL_LR)
    if lr < LOWEST_LR:
        what = "is so low that fp32 weights hardly change"
        yield _line("optimizer.lr", f"{lr:g}", what, TYPICAL_LR)
    is_per_token = any(traits.beta_is_per_token for traits in spec.dpo.traits)
    if not ODD_BETA[0] <= beta <= ODD_BETA[1] and not is_per_token:
        what = "the policy can hardly leave the reference"
        if beta < 1:
            what = "the reference hardly constrains the policy"
        yield _line("dpo.beta", f"{beta:g}", what, "usual values are 0.01 to 1")
    smoothing = spec.dpo.label_smoothing
    if smoothing >= 0.5 and "exo_pair" not in spec.dpo.loss_types:
        what = "assumes that at least half of all labels are wrong"
        yield _line("dpo.label_smoothing", smoothing, what, "usual values are 0 to 0.3")


def _steps(spec: RunSpec, known: Known) -> Iterator[str]:
    """Yield notes on warm-up and intervals that are longer than the run."""
    if known.steps is None:
        return
    steps, run = known.steps, f"the run has {counted(known.steps, 'step')}"
    warmup = spec.scheduler.warmup(steps)
    if warmup >= steps and warmup > 1:
        name = "warmup_steps" if spec.scheduler.warmup_ratio is None else "warmup_ratio"
        what = f"{run} and ends during the warm-up, before it reaches optimizer.lr"
        fix = f"lower it, for example scheduler.warmup_steps={steps // 10}"
        yield _line(f"scheduler.{name}", getattr(spec.scheduler, name), what, fix)
    for key, every, effect in _intervals(spec):
        if every is not None and every > steps:
            yield _line(key, every, f"{run}: {effect}", f"set it to {steps} or less")


def _epochs(spec: RunSpec, known: Known) -> Iterator[str]:
    """Yield notes on very many epochs, and on very few steps in each."""
    if known.epochs is not None and known.epochs > MANY_EPOCHS:
        what = f"every pair is seen {known.epochs:.4g} times, and DPO overfits after a few epochs"
        name = "epochs" if spec.training.max_steps is None else "max_steps"
        fix = "watch the evaluation, or train less"
        yield _line(f"training.{name}", getattr(spec.training, name), what, fix)
    size = spec.batch.global_batch_size
    if known.pairs is not None and size > known.pairs:
        what = f"an epoch has {counted(known.pairs, 'pair')}, so each step uses all of them"
        yield _line("batch.global_batch_size", size, what, "lower it for more than one step")


def _intervals(spec: RunSpec) -> Iterator[tuple[str, int | None, str]]:
    """Yield (setting, its interval in steps, effect of an interval longer than the run)."""
    effect = "only the last training step is logged"
    yield "training.logging_steps", spec.training.logging_steps, effect
    effect = "evaluation runs only before and after training"
    yield "evaluation.every_steps", spec.evaluation.every_steps, effect
    yield "checkpoint.every_steps", spec.checkpoint.every_steps, "the only checkpoint is the last"
    yield "reference.sync_every", spec.reference.sync_every, "the reference is never updated"


def _models(spec: RunSpec, known: Known) -> Iterator[str]:
    reference, resources = spec.reference, spec.cluster.resources
    if spec.model.lora is not None and reference.traits.is_copy and reference.path is None:
        what = "with model.lora each rank stores the frozen base twice"
        fix = "reference.kind=adapter_off is as exact and needs no copy"
        yield _line("reference.kind", reference.kind, what, fix)
    longest, positions = spec.data.max_length or 0, known.positions
    if positions is not None and longest > positions:
        what = f"the model has {positions} positions, and a longer row is an error"
        yield _line("data.max_length", longest, what, f"set it to {positions} or less")
    if known.gpus == 0 and resources.get("GPU"):
        what = "this machine has no GPU, so debug trains on the CPU"
        fix = "use train or submit where the GPUs are"
        yield _line("cluster.resources", resources, what, fix)


def _data(spec: RunSpec, known: Known) -> Iterator[str]:
    trained = {_place(source, "train"): key for key, source in spec.data.sources("train").items()}
    for key, source in spec.data.sources("eval").items():
        if (same := trained.get(_place(source, "test"))) is not None:
            what = f"is also the source of {same}, so its loss does not measure generalisation"
            yield _line(key, source.path, what, "set data.eval_fraction=0.05 instead")
    fraction = spec.data.eval_fraction or 0
    if fraction > 0.5:
        what = "more pairs are held out than trained on"
        yield _line("data.eval_fraction", fraction, what, "usual values are 0.01 to 0.1")


def _place(source: SourceSpec, default_split: str) -> tuple[str, str | None, str | None]:
    """Return a key that identifies a source: (path, name, split); a file has no splits."""
    path = os.path.realpath(source.path)
    if os.path.isfile(path):
        return path, None, None
    return path if os.path.exists(path) else source.path, source.name, source.split or default_split
