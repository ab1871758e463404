"""Every loss of ours, in value and gradient: against an fp64 computation of its own and against live TRL.

`python tests/parity/test_losses.py` prints the table.
"""

import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback, TrainerCallback

sys.path.insert(0, str(Path(__file__).parent.parent))

from parity.parity_support import need_trl, trl_trainer
from parity.test_training import exact_model
from support import TINY_MODEL, tiny_spec, write_jsonl
from support import rows as made_rows
from tiny import ALONE

from orchestrator.data.collate import PackedCollator, PairBatch, PreferenceCollator, Row
from orchestrator.dpo.losses import BATCH_LOSSES, LOSSES, PairTerms
from orchestrator.dpo.step import METRICS, PairStep
from orchestrator.models.attention import use_packed_attention
from orchestrator.models.fused import fuse
from orchestrator.models.policy import load_tokenizer
from orchestrator.models.reference import Reference
from orchestrator.settings.spec import OF_BATCH, OF_SCORES, SMOOTHED, DpoSpec, LossType
from orchestrator.training.batch_losses import GlobalBatch
from orchestrator.training.metrics import means

need_trl()

BETA, LR, STEPS, PAIRS, MAX_LENGTH = 0.3, 0.03, 3, 6, 40
EXACT = 1e-9  # relative, of our fp64 and the computation here
FP32 = 2e-6  # of our fp32; TRL's distance from the truth comes on top
TRL_IS_NEAR = 1e-4  # how far TRL may be from the truth; what is further is another loss
GRADIENT_FP32 = 2e-5
TRL_GRADIENT_IS_NEAR = 1e-3  # of ipo with forward_kl, whose parts cancel, 9e-5; of any other 1e-5
NOT_TRLS = ("cdpo", "simpo", "orpo")  # no losses of TRL's DPOTrainer
NOT_WEIGHTED_BY_TRL = ("hinge", "sft")  # it raises: an in-place product would change what the backward pass needs
# there of a micro-batch, here of the global batch: the same where that is all
SPLIT_IN_TRL = ("sft", *OF_BATCH)


# --- what is compared --------------------------------------------------------------------------------------------


def dpo_spec(loss_type: LossType | list[LossType], **settings: Any) -> DpoSpec:
    return DpoSpec(loss_type=loss_type, **{"beta": BETA, **settings})


def plain(name: LossType) -> DpoSpec:
    return dpo_spec(name, label_smoothing=1e-3 if name == "exo_pair" else 0.0)


def with_option(name: LossType, **option: Any) -> DpoSpec:
    return dpo_spec(name, label_smoothing=plain(name).label_smoothing, **option)


TABLE: list[DpoSpec] = [
    *map(plain, get_args(LossType)),
    *(dpo_spec(name, label_smoothing=0.1) for name in SMOOTHED),
    *(with_option(name, ld_alpha=0.4) for name in get_args(LossType) if name != "sft"),  # where it does not act
    *(with_option(name, use_weighting=True) for name in get_args(LossType) if name not in OF_BATCH),  # refused
    *(with_option(name, f_divergence_type="forward_kl") for name in OF_SCORES),
    *(with_option(name, f_divergence_type="js_divergence") for name in OF_SCORES),
    *(with_option(name, f_divergence_type="alpha_divergence") for name in OF_SCORES),
    *(dpo_spec("sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=a) for a in (-0.5, 1.0, 1.7)),
    *(dpo_spec("sigmoid", ld_alpha=alpha) for alpha in (0.0, 1.0)),
    dpo_spec("discopop", discopop_tau=1.5),
    dpo_spec("simpo", simpo_gamma=1.2),
    dpo_spec(["sigmoid", "sft"], loss_weights=[1, 0.5]),  # RPO
    dpo_spec(["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1]),  # MPO
    dpo_spec(["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1], ld_alpha=0.4),  # not in its last
    dpo_spec(["aot", "hinge", "aot_unpaired"], loss_weights=[0.5, 0.2, 1], label_smoothing=0.1),
    dpo_spec(["hinge", "apo_zero"]),
    dpo_spec(["ipo", "apo_zero"], loss_weights=[1, 0.5], use_weighting=True, ld_alpha=0.4),
    dpo_spec(["sigmoid", "exo_pair"], loss_weights=[0.5, 1], label_smoothing=0.1),  # which acts in the second alone
    dpo_spec(["robust", "sft"], label_smoothing=0.2, f_divergence_type="js_divergence"),
]


def named(dpo: DpoSpec) -> str:
    """The settings that differ from their defaults."""
    weights = [f"{weight:g} " if dpo.loss_weights else "" for weight in dpo.weights]
    words = [" + ".join(weight + name for weight, name in zip(weights, dpo.loss_types, strict=True))]
    for name, field in DpoSpec.model_fields.items():
        value = getattr(dpo, name)
        if value != field.default and name not in ("loss_type", "loss_weights", "beta"):
            words.append(str(value) if name == "f_divergence_type" else f"{name}={value}")
    return ", ".join(words)


def is_trls(dpo: DpoSpec) -> bool:
    """Whether TRL can say what the loss is."""
    beyond = {*NOT_TRLS, *(NOT_WEIGHTED_BY_TRL if dpo.use_weighting else ())}
    return beyond.isdisjoint(dpo.loss_types)


def remark(dpo: DpoSpec) -> str:
    """What the table says of TRL besides numbers."""
    if dpo.use_weighting and not set(NOT_WEIGHTED_BY_TRL).isdisjoint(dpo.loss_types):
        return "TRL raises"
    if not is_trls(dpo):
        return "no loss of TRL's DPOTrainer"
    return "" if set(SPLIT_IN_TRL).isdisjoint(dpo.loss_types) else "depends on the split in TRL, here one micro-batch"


class Seen(NamedTuple):
    """What a model in fp64 says of the case's sequences, all chosen first."""

    parts: Tensor  # [2B, 2] log-probs of as many tokens as both completions of the pair have, and of the rest
    aligned: Tensor  # [2B] mean of log p - log(sum of p^2), of WPO
    sums: Tensor  # [4, 2B] over scored tokens: of ones, of the entropy, of the mean logit, of being the likeliest


class Case(NamedTuple):
    """A policy and its reference, TRL's rows of token ids and what its trainer says of them, and what an fp64
    computation does."""

    folder: Path
    rows: list[Row]
    trainer: Any
    trls: "dict[str, Found]"  # by the name of the settings
    policy: Seen
    reference: Seen
    jacobian: Tensor  # [2B, 2, parameters] of the policy's parts, fp64

    @property
    def tokens(self) -> Tensor:
        """[2B] of the completions, the unscored first one of an empty prompt too."""
        return torch.tensor([len(row[side]) for side in SIDES for row in self.rows])

    @property
    def logps(self) -> Tensor:
        """[2B] of the policy."""
        return self.policy.parts.sum(1)

    @property
    def ref_logps(self) -> Tensor:
        """[2B] of the reference."""
        return self.reference.parts.sum(1)


SIDES = ("chosen_ids", "rejected_ids")


def make_case(folder: Path) -> Case:
    rows = [*made_rows(PAIRS - 1, seed=11), {"prompt": "", "chosen": "green river", "rejected": "blue"}]
    write_jsonl(folder / "train.jsonl", made_rows(64))
    tokenizer = load_tokenizer(tiny_spec(folder, data={"eval": None}))
    config = AutoConfig.for_model("qwen2", initializer_range=0.1, **{**TINY_MODEL, "vocab_size": len(tokenizer)})
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        torch.manual_seed(seed)
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    policy, reference = (loaded(folder, name, torch.float32) for name in ("policy", "reference"))
    trainer, found = trls(folder / "trl", policy, tokenizer, rows, reference)
    trl_rows = [{**row, "pair_id": number} for number, row in enumerate(trainer.train_dataset)]

    exact_policy, exact_reference = (exact_model(folder / name) for name in ("policy", "reference"))
    seen = looked_at(exact_policy, trl_rows)
    parameters = [p for _, p in sorted(exact_policy.named_parameters())]
    gradient = functools.partial(torch.autograd.grad, retain_graph=True, allow_unused=True, materialize_grads=True)
    jacobian = torch.stack([flat(gradient(part, parameters)) for part in seen.parts.flatten()]).unflatten(0, (-1, 2))
    with torch.no_grad():
        reference = looked_at(exact_reference, trl_rows)
    return Case(folder, trl_rows, trainer, found, seen._replace(parts=seen.parts.detach()), reference, jacobian)


def loaded(folder: Path, name: str, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / name, dtype=dtype).train()


def flat(gradients: Any) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def flat_gradient(model: torch.nn.Module) -> Tensor:
    return flat([p.grad for _, p in sorted(model.named_parameters())])


def looked_at(model: Any, rows: list[Row]) -> Seen:
    """One sequence at a time from full logits; a token at position 0 has none before it."""
    parts, aligned, sums = [], [], []
    for side in SIDES:
        for row in rows:
            first = not row["prompt_ids"]
            ids, start = torch.tensor(row["prompt_ids"] + row[side]), len(row["prompt_ids"]) + first
            logits = model(input_ids=ids[None]).logits[0, start - 1 : -1]
            log_probs, labels = logits.log_softmax(-1), ids[start:]
            logps = log_probs[torch.arange(len(labels)), labels]
            shorter = min(len(row[each]) for each in SIDES) - first
            parts.append(torch.stack([logps[:shorter].sum(), logps[shorter:].sum()]))
            aligned.append((logps - log_probs.exp().square().sum(-1).log()).mean().detach())
            entropy, top1 = -(log_probs.exp() * log_probs).sum(), (logits.argmax(-1) == labels).sum()
            sums.append(torch.stack([torch.tensor(len(labels)), entropy, logits.mean(-1).sum(), top1]).detach())
    return Seen(torch.stack(parts), torch.stack(aligned), torch.stack(sums, dim=1))


# --- the losses once more, as their papers have them -------------------------------------------------------------


def sig(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def odds(mean_logp: Tensor) -> Tensor:
    return torch.exp(mean_logp) / (1 - torch.exp(mean_logp))


def derivative_of_f(t: Tensor, dpo: DpoSpec) -> Tensor:
    alpha = 1.0 if dpo.f_divergence_type == "reverse_kl" else dpo.f_alpha_divergence_coef
    if dpo.f_divergence_type == "forward_kl":
        return 1 - 1 / t
    if dpo.f_divergence_type == "js_divergence":
        return torch.log(2 * t / (t + 1))
    return torch.log(t) if alpha == 1 else (t ** (alpha - 1) - 1) / (alpha - 1)


def log_ratios(case: Case, dpo: DpoSpec, parts: Tensor) -> tuple[Tensor, Tensor]:
    """[2B] log-probs of the policy, and log-ratios to the reference: LD-DPO's, where it is asked for."""
    weights = torch.tensor([1.0, 1.0 if dpo.ld_alpha is None else dpo.ld_alpha], dtype=torch.float64)
    return parts @ weights, (parts - case.reference.parts) @ weights


def truth(case: Case, dpo: DpoSpec, parts: Tensor) -> Tensor:
    """The loss of the case's pairs at these log-probs [2B, 2]."""
    b, e, gamma, tau = dpo.beta, dpo.label_smoothing, dpo.simpo_gamma, dpo.discopop_tau
    logps, ratios = log_ratios(case, dpo, parts)
    (w, x), (r_w, r_x), (n_w, n_x) = (each.chunk(2) for each in (logps, ratios, case.tokens.double()))
    s_w, s_x = derivative_of_f(torch.exp(r_w), dpo), derivative_of_f(torch.exp(r_x), dpo)
    m, g = b * (s_w - s_x), sig(b * (s_w - s_x) / tau)
    simpo = b / n_w * w - b / n_x * x - gamma
    log_odds_ratio = torch.log(odds(w / n_w) / odds(x / n_x))
    scored = case.policy.sums[0, :PAIRS].sum()

    def smoothed(margin: Tensor) -> Tensor:
        return -(1 - e) * torch.log(sig(margin)) - e * torch.log(sig(-margin))

    values: dict[LossType, Callable[[], Tensor]] = {
        "sigmoid": lambda: -torch.log(sig(m)),
        "hinge": lambda: torch.where(m < 1, 1 - m, 0.0),
        "ipo": lambda: (s_w / n_w - s_x / n_x - 1 / (2 * b)) ** 2,
        "exo_pair": lambda: sig(m) * torch.log(sig(m) / (1 - e)) + sig(-m) * torch.log(sig(-m) / e),
        "nca_pair": lambda: -torch.log(sig(b * r_w)) - torch.log(sig(-b * r_w)) / 2 - torch.log(sig(-b * r_x)) / 2,
        "robust": lambda: (-(1 - e) * torch.log(sig(m)) + e * torch.log(sig(-m))) / (1 - 2 * e),
        "bco_pair": lambda: -torch.log(sig(b * r_w)) - torch.log(1 - sig(b * r_x)),
        "sppo_hard": lambda: (r_w - 1 / (2 * b)) ** 2 + (r_x + 1 / (2 * b)) ** 2,
        "aot": lambda: smoothed(b * ((w - x).sort().values - (w - x - r_w + r_x).sort().values)),
        "aot_unpaired": lambda: smoothed(b * (r_w.sort().values - r_x.sort().values)),
        "apo_zero": lambda: 1 - sig(b * r_w) + sig(b * r_x),
        "apo_down": lambda: sig(b * r_w) + 1 - sig(b * (r_w - r_x)),
        "discopop": lambda: -(1 - g) * torch.log(sig(m)) + g * torch.exp(-m),
        "sft": lambda: -parts[:PAIRS].sum(1) / scored * PAIRS,
        "sigmoid_norm": lambda: -torch.log(sig(b * (s_w / n_w - s_x / n_x))),
        "cdpo": lambda: smoothed(m),
        "simpo": lambda: smoothed(simpo),
        "orpo": lambda: -w / n_w - b * torch.log(sig(log_odds_ratio)),
    }
    by_pair = sum(weight * values[name]() for name, weight in zip(dpo.loss_types, dpo.weights, strict=True))
    on_policy = torch.exp(case.policy.aligned[:PAIRS] + case.policy.aligned[PAIRS:])  # of the tokens, not LD-DPO's
    return (on_policy * by_pair if dpo.use_weighting else by_pair).mean()


def true_metrics(case: Case, dpo: DpoSpec) -> dict[str, float]:
    """What is logged besides the loss."""
    logps, ratios = log_ratios(case, dpo, case.policy.parts)
    (w, x), (r_w, r_x) = logps.chunk(2), (dpo.beta * ratios).chunk(2)
    ones, entropy, logits, top1 = case.policy.sums
    fed = [len(row["prompt_ids"]) + len(row[side]) for side in SIDES for row in case.rows]
    found = {
        "rewards/chosen": r_w.mean(),
        "rewards/rejected": r_x.mean(),
        "rewards/accuracies": (r_w > r_x).double().mean(),
        "rewards/margins": (r_w - r_x).mean(),
        "logps/chosen": w.mean(),
        "logps/rejected": x.mean(),
        "logits/chosen": logits[:PAIRS].sum() / ones[:PAIRS].sum(),
        "logits/rejected": logits[PAIRS:].sum() / ones[PAIRS:].sum(),
        "entropy": entropy.sum() / ones.sum(),
        "mean_token_accuracy": top1[:PAIRS].sum() / ones[:PAIRS].sum(),
        "num_tokens": sum(fed),
    }
    return {name: float(value) for name, value in found.items()}


# --- the three sides ---------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What one side says of the case."""

    loss: float
    gradient: Tensor  # of all parameters
    metrics: dict[str, float]  # with the loss


def exactly(case: Case, dpo: DpoSpec) -> Found:
    leaf = case.policy.parts.clone().requires_grad_()
    loss = truth(case, dpo, leaf)
    [slope] = torch.autograd.grad(loss, leaf)
    gradient = torch.einsum("sp,spn->n", slope, case.jacobian)
    return Found(loss.item(), gradient, {"loss": loss.item(), **true_metrics(case, dpo)})


class OneRowAStep(TrainerCallback):
    """Gives TRL's trainer the settings of one row of the table a step, and keeps the gradient it makes of them."""

    def __init__(self, table: list[DpoSpec]) -> None:
        self.table = table
        self.trainer: Any = None
        self.gradients: list[Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        set_in(self.trainer, self.table[state.global_step])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.gradients.append(flat_gradient(given["model"]))


def set_in(trainer: Any, dpo: DpoSpec) -> None:
    trainer.loss_types, trainer.loss_weights = dpo.loss_types, dpo.weights
    for name in ("beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha"):
        setattr(trainer, name, getattr(dpo, name))
    trainer.use_weighting, trainer.args.discopop_tau = dpo.use_weighting, dpo.discopop_tau


def trls(folder: Path, policy: Any, tokenizer: Any, rows: list[Row], reference: Any) -> tuple[Any, dict[str, Found]]:
    """TRL's trainer, and what it logs of each row of the table that it can say: all pairs in one micro-batch, a step
    each, of a rate of 0."""
    table = [dpo for dpo in TABLE if is_trls(dpo)]
    trainer = trl_trainer(
        folder,
        policy,
        tokenizer,
        rows,
        reference,
        loss_type=["sigmoid"],
        max_length=MAX_LENGTH,
        per_device_train_batch_size=len(rows),
        max_steps=len(table),
        learning_rate=0.0,
        optim="sgd",
        max_grad_norm=0,
        use_weighting=True,  # so that its head makes what the rows with it need
    )
    kept = OneRowAStep(table)
    kept.trainer = trainer
    trainer.add_callback(kept)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    seen = zip(map(named, table), lines, kept.gradients, strict=True)
    found = {name: Found(line["loss"], gradient, line) for name, line, gradient in seen}
    for number, each in enumerate(found.values()):
        each.metrics["num_tokens"] /= number + 1  # of all steps up to this one
    return trainer, found


class Ours:
    """Our step over the case's pairs."""

    def __init__(self, case: Case, dtype: torch.dtype, packed: bool = True, policy: str = "policy") -> None:
        self.policy, reference = loaded(case.folder, policy, dtype), loaded(case.folder, "reference", dtype)
        for model in (self.policy, reference):
            fuse(model)
            if packed:
                use_packed_attention(model, "cpu")
        self.step = PairStep(self.policy, Reference(reference), plain("sigmoid"))
        data = tiny_spec(case.folder).data.model_copy(update={"max_length": MAX_LENGTH})
        self.batch: PairBatch = (PackedCollator(data) if packed else PreferenceCollator(0, data))(case.rows)

    def __call__(self, dpo: DpoSpec) -> Found:
        self.step.dpo, self.step.reference.ld_alpha = dpo, dpo.ld_alpha
        self.policy.zero_grad()
        output: Any = self.step(self._once_seen() if dpo.sees_batch else self.batch, self.batch.counts)
        output.loss.backward()
        return Found(output.loss.item(), flat_gradient(self.policy), means(output.metric_sums.tolist()))

    def _once_seen(self) -> PairBatch:
        """With what losses over the whole batch come to."""
        seen = GlobalBatch(ALONE)
        with torch.no_grad():
            output: Any = self.step(self.batch, self.batch.counts)
        seen.add(self.batch, output)
        return self.batch._replace(ref_logps=output.ref_logps, of_batch=seen.shares(self.step.dpo)[0])


class Distances(NamedTuple):
    """How far two are from each other: values by max(1, |truth|), gradients by the truth's norm, metrics as values,
    the one that is farthest."""

    loss: float
    gradient: float
    metric: float


class Line(NamedTuple):
    """A row of the table."""

    ours64: Distances  # from the truth
    trl: Distances | None  # from the truth; None where TRL cannot say
    ours32: Distances  # from TRL, or there from the truth


def apart(left: Found, right: Found, true: Found) -> Distances:
    far = [abs(left.metrics[name] - right.metrics[name]) / max(1.0, abs(true.metrics[name])) for name in METRICS]
    gradient = float((left.gradient.double() - right.gradient.double()).norm() / true.gradient.norm())
    return Distances(abs(left.loss - right.loss) / max(1.0, abs(true.loss)), gradient, max(far))


Table = dict[str, Line]


def table_of(case: Case) -> Table:
    exact, single = Ours(case, torch.float64), Ours(case, torch.float32)
    table: Table = {}
    for dpo in TABLE:
        true, theirs = exactly(case, dpo), case.trls.get(named(dpo))
        ours64, ours32 = apart(exact(dpo), true, true), apart(single(dpo), theirs or true, true)
        table[named(dpo)] = Line(ours64, apart(theirs, true, true) if theirs else None, ours32)
    return table


def printed(table: Table) -> str:
    """In Markdown; each cell the distance of the loss, of its gradient and of the metric that is farthest."""
    lines = ["| loss | our fp64 from the truth | TRL from the truth | our fp32 from TRL | |", "|---|---|---|---|---|"]
    for dpo in TABLE:
        ours64, trl, ours32 = (", ".join(f"{x:.0e}" for x in cell) if cell else "-" for cell in table[named(dpo)])
        far = ours32 if is_trls(dpo) else f"{ours32} from the truth"
        lines.append(f"| {named(dpo)} | {ours64} | {trl} | {far} | {remark(dpo)} |")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("losses"))


@pytest.fixture(scope="module")
def table(case: Case) -> Table:
    return table_of(case)


# --- the tests ---------------------------------------------------------------------------------------------------


def test_the_rows_hold_what_matters(case: Case) -> None:
    assert {name for dpo in TABLE for name in dpo.loss_types} == {*LOSSES, *BATCH_LOSSES}
    assert any(not row["prompt_ids"] for row in case.rows)  # its first tokens are counted and not scored
    assert len({len(row["chosen_ids"]) for row in case.rows}) > 2
    chosen, rejected = (case.logps - case.ref_logps).chunk(2)
    assert {bool(margin > 0) for margin in chosen - rejected} == {True, False}
    assert 1 < float((chosen - rejected).abs().max()) < 30


def test_the_table_is_of_settings_that_are_allowed(case: Case) -> None:
    for dpo in TABLE:
        assert tiny_spec(case.folder, dpo=dpo.model_dump(exclude_defaults=True)).dpo == dpo


@pytest.mark.parametrize("dpo", TABLE, ids=named)
def test_value_gradient_and_metrics(table: Table, dpo: DpoSpec) -> None:
    ours64, trl, ours32 = table[named(dpo)]
    assert max(ours64) < EXACT
    assert (trl is not None) == is_trls(dpo)
    far = trl or Distances(0.0, 0.0, 0.0)
    assert far.loss < TRL_IS_NEAR
    assert far.gradient < TRL_GRADIENT_IS_NEAR
    assert far.metric < TRL_IS_NEAR
    # no farther from TRL than TRL is from the truth
    assert ours32.loss <= FP32 + far.loss
    assert ours32.gradient <= GRADIENT_FP32 + far.gradient
    assert ours32.metric <= FP32 + far.metric


def test_the_table_can_be_read(table: Table) -> None:
    print(printed(table))
    assert len(printed(table).splitlines()) == len(TABLE) + 2


@pytest.mark.parametrize("name", NOT_WEIGHTED_BY_TRL)
def test_trl_raises_where_the_table_says_so(case: Case, name: LossType) -> None:
    inputs = case.trainer.data_collator([dict(row) for row in case.trainer.train_dataset])
    set_in(case.trainer, dpo_spec(name, use_weighting=True))
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|single memory location"):
        case.trainer.compute_loss(case.trainer.model, inputs).backward()


@pytest.mark.parametrize("name", [name for name in get_args(LossType) if name not in (*OF_SCORES, *NOT_TRLS)])
def test_trl_refuses_an_f_divergence_where_our_settings_do(case: Case, name: LossType) -> None:
    with pytest.raises(ValueError, match="is only supported for the following loss types"):
        trl_trainer(
            case.folder / "refused",
            case.trainer.model,
            case.trainer.processing_class,
            made_rows(2),
            case.trainer.ref_model,
            loss_type=name,
            f_divergence_type="js_divergence",
        )


def test_trl_takes_an_f_divergence_where_our_settings_do(case: Case) -> None:
    trl_trainer(
        case.folder / "taken",
        case.trainer.model,
        case.trainer.processing_class,
        made_rows(2),
        case.trainer.ref_model,
        loss_type=[name for name in OF_SCORES if name not in NOT_TRLS],
        f_divergence_type="js_divergence",
        label_smoothing=0.1,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_is_that_of_trls_cpo_trainer(case: Case, smoothing: float) -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    dpo = dpo_spec("simpo", beta=2.0, simpo_gamma=1.2, label_smoothing=smoothing)
    settings = {"beta": 2.0, "simpo_gamma": 1.2, "label_smoothing": smoothing, "loss_type": "simpo", "alpha": 0.0}
    trainer: Any = SimpleNamespace(**settings, accelerator=SimpleNamespace(device="cpu"))
    expected, *_ = CPOTrainer.cpo_loss(trainer, *(case.logps / case.tokens).chunk(2))  # pyright: ignore
    found = LOSSES["simpo"](PairTerms.split(case.logps, case.ref_logps, case.tokens), dpo)
    assert torch.allclose(found, expected, rtol=1e-12)


def test_the_odds_ratio_of_orpo_is_that_of_trls_orpo_trainer(case: Case) -> None:
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    trainer: Any = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"))
    chosen, rejected = (case.logps / case.tokens).chunk(2)
    expected, *_ = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)  # pyright: ignore
    found = LOSSES["orpo"](PairTerms.split(case.logps, case.ref_logps, case.tokens), plain("orpo"))
    assert torch.allclose(found + chosen, -expected.double(), rtol=1e-5)


# --- three steps -------------------------------------------------------------------------------------------------

TRAINED = [
    dpo_spec("ipo", beta=0.1),
    dpo_spec(["sigmoid", "bco_pair", "sft"], beta=0.1, loss_weights=[0.8, 0.2, 1]),
    dpo_spec("sigmoid", beta=0.1, ld_alpha=0.4, use_weighting=True),
]
Trace = list[dict[str, float]]
NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")


def trl_trace(case: Case, dpo: DpoSpec) -> Trace:
    trainer = trl_trainer(
        case.folder / "trained",
        loaded(case.folder, "reference", torch.float32),
        case.trainer.processing_class,
        [*made_rows(PAIRS - 1, seed=11), {"prompt": "", "chosen": "green river", "rejected": "blue"}],
        loaded(case.folder, "reference", torch.float32),
        loss_type=dpo.loss_types,
        loss_weights=dpo.loss_weights,
        beta=dpo.beta,
        ld_alpha=dpo.ld_alpha,
        use_weighting=dpo.use_weighting,
        max_steps=STEPS,
        per_device_train_batch_size=PAIRS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        max_length=MAX_LENGTH,
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def our_trace(case: Case, dpo: DpoSpec, dtype: torch.dtype, packed: bool) -> Trace:
    """The same steps by plain SGD, from the reference."""
    ours, trace = Ours(case, dtype, packed, policy="reference"), []
    for _ in range(STEPS):
        trace.append(ours(dpo).metrics)
        with torch.no_grad():
            for p in ours.policy.parameters():
                p -= LR * torch.zeros_like(p) if p.grad is None else LR * p.grad
    return trace


@pytest.mark.parametrize("dpo", TRAINED, ids=named)
def test_three_steps_are_trls(case: Case, dpo: DpoSpec) -> None:
    trl, exact = trl_trace(case, dpo), our_trace(case, dpo, torch.float64, packed=True)
    assert trl[-1]["loss"] < 0.95 * trl[0]["loss"]
    assert set(NAMES) <= set(METRICS)
    for packed in (True, False):
        found = our_trace(case, dpo, torch.float32, packed)
        for step in range(STEPS):
            for name in NAMES:
                ours, theirs, true = found[step][name], trl[step][name], exact[step][name]
                # no farther from TRL than TRL is from the truth
                assert abs(ours - theirs) <= FP32 * max(1.0, abs(true)) + abs(theirs - true), (step, name, packed)
                assert abs(theirs - true) <= TRL_IS_NEAR * max(1.0, abs(true)), (step, name)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(printed(table_of(make_case(Path(folder)))))
