"""Five optimizer steps of ours have the numbers of TRL and of plain fp64 arithmetic, metric by
metric.
"""

import copy
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.data.collate import Counts, PackedCollator
from orchestrator.dpo.step import PairStep
from orchestrator.models import plain_head
from orchestrator.models.attention import use_packed_attention
from orchestrator.models.build_reference import build_reference
from orchestrator.models.policy import build_policy, load_tokenizer
from orchestrator.settings.run import RunSpec
from orchestrator.training import worker
from orchestrator.training.health import LocalSession
from orchestrator.training.prepare import prepare
from orchestrator.training.rundir import RunDir
from orchestrator.world import World
from support.run_files import metric_lines, without_times
from support.tiny_settings import TINY_MODEL, random_rows, tiny_spec, write_jsonl
from support.trl_trainer import need_trl, trl_trainer

need_trl()

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


# --- the three programs ---------------------------------------------------------------------------


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
        folder,
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        tokenizer,
        rows,
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


# --- comparing ------------------------------------------------------------------------------------


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


# --- the tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The number of threads that share a sum decides its rounding; for tensors this small they only
    wait for each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=list(KINDS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, folder = KINDS[request.param], tmp_path_factory.mktemp(request.param)
    rows = random_rows(PAIRS, seed=11)
    write_jsonl(folder / "train.jsonl", random_rows(64))  # of the tokenizer
    write_jsonl(folder / "pairs.jsonl", rows)
    tokenizer = load_tokenizer(tiny_spec(folder, data={"eval": None}))
    shape = {**TINY_MODEL, "tie_word_embeddings": kind.tied, "vocab_size": len(tokenizer)}
    config = AutoConfig.for_model(kind.model_type, initializer_range=INITIALIZER_RANGE, **shape)
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for vector in [p for p in model.parameters() if p.ndim < 2]:
        vector.data += 0.1 * torch.randn_like(
            vector
        )  # norms of 1 and biases of 0 would hide what is done with them
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    trl_rows, trl_trace, trl_gradient = trl_side(
        folder / "trl", folder / "model", tokenizer, rows, kind
    )
    assert max(len(row["prompt_ids"] + row["chosen_ids"]) for row in trl_rows) > MAX_LENGTH
    exact_trace, exact_gradient = exact_adam(folder / "model", trl_rows, kind.weight_decay)
    norms = [line["grad_norm"] for line in exact_trace]
    assert norms[0] > 1 > norms[-1]  # clipping acts in some steps and not in others
    return Case(kind, folder, trl_rows, trl_trace, trl_gradient, exact_trace, exact_gradient)


only_qwen2 = pytest.mark.parametrize("case", ["qwen2"], indirect=True)


@pytest.mark.parametrize("micro_batch_size", [8, 2])
def test_five_steps_in_fp32(case: Case, micro_batch_size: int) -> None:
    trace = ours(
        case.spec(f"micro_{micro_batch_size}", batch={"micro_batch_size": micro_batch_size})
    )

    assert disagreements(trace, case.exact_trace, TOLERANCE) == []
    # no farther from TRL than TRL is from the truth
    assert disagreements(trace, case.trl_trace, TOLERANCE, slack=case.exact_trace) == []


@only_qwen2
@pytest.mark.parametrize("attention", ["padded", "sdpa"])
def test_five_steps_with_another_attention(case: Case, attention: str) -> None:
    trace = ours(case.spec(attention, model={"attention": attention}))

    assert disagreements(trace, case.exact_trace, TOLERANCE) == []
    assert disagreements(trace, case.trl_trace, TOLERANCE, slack=case.exact_trace) == []


def test_the_first_step_is_ln_2(case: Case) -> None:
    """The policy is its own reference, bit for bit, so rewards are no rounding error but zero, and
    a tie is no win.
    """
    first = ours(case.spec("first"))[0]

    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["rewards/chosen"], first["rewards/rejected"], first["rewards/margins"]) == (
        0,
        0,
        0,
    )
    assert first["rewards/accuracies"] == 0.0


def test_five_steps_in_fp64(case: Case) -> None:
    assert disagreements(ours(case.spec("fp64", precision="fp64")), case.exact_trace, 1e-9) == []


def first_gradient(case: Case, spec: RunSpec) -> dict[str, torch.Tensor]:
    """The gradient of a run's first step before clipping, in one micro-batch."""
    prepared = prepare(spec)
    policy = build_policy(spec, prepared.tokenizer, torch.float32)
    reference = build_reference(spec, policy, torch.float32)
    for model in (policy, reference.model):
        use_packed_attention(model, "cpu")
    step = PairStep(policy, reference, spec.dpo)
    batch = PackedCollator(spec.data)([prepared.train[index] for index in range(PAIRS)])
    step(batch, Counts(PAIRS, 0)).loss.backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def test_the_first_gradient(case: Case) -> None:
    gradient = first_gradient(case, case.spec("gradient"))

    assert worst(gradient, case.exact_gradient) < GRADIENT_TOLERANCE
    assert worst(gradient, case.trl_gradient) < GRADIENT_TOLERANCE


def test_gradient_checkpointing(case: Case) -> None:
    spec = case.spec("checkpointing", training={"gradient_checkpointing": True})
    calls = []
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: calls.append(1) if type(module).__name__.endswith("MLP") else None
    )
    with hook:
        trace = ours(spec)

    assert disagreements(trace, case.exact_trace, TOLERANCE) == []
    # two passes that check the head, one each that looks for later tokens, for noise and for
    # weights without a gradient, two of each model that check the packed row; in each step the
    # policy and its layers again for the backward pass; the reference once, as every step has the
    # same pairs
    assert len(calls) == TINY_MODEL["num_hidden_layers"] * (2 + 3 + 4 + 2 * STEPS + 1)


@only_qwen2
def test_the_head_in_chunks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long batches cut the logits into chunks, which are made again in the backward pass; here of 7
    tokens.
    """
    before = first_gradient(case, case.spec("whole"))
    monkeypatch.setattr(plain_head, "CHUNK_LOGITS", 7 * len(load_tokenizer(case.spec("whole"))))

    assert disagreements(ours(case.spec("chunks")), case.exact_trace, TOLERANCE) == []
    assert worst(first_gradient(case, case.spec("chunks")), before) < GRADIENT_TOLERANCE


@only_qwen2
def test_another_optimizer_and_schedule_of_torch(case: Case) -> None:
    rate, schedule = 0.2, {"step_size": 2, "gamma": 0.1}
    model = exact_model(case.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    exact, _ = exact_steps(
        model, case.trl_rows, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, **schedule)
    )

    trace = ours(
        case.spec(
            "sgd",
            optimizer={"name": "torch.optim.SGD", "lr": rate, "kwargs": {"momentum": 0.9}},
            scheduler={"name": "torch.optim.lr_scheduler.StepLR", "kwargs": schedule},
        )
    )

    assert disagreements(trace, exact, TOLERANCE) == []
    assert [line["learning_rate"] for line in trace] == [line["learning_rate"] for line in exact]
    assert [line["learning_rate"] for line in trace] == pytest.approx([0.2, 0.2, 0.02, 0.02, 0.002])
    assert trace[-1]["loss"] < 0.9 * trace[0]["loss"]


# --- that the comparisons above can fail ----------------------------------------------------------


@only_qwen2
@pytest.mark.parametrize("name", METRICS)
def test_a_perturbed_number_is_noticed(case: Case, name: str) -> None:
    trace = copy.deepcopy(case.exact_trace)
    assert disagreements(trace, case.exact_trace, TOLERANCE) == []
    trace[3][name] += 2 * TOLERANCE * max(1.0, abs(trace[3][name]))
    differences = disagreements(trace, case.exact_trace, TOLERANCE)
    assert [line.split(":")[0] for line in differences] == [f"step 4 {name}"]
    trace[3][name] = math.nan
    assert len(disagreements(trace, case.exact_trace, TOLERANCE)) == 1

    beyond = copy.deepcopy(case.trl_trace)
    distance = abs(case.trl_trace[3][name] - case.exact_trace[3][name])
    beyond[3][name] += distance + 2 * TOLERANCE * max(1.0, abs(beyond[3][name]))
    assert len(disagreements(beyond, case.trl_trace, TOLERANCE, slack=case.exact_trace)) == 1


@only_qwen2
@pytest.mark.parametrize(
    ("wrong", "first_seen"),
    # a tenth of a per cent; in the first step the loss is ln 2 whatever beta is, but the gradient
    # is not
    [({"beta": BETA * 1.001}, "step 1 grad_norm"), ({"pairs": PAIRS - 1}, "step 1 loss")],
)
def test_a_wrong_program_is_noticed(case: Case, wrong: dict[str, Any], first_seen: str) -> None:
    trace, gradient = exact_adam(case.model, case.trl_rows, **wrong)
    values = [line.split(":")[0] for line in disagreements(trace, case.exact_trace, TOLERANCE)]

    assert values[0] == first_seen
    assert "step 5 loss" in values
    assert worst(gradient, case.exact_gradient) > GRADIENT_TOLERANCE


@only_qwen2
def test_a_wrong_setting_of_ours_is_noticed(case: Case) -> None:
    differences = disagreements(
        ours(case.spec("wrong", dpo={"beta": BETA * 1.001})), case.exact_trace, TOLERANCE
    )

    assert "step 2 loss" in [line.split(":")[0] for line in differences]
