"""TRL, an fp64 computation and the product on one case, and the table of their distances."""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
)

sys.path.insert(0, str(Path(__file__).parent.parent))

from orchestrator.settings.loss import DpoSpec
from orchestrator.settings.model import AttentionName
from orchestrator.settings.precision import Precision
from orchestrator.training.assemble import assembled
from orchestrator.training.context import RunContext
from orchestrator.training.prepare import prepare
from orchestrator.training.rundir import RunDir
from orchestrator.training.session import LocalSession
from orchestrator.training.trainer import Trainer
from support.loss_cases import (
    BETA,
    LOGGED,
    MARGINS,
    MAX_LENGTH,
    NO_CLIPPING,
    NO_RATE,
    PAIRS,
    ROWS,
    TABLE,
    Case,
    Kind,
    flat_gradient,
    in_trl,
    is_trls,
    make_case,
    named,
    remark,
    true_metrics,
    truth,
)
from support.tiny_parts import ALONE
from support.tiny_settings import tiny_spec
from support.training_parity import kept_signals
from support.trl_trainer import trl_trainer


class SideResult(NamedTuple):
    """Results of one side for the case."""

    metrics: dict[str, float]  # with the loss
    gradient: Tensor  # of all parameters


def exactly(case: Case, dpo: DpoSpec) -> SideResult:
    leaf = case.policy.parts.clone().requires_grad_()
    loss = truth(case, dpo, leaf)
    [slope] = torch.autograd.grad(loss, leaf)
    gradient = torch.einsum("sp,spn->n", slope, case.jacobian)
    norm = gradient.norm().item()
    return SideResult({"loss": loss.item(), "grad_norm": norm, **true_metrics(case, dpo)}, gradient)


class OneRowAStep(TrainerCallback):
    """Has a trainer, TRL's or ours, take each step with the settings of another row of the table,
    and keeps the gradient that it makes. restart: after as many steps the weights are again what
    they were.
    """

    def __init__(
        self, table: list[DpoSpec], take: Callable[[DpoSpec], None], restart: int = 0
    ) -> None:
        self.table, self.take, self.restart = table, take, restart
        self.gradients: list[Tensor] = []
        self.start: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.start = {
            name: weight.clone() for name, weight in options["model"].state_dict().items()
        }

    def on_step_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if self.restart and state.global_step % self.restart == 0:
            options["model"].load_state_dict(self.start)
        self.take(self.table[state.global_step])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.gradients.append(flat_gradient(options["model"]))

    def results(self, log_history: list[dict[str, float]]) -> list[SideResult]:
        """Return the results of each step; counts since the start of training become counts of a
        step.
        """
        lines = [line for line in log_history if "loss" in line]
        values: list[SideResult] = []
        for line, gradient in zip(lines, self.gradients, strict=True):
            assert line.keys() == {*LOGGED, "learning_rate", "step"}
            counted = {name: line[name] / line["step"] for name in ("num_tokens", "epoch")}
            values.append(SideResult({**line, **counted}, gradient))
        assert len(values) == len(self.table)
        return values


def their_trainer(case: Case, policy: str = "policy", **settings: Any) -> Any:
    return trl_trainer(
        case.loaded(policy),
        AutoTokenizer.from_pretrained(case.folder / "policy"),
        case.texts,
        ref_model=case.loaded("reference"),
        output_dir=str(case.folder / "trl"),
        **{"loss_type": ["sigmoid"], "beta": BETA, "max_length": MAX_LENGTH, **settings},
    )


def set_in_theirs(trainer: Any, dpo: DpoSpec) -> None:
    trainer.loss_types, trainer.loss_weights = in_trl(dpo), dpo.weights
    for name in (
        "beta",
        "label_smoothing",
        "f_divergence_type",
        "f_alpha_divergence_coef",
        "ld_alpha",
    ):
        setattr(trainer, name, getattr(dpo, name))
    trainer.use_weighting, trainer.args.discopop_tau = dpo.use_weighting, dpo.discopop_tau


class Start(NamedTuple):
    """The weights that training starts from, its learning rate, and the steps between restarts."""

    policy: str = "policy"
    rate: float = NO_RATE
    restart: int = 0


FROM_POLICY = Start()


def their_steps(
    case: Case,
    table: list[DpoSpec],
    start: Start = FROM_POLICY,
) -> list[SideResult]:
    trainer = their_trainer(
        case,
        start.policy,
        per_device_train_batch_size=len(case.texts),
        max_steps=len(table),
        learning_rate=start.rate,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=NO_CLIPPING,
        use_weighting=True,  # so that its head makes what the rows with it need
        router_aux_loss_coef=table[0].router_aux_loss_coef,
    )
    steps = OneRowAStep(table, partial(set_in_theirs, trainer), start.restart)
    trainer.add_callback(steps)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return steps.results(trainer.state.log_history)


def set_in_ours(trainer: Trainer, dpo: DpoSpec) -> None:
    spec = trainer.context.spec.model_copy(update={"dpo": dpo})
    trainer.context = replace(trainer.context, spec=spec)
    step = trainer.engine.step
    step.dpo, step.reference.ld_alpha = dpo, dpo.ld_alpha


def our_steps(
    case: Case,
    table: list[DpoSpec],
    precision: Precision,
    kind: Kind = "plain",
    start: Start = FROM_POLICY,
    attention: AttentionName = "auto",
) -> list[SideResult]:
    columns = {f"{kind}_column": kind} if kind in ("margin", "weight") else {}
    spec = tiny_spec(
        case.folder,
        run={"dir": tempfile.mkdtemp(dir=case.folder), "name": kind},
        model={"init": None, "path": str(case.folder / start.policy), "attention": attention},
        data={
            "train": str(case.folder / "pairs.jsonl"),
            "eval": None,
            "max_length": MAX_LENGTH,
            **columns,
        },
        dpo=table[0].model_dump(exclude_defaults=True),
        reference={"path": str(case.folder / "reference"), "cache": "off"},
        batch={"global_batch_size": PAIRS, "micro_batch_size": PAIRS},
        optimizer={"name": "torch.optim.SGD", "lr": start.rate},
        scheduler={"name": "constant"},
        training={
            "max_steps": len(table),
            "logging_steps": 1,
            "max_grad_norm": NO_CLIPPING,
            "pair_ledger": False,
        },
        precision=precision,
    )
    run_dir = RunDir(spec.run_dir)
    run_dir.begin(spec)
    trainer: Any = None
    steps = OneRowAStep(table, lambda dpo: set_in_ours(trainer, dpo), start.restart)
    with kept_signals():
        parts = assembled(
            RunContext(spec, ALONE, LocalSession(run_dir, 0), run_dir),
            prepare(spec),
            callbacks=[steps],
        )
        with parts as trainer:
            trainer.fit()
            return steps.results(trainer.callbacks.state.log_history)


class Distances(NamedTuple):
    """Distances between two results: values relative to max(1, |truth|), gradients and their logged
    norm relative to the truth's norm, the other metrics as values; the largest of each.
    """

    loss: float
    gradient: float
    metric: float


class Line(NamedTuple):
    """A row of the table."""

    ours64: Distances  # from the truth
    trl: Distances | None  # from the truth; None where TRL cannot say
    ours32: Distances  # from TRL, or there from the truth


def apart(left: SideResult, right: SideResult, true: SideResult) -> Distances:
    scales = {name: max(1.0, abs(value)) for name, value in true.metrics.items()}
    scales["grad_norm"] = true.metrics["grad_norm"]
    far = {
        name: abs(left.metrics[name] - right.metrics[name]) / scale
        for name, scale in scales.items()
    }
    gradient = (left.gradient.double() - right.gradient.double()).norm().item() / scales[
        "grad_norm"
    ]
    return Distances(far["loss"], max(gradient, far.pop("grad_norm")), max(far.values()))


Table = dict[str, Line]


def lines_of(case: Case, kind: Kind) -> Table:
    table = TABLE[kind]
    comparable = [dpo for dpo in table if is_trls(kind, dpo)]
    if kind == "margin":
        case = case._replace(margins=torch.tensor(MARGINS, dtype=torch.float64))
    at_once = case.repeated() if kind == "weight" else case
    theirs = dict(
        zip(
            map(str, comparable),
            their_steps(at_once, comparable) if comparable else [],
            strict=True,
        )
    )
    lines: Table = {}
    for dpo, exact, single in zip(
        table, *(our_steps(case, table, p, kind) for p in ("fp64", "fp32")), strict=True
    ):
        true, trl = exactly(at_once, dpo), theirs.get(str(dpo))
        if kind == "weight":
            del true.metrics["num_tokens"]  # are fed once, whatever a pair weighs
        far = apart(trl, true, true) if trl else None
        lines[named(kind, dpo)] = Line(
            apart(exact, true, true), far, apart(single, trl or true, true)
        )
    return lines


def table_of(folder: Path, case: Case) -> Table:
    lines: Table = {}
    for kind in ("plain", "margin", "weight"):
        lines |= lines_of(case, kind)
    # the grouped product of transformers' experts takes no fp64
    with patch("transformers.integrations.moe._can_use_grouped_mm", return_value=False):
        sizes = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
        return lines | lines_of(make_case(folder, "qwen3_moe", **sizes), "experts")


def printed(table: Table) -> str:
    """In Markdown; each cell the distance of the loss, of its gradient and of the metric that is
    farthest.
    """
    lines = [
        "| loss | our fp64 from the truth | TRL from the truth | our fp32 from TRL | |",
        "|---|---|---|---|---|",
    ]
    for kind, dpo in ROWS:
        line = table[named(kind, dpo)]
        ours64, trl, ours32 = (
            ", ".join(f"{x:.0e}" for x in cell) if cell else "-" for cell in line
        )
        far = ours32 if is_trls(kind, dpo) else f"{ours32} from the truth"
        lines.append(f"| {named(kind, dpo)} | {ours64} | {trl} | {far} | {remark(kind, dpo)} |")
    return "\n".join(lines)
