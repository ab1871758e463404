"""Call a user's compute_metrics on rank 0 with the predictions of an evaluation, and check what it
returns.

Legend: N pairs of the evaluation set, B pairs of a batch, T tokens of the batch's longest sequence,
V vocabulary.
"""

import inspect
from bdb import BdbQuit
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import EvalPrediction

from orchestrator.data.collate import PairBatch, PreferenceCollator
from orchestrator.data.loader import Loader
from orchestrator.data.order import Integers, fed_lengths, longest_sequences
from orchestrator.data.pairs import Pairs
from orchestrator.data.user_collator import AdaptedCollator
from orchestrator.dpo.losses import PairTerms, rewards
from orchestrator.dpo.step import StepOutput
from orchestrator.engines.base import Engine
from orchestrator.engines.precision import dtype_held
from orchestrator.models.head import Head
from orchestrator.models.layers import body_of
from orchestrator.models.plain_head import CHUNK_LOGITS
from orchestrator.settings.errors import UserError
from orchestrator.settings.loss import DpoSpec
from orchestrator.settings.run import RunSpec
from orchestrator.training.metrics import EVALUATED
from orchestrator.training.user_objects import UserObjects
from orchestrator.user_code import FIX_IT, error_of_user_code, user_attribute, user_code
from orchestrator.user_time import USER_TIME
from orchestrator.world import World

KEY = "evaluation.compute_metrics"
MOST_BYTES = 8 * 2**30  # limit of logits gathered in the memory of rank 0
PADDING = -100  # fills up shorter sequences, as in transformers
MetricCalls = list[tuple[EvalPrediction, bool]]
"""(prediction, is_last) calls to make on rank 0 before the next collective; empty on other ranks.
"""


class Predictions(NamedTuple):
    """The predictions without evaluation.logits: one row per pair of the set, in its order and
    independent of its weight, with the chosen completion in column 0 and the rejected one in column
    1. The label of every pair is 0, the column of the chosen. With evaluation.batch_eval_metrics
    they are tensors, else arrays.
    """

    logps: Any  # [N, 2] fp64 log-prob of the completion, in nats
    ref_logps: Any  # [N, 2] fp64 log-prob under the reference
    rewards: Any  # [N, 2] fp64
    lengths: Any  # [N, 2] int64 tokens of the completion


@dataclass(frozen=True)
class UserMetrics:
    """A user's function and the settings of its calls."""

    function: Callable[..., Mapping[str, Any]]
    name: str  # in errors
    logits: bool
    batched: bool
    batch_size: int  # pairs
    padded: PreferenceCollator  # with TRL's layout of batches, for logits

    def numbers(
        self, world: World, rounds: Iterator[MetricCalls], prefix: str, where: str
    ) -> dict[str, float]:
        """Call the function on rank 0 and return its numbers, with the prefix before their names,
        on every rank. Collective.

        rounds: the calls, in rounds between which ranks meet.

        Raises:
            UserError: on every rank, if the function raises or does not return a dict of numbers;
                or an error of `user_code`.
        """
        numbers: dict[str, float] = {}
        for calls in rounds:
            answer, failure = self._answer(calls, prefix, where) if world.is_main else ({}, None)
            numbers, error = world.gather((answer, failure))[0]
            if error is not None:
                raise failure or error  # on rank 0 `failure` has the user's exception as its cause
        return numbers

    def _answer(
        self, calls: MetricCalls, prefix: str, where: str
    ) -> tuple[dict[str, float], Exception | None]:
        returned: Any = {}
        try:
            for prediction, is_last in calls:
                arguments = {"compute_result": is_last} if self.batched else {}
                with USER_TIME.of(self.name):
                    returned = self.function(prediction, **arguments)
        except BdbQuit:  # quitting the debugger in the function ends the run
            raise
        except (Exception, SystemExit) as error:
            cure = FIX_IT
            if not self.logits:
                cure += "; or set evaluation.logits=true to receive logits, as in TRL"
            failure = error_of_user_code(KEY, self.name, error, where, cure)
            failure.__cause__ = error
            return {}, failure
        try:
            return _numbers_of(returned, prefix) if calls and calls[-1][1] else {}, None
        except ValueError as wrong:
            cure = 'return a dict of numbers by name, for example {"accuracy": 0.5}'
            return {}, UserError(KEY, self.name, f"returned {wrong} ({where})", cure)

    def of_pairs(self, table: "PairTable", world: World, pairs: int) -> Iterator[MetricCalls]:
        """Yield the calls without logits, one for all pairs or one per batch. Collective."""
        whole = table.gathered(world, pairs)
        if whole is None:
            yield []
        elif not self.batched:
            columns = [column.numpy() for column in whole]
            table_of_all: Any = Predictions(*columns)
            yield [(EvalPrediction(table_of_all, np.zeros(pairs, np.int64)), True)]
        else:
            calls: MetricCalls = []
            for start in range(0, pairs, self.batch_size):
                stop = start + self.batch_size
                part: Any = Predictions(*(column[start:stop] for column in whole))
                labels: Any = torch.zeros(len(part.logps), dtype=torch.int64)
                calls.append((EvalPrediction(part, labels), stop >= pairs))
            yield calls

    def of_logits(
        self, engine: Engine, loader: Loader, world: World, step: int, each: Callable[[], None]
    ) -> Iterator[MetricCalls]:
        """Yield the calls with logits [2B, T, V] and input_ids [2B, T] of batches of B pairs, as in
        TRL's DPOTrainer.

        Batches are in the order of the set, their chosen sequences first. They are passed in one
        call, shorter batches filled up with PADDING, or in one call each as soon as they are
        computed. (Of a last batch that is not full, TRL keeps as many rows as it has pairs.)
        Collective.

        each: called before each batch.
        """
        kept: deque[tuple[torch.Tensor, torch.Tensor]] = deque()
        for start in range(0, len(loader.pairs), self.batch_size):
            each()
            end = min(start + self.batch_size, len(loader.pairs))
            batch = self._collated(loader, np.arange(start, end), world, step)
            logits: Any = engine.run_in_forward(
                partial(_gathered_logits, engine.step.policy, batch.to(world.device), world)
            )
            labels: Any = batch.input_ids
            if not self.batched:
                kept += [(logits, labels)] if logits is not None else []
            elif logits is not None:
                yield [(EvalPrediction(logits, labels), end == len(loader.pairs))]
            else:
                yield []
        if not self.batched:
            yield [(_concatenated(kept), True)] if kept else []

    def _collated(self, loader: Loader, indices: Integers, world: World, step: int) -> PairBatch:
        if not isinstance(loader.collator, AdaptedCollator):
            return self.padded([loader.pairs[int(index)] for index in indices])
        # on one rank: it may draw random numbers
        batch = loader.batch(indices, step) if world.is_main else None
        return world.gather(batch)[0]


class PairTable:
    """The predictions of an evaluation for the pairs of this rank, on its device."""

    def __init__(self, dpo: DpoSpec) -> None:
        self.dpo = dpo
        self._indices: list[Integers] = [np.zeros(0, np.int64)]
        self._rows: list[torch.Tensor] = [torch.zeros(0, 4, 2, dtype=torch.float64)]

    def add(self, indices: Integers, batch: PairBatch, output: StepOutput) -> None:
        """Add the output of a step for the pairs at these indices of the set."""
        tokens = batch.completion_tokens.to(output.logps)
        of_pairs = torch.cat(
            rewards(PairTerms.split(output.logps, output.ref_logps, tokens), self.dpo)
        )
        columns = torch.stack([output.logps, output.ref_logps, of_pairs, tokens])
        self._indices.append(indices)
        self._rows.append(columns.unflatten(1, (2, -1)).permute(2, 0, 1))

    def gathered(self, world: World, pairs: int) -> Predictions | None:
        """Return the predictions for the whole set on rank 0, None on other ranks. Collective."""
        rows = torch.cat([rows.cpu() for rows in self._rows])
        parts = world.gather((np.concatenate(self._indices), rows.numpy()))
        if not world.is_main:
            return None
        whole = torch.empty(pairs, 4, 2, dtype=torch.float64)
        for indices, rows in parts:
            whole[torch.from_numpy(indices)] = torch.from_numpy(rows)
        logps, ref_logps, of_pairs, lengths = whole.unbind(1)
        return Predictions(logps, ref_logps, of_pairs, lengths.long())


def _gathered_logits(model: Any, batch: PairBatch, world: World) -> torch.Tensor | None:
    """Return the logits [2B, T, V] of a padded batch on the host of rank 0, None on other ranks.

    To be called in a forward pass. Each rank computes some pairs, each separately, so that the
    numbers do not depend on the number of ranks.
    """
    pairs, (_, width), whole = len(batch.pair_ids), batch.input_ids.shape, None
    head = Head.of(model)
    at_once = max(1, CHUNK_LOGITS // (2 * head.vocabulary * world.size))  # positions
    for first in range(0, pairs, world.size):
        # repeats a pair if none is left: a forward pass may be collective
        mine = min(first + world.rank, pairs - 1)
        rows = [mine, pairs + mine]
        assert batch.attention_mask is not None
        hidden = body_of(model)(
            input_ids=batch.input_ids[rows],
            attention_mask=batch.attention_mask[rows],
            use_cache=False,
        ).last_hidden_state
        for start in range(0, width, at_once):
            parts = world.collect(head(hidden[:, start : start + at_once]))
            for pair, part in enumerate(parts[: pairs - first], first):
                if whole is None:
                    whole = torch.empty(2 * pairs, width, part.shape[-1], dtype=part.dtype)
                whole[[pair, pairs + pair], start : start + at_once] = part.cpu()
    return whole


def _concatenated(kept: deque[tuple[torch.Tensor, torch.Tensor]]) -> EvalPrediction:
    """Join the batches into one prediction and free them one by one: memory of the result is
    allocated as it is written.
    """
    first = kept[0][0]
    rows, width = sum(len(ids) for _, ids in kept), max(ids.shape[1] for _, ids in kept)
    logits = torch.empty(rows, width, first.shape[2], dtype=first.dtype)
    labels = torch.full((rows, width), PADDING)
    del first
    at = 0
    while kept:
        batch, ids = kept.popleft()
        here, used = slice(at, at + len(ids)), ids.shape[1]
        logits[here, :used], logits[here, used:], labels[here, :used] = batch, PADDING, ids
        at += len(ids)
    return EvalPrediction(logits.numpy(), labels.numpy())


def _numbers_of(returned: Any, prefix: str) -> dict[str, float]:
    """Check what a user's function returned, and return its numbers with the prefix before their
    names.

    Raises:
        ValueError: it is not a dict of numbers, or has the name of a metric of every evaluation.
    """
    if not isinstance(returned, Mapping):
        raise ValueError(f"a {type(returned).__name__}")
    numbers: dict[str, float] = {}
    for name, value in returned.items():
        if not isinstance(name, str):
            raise ValueError(f"the name {name!r}, which is not a string")
        number = _number(value)
        if number is None:
            raise ValueError(f"{name} = {value!r:.60}, which is not a number")
        name = name.removeprefix(prefix)
        if name in EVALUATED:
            raise ValueError(f"{name}, which is the name of a metric of every evaluation")
        numbers[prefix + name] = number
    return numbers


def _number(value: Any) -> float | None:
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        value = value.item() if np.prod(value.shape) == 1 else None
    return float(value) if isinstance(value, int | float) else None


# --- before any rank starts -----------------------------------------------------------------------


def user_metrics(spec: RunSpec, user: UserObjects, pad_token_id: int) -> UserMetrics | None:
    """Return the function of the settings or of the caller; it is not called yet.

    Raises:
        UserError: there is none but its settings are set, or there are two, or it does not accept
            its arguments.
    """
    settings = spec.evaluation
    function: Any = user.compute_metrics
    name = getattr(function, "__name__", type(function).__name__)
    if settings.compute_metrics is not None:
        name = settings.compute_metrics
        if function is not None:
            rule = "cannot be combined with compute_metrics"
            raise UserError(KEY, name, rule, "remove one of the two")
        function = user_attribute(KEY, name)
    if function is None:
        for key in ("logits", "batch_eval_metrics", "batch_size"):
            if value := getattr(settings, key):
                rule = "applies only with evaluation.compute_metrics"
                cure = "set that to a function as module:attr, or remove it"
                raise UserError(f"evaluation.{key}", value, rule, cure)
        return None
    if not spec.data.eval_sets:
        cure = "set data.eval, or data.eval_fraction=0.05"
        raise UserError("compute_metrics", name, "needs evaluation pairs", cure)
    batched = settings.batch_eval_metrics
    arguments: dict[str, Any] = {"compute_result": True} if batched else {}
    with user_code(KEY, name, "when it is built"):
        try:
            function = function() if inspect.isclass(function) else function
            inspect.signature(function).bind(None, **arguments)
        except (TypeError, ValueError) as error:
            takes = "an EvalPrediction and compute_result" if batched else "an EvalPrediction"
            instances = "a class without arguments whose instances are such functions"
            cure = f"use a function of {takes}, or {instances}"
            raise UserError(KEY, name, f"cannot be called ({error})", cure) from None
    batch_size = settings.batch_size or spec.batch.micro_batch_size or 1
    padded = PreferenceCollator(pad_token_id, spec.data)
    return UserMetrics(function, name, settings.logits, batched, batch_size, padded)


def bytes_together(user: UserMetrics, pairs: Pairs, vocabulary: int, spec: RunSpec) -> int:
    """Return the bytes of an evaluation set's logits that are in the memory of rank 0 at a time."""
    longest = int(longest_sequences(fed_lengths(pairs.lengths, spec.data.keep_last)).max())
    at_a_time = min(user.batch_size, len(pairs)) if user.batched else len(pairs)
    return 2 * at_a_time * longest * vocabulary * dtype_held(spec.precision).itemsize


def check_memory(user: UserMetrics, pairs: Pairs, vocabulary: int, key: str, spec: RunSpec) -> None:
    """Check that the logits of an evaluation fit the memory limit of rank 0.

    Raises:
        UserError: they do not.
    """
    if not user.logits or (size := bytes_together(user, pairs, vocabulary, spec)) <= MOST_BYTES:
        return
    cure = "set evaluation.batch_eval_metrics=true, or remove evaluation.logits"
    if user.batched:
        cure = f"set evaluation.batch_size below {user.batch_size}, or data.max_length lower"
    rule = (
        f"{size / 2**30:,.0f} GB of logits of {key} would be gathered on rank 0; the limit is "
        f"{MOST_BYTES >> 30} GB"
    )
    raise UserError("evaluation.logits", True, rule, cure)
