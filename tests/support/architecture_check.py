"""One architecture from a tiny checkpoint to its export, by the product and by plain torch."""

import copy
import json
import math
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from orchestrator.run.local.trial import NothingToSave
from orchestrator.settings.errors import UserError
from orchestrator.settings.load import make_spec
from orchestrator.training.rundir import RunDir
from orchestrator.training.worker import run
from orchestrator.world import World
from support.architecture_configs import tiny_config
from support.tiny_parts import tokenizer
from support.tiny_settings import write_jsonl

STEPS, BETA, RATE, NORM = 3, 0.5, 0.05, 1.0
PADDED = "two padded rows per pair instead of a packed one: "
# Longer than the windows of the tiny configs, of several lengths; the answers of one begin alike.
ROWS = [
    {"prompt": "Say red river.", "chosen": " amber stone", "rejected": " no"},
    {
        "prompt": "A much longer question about clouds, lamps and chairs:",
        "chosen": " yes",
        "rejected": " perhaps not",
    },
    {
        "prompt": "Hi",
        "chosen": " garden window bread",
        "rejected": " garden window stone and more of it",
    },
    {"prompt": "Count to four,", "chosen": " one two three four", "rejected": " four four"},
]


@dataclass
class Row:
    """One model type's row of the table; an error is the largest difference."""

    model_type: str
    model_class: str = ""
    not_built: str = ""  # why transformers makes no tiny model of it
    layout: str = ""
    start: float = math.nan  # of the first loss, from ln 2
    reward: float = math.nan  # the largest at the first step
    steps: float = math.nan  # of losses, from plain torch
    moved: float = math.nan  # by how much the loss moved meanwhile
    # of trained weights, from plain torch, relative to how far they moved
    weights: float = math.nan
    export: float = math.nan  # of logits, from the policy's
    refusal: str = ""
    crash: str = ""
    notes: str = ""

    HEADER = (
        "| type | class | layout | start | steps | weights | export | refused, or not built |\n"
        "|---|---|---|---|---|---|---|---|"
    )

    @property
    def line(self) -> str:
        """The row of the table."""
        why = self.refusal or self.crash or (self.not_built and f"not built: {self.not_built}")
        numbers = [
            f"{self.start:.0e}",
            f"{self.steps:.0e}",
            f"{self.weights:.0e}",
            f"{self.export:.0e}",
        ]
        if why:
            numbers = [""] * len(numbers)
        return f"| {' | '.join([self.model_type, self.model_class, self.layout, *numbers, why])} |"

    @property
    def is_right(self) -> bool:
        """Return whether it trains with the right numbers, or one line refuses it, or there is no
        model.
        """
        trains = self.start < 1e-6 and self.reward == 0 and self.steps < 2e-4 and self.export < 1e-6
        return not self.crash and bool(trains or self.refusal or self.not_built)


def saved_model(model_type: str, folder: Path) -> Row:
    """A checkpoint of the type with random weights in a folder."""
    row = Row(model_type)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
            _scatter(model)
        row.model_class = type(model).__name__
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        row.not_built = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return row


@torch.no_grad()
def _scatter(model: PreTrainedModel) -> None:
    """Norms of 1 and biases of 0 would hide much."""
    for vector in (p for p in model.parameters() if p.ndim == 1):
        vector += torch.linspace(-0.1, 0.1, vector.numel(), dtype=vector.dtype)


class _Keep(TrainerCallback):
    """The policy, for after the run."""

    model: Any = None

    def on_train_begin(self, *_: Any, **options: Any) -> None:
        self.model = options["model"]


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "run": {"dir": str(folder / "runs"), "name": "r"},
        "model": {"path": str(folder / "model")},
        "data": {"train": str(write_jsonl(folder / "train.jsonl", ROWS))},
        "batch": {"global_batch_size": len(ROWS), "micro_batch_size": 2},
        "dpo": {"beta": BETA, "router_aux_loss_coef": 0.0},
        "optimizer": {"name": "torch.optim.SGD", "lr": RATE, "weight_decay": 0.0},
        "scheduler": {"name": "constant"},
        "training": {"max_steps": STEPS, "logging_steps": 1, "max_grad_norm": NORM},
        "precision": "fp32",
        "wandb": {"mode": "disabled"},
        **more,
    }


def checked(model_type: str, folder: Path, **more: Any) -> Row:
    """Everything of one type; `more`: settings."""
    row = saved_model(model_type, folder / "model")
    if row.not_built:
        return row
    expected = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    spec, keep, output = make_spec(settings(folder, **more)), _Keep(), StringIO()
    run_dir = RunDir(spec.run_dir)
    try:
        run_dir.begin(spec)
        with redirect_stdout(output):
            run(
                spec,
                World(0, 1, 0, torch.device("cpu")),
                NothingToSave(),
                wrap_callbacks=lambda callbacks: [*callbacks, keep],
            )
    except UserError as error:
        row.refusal = str(error)
        return row
    padded = [line for line in output.getvalue().splitlines() if line.startswith(PADDED)]
    row.layout = f"padded: {padded[0].removeprefix(PADDED)}" if padded else "packed"
    lines = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    row.start = abs(steps[0]["loss"] - math.log(2))
    row.reward = max(abs(steps[0][f"rewards/{side}"]) for side in ("chosen", "rejected", "margins"))
    start = copy.deepcopy(expected.state_dict())
    losses = plain_losses(expected)
    row.steps = max(abs(line["loss"] - loss) for line, loss in zip(steps, losses, strict=True))
    row.moved = max(abs(loss - losses[0]) for loss in losses)
    row.weights = _of_weights(keep.model, expected, start)
    row.export = _of_logits(keep.model, AutoModelForCausalLM.from_pretrained(run_dir.model))
    row.notes = " | ".join(
        line for line in output.getvalue().splitlines() if "frozen" in line or "noise" in line
    )
    return row


# --- plain torch ----------------------------------------------------------------------------------


def _sequences() -> list[tuple[list[int], list[int], list[int]]]:
    ids = tokenizer()
    return [
        (
            ids(row["prompt"])["input_ids"],
            *[[*ids(row[k])["input_ids"], ids.eos_token_id] for k in ("chosen", "rejected")],
        )
        for row in ROWS
    ]


def _logp(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Return the log-prob of one sequence alone, by the model's own whole forward."""
    tokens = torch.tensor([prompt + answer])
    logits = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return log_softmax(logits.double(), -1).gather(-1, torch.tensor(answer)[:, None]).sum()


def plain_losses(policy: PreTrainedModel) -> list[float]:
    """The loss before each step of DPO in plain torch; the policy is trained meanwhile, without
    noise.
    """
    reference = copy.deepcopy(policy).requires_grad_(False).eval()
    policy.eval()
    optimizer = torch.optim.SGD(policy.parameters(), lr=RATE)
    losses: list[float] = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses.append(0.0)
        for prompt, chosen, rejected in _sequences():
            ratio = [
                _logp(policy, prompt, answer) - _logp(reference, prompt, answer)
                for answer in (chosen, rejected)
            ]
            loss = -torch.nn.functional.logsigmoid(BETA * (ratio[0] - ratio[1])) / len(ROWS)
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), NORM)
        optimizer.step()
    return losses


def _of_weights(policy: Any, expected: PreTrainedModel, start: dict[str, torch.Tensor]) -> float:
    theirs, ours = dict(expected.named_parameters()), dict(policy.named_parameters())
    moved = max((p - start[name]).abs().max().item() for name, p in theirs.items())
    apart = max((p - ours[name]).abs().max().item() for name, p in theirs.items())
    return apart / max(moved, 1e-12)


@torch.no_grad()
def _of_logits(policy: Any, exported: PreTrainedModel) -> float:
    policy.eval(), exported.eval()
    if policy.config._attn_implementation == "eager":  # another kernel rounds otherwise
        exported.set_attn_implementation("eager")
    largest = 0.0
    for prompt, chosen, _ in _sequences():
        tokens = torch.tensor([prompt + chosen])
        ours, theirs = (m(input_ids=tokens, use_cache=False).logits for m in (policy, exported))
        largest = max(largest, (ours - theirs).abs().max().item())
    return largest
