"""Load and check everything that is possible before ranks start: tokenizer, model config, tokenised
data, user code.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from orchestrator.data.file_lock import Poll, no_poll
from orchestrator.data.held_out import without_held_out
from orchestrator.data.order import run_length
from orchestrator.data.pair_cache import tokenized_pairs
from orchestrator.data.pairs import Pairs
from orchestrator.data.sources import check_source
from orchestrator.data.user_collator import AdaptedCollator
from orchestrator.dpo.user_losses import check_losses
from orchestrator.engines.optim import check_optim, optimizer_factory
from orchestrator.engines.precision import dtype_held, resolved
from orchestrator.models.adapters import check_adapter
from orchestrator.models.attention import choose_kernel
from orchestrator.models.build_reference import check_reference
from orchestrator.models.new_model import new_weights
from orchestrator.models.policy import load_config, load_tokenizer
from orchestrator.models.policy_checks import check_fit, check_frozen, check_model, check_router
from orchestrator.settings.errors import StopRequested, UserError
from orchestrator.settings.load import (
    ALL_PATH_KEYS,
    DATA_KEYS,
    check_model_names,
    paths_in,
)
from orchestrator.settings.os_errors import os_errors
from orchestrator.settings.run import RunSpec
from orchestrator.training.callbacks.build import check_callbacks
from orchestrator.training.compute_metrics import UserMetrics, check_memory, user_metrics
from orchestrator.training.metrics import EVALUATED
from orchestrator.training.user_objects import NOTHING, UserObjects
from orchestrator.user_code import user_attribute

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OfSet = TypeVar("OfSet")


@dataclass(frozen=True)
class Parts:
    """The parts of a run that do not depend on tokenised rows."""

    tokenizer: "PreTrainedTokenizerBase"
    config: Any
    collator: AdaptedCollator | None  # the user's
    user_metrics: UserMetrics | None


@dataclass(frozen=True)
class PreparedRun(Parts):
    """The parts of a run that are built before any rank starts."""

    train: Pairs
    eval: dict[str, Pairs]  # by the name of the evaluation set


def prepare(spec: RunSpec, user: UserObjects = NOTHING, poll: Poll = no_poll) -> PreparedRun:
    """Load tokenizer, model config and tokenised data, from the cache if they are in it.

    No collective. poll: called again and again while rows are tokenised, to be able to stop.

    The checks before a run are in three functions: check_code, load_parts and tokenize.
    `orchestrator plan` calls the first two unchanged and the third on small data or on the first
    rows: add a new check to the first one that can do it.

    Raises:
        UserError: the data, the tokenizer, the model's config or the user's code are wrong.
        StopRequested: `poll` raised it.
    """
    try:
        return _prepare(spec, user, poll)
    except StopRequested as stop:
        raise StopRequested(f"{stop}, before its data were ready") from None


def _prepare(spec: RunSpec, user: UserObjects, poll: Poll) -> PreparedRun:
    check_code(spec, user)
    cache = "data.cache_dir" if spec.data.cache_dir else "run.dir"
    paths = paths_in(spec, ALL_PATH_KEYS) | {cache: str(spec.cache_dir)}
    with os_errors(paths, cache):
        parts = load_parts(spec, user)
        if spec.engine.shards_weights and spec.model.init is not None:
            # once, for all ranks to map
            new_weights(spec, parts.tokenizer, dtype_held(spec.precision), poll)
        return tokenize(spec, parts, poll=poll)


def check_code(spec: RunSpec, user: UserObjects = NOTHING) -> None:
    """Check everything that needs neither model nor rows: that the sources exist, and the code that
    the settings name.

    Raises:
        UserError: the first check that fails.
    """
    quiet()
    check_model_names(spec)
    for key, source in paths_in(spec, DATA_KEYS).items():
        check_source(key, source)
    if user.ref_model is not None:
        name = getattr(user.ref_model, "__name__", type(user.ref_model).__name__)
        spec.reference.check_ref_model(name)
    check_callbacks(spec, user.callbacks)
    check_optim(spec.optimizer, spec.scheduler)
    check_losses(spec.dpo, with_margins=spec.data.margin_column is not None)
    if spec.data.collator is not None:
        user_attribute("data.collator", spec.data.collator.path)
    if spec.evaluation.compute_metrics is not None:
        user_attribute("evaluation.compute_metrics", spec.evaluation.compute_metrics)


def check_device(spec: RunSpec, device: torch.device) -> None:
    """Check that the device of a rank supports the settings.

    Raises:
        UserError: the first check that fails.
    """
    precision = resolved(spec.precision, device)
    if spec.data.collator is None and spec.model.attention != "padded":
        choose_kernel(spec.model.attention, device, precision)
    optimizer_factory(spec.optimizer, device)


def load_parts(spec: RunSpec, user: UserObjects = NOTHING) -> Parts:
    """Load tokenizer and model config, and check everything that depends on them and on the files
    of the models.

    Raises:
        UserError: the first check that fails.
    """
    tokenizer = load_tokenizer(spec)
    config = load_config(spec, tokenizer)
    collator = _user_collator(spec, user, tokenizer, config)
    metrics = user_metrics(spec, user, pad_id(tokenizer, config))
    has_more = metrics is not None
    spec.evaluation.check_metrics(spec.data.eval_sets, EVALUATED, has_more)
    check_frozen(config, spec)
    check_router(config, spec.dpo)
    if spec.model.lora is not None:
        check_adapter(spec.model.lora)
    check_model(spec, config)
    check_reference(spec, config, tokenizer)
    return Parts(tokenizer, config, collator, metrics)


def tokenize(
    spec: RunSpec, parts: Parts, first: int | None = None, poll: Poll = no_poll
) -> PreparedRun:
    """Tokenise all sets, and check everything that depends on the tokens.

    first: read only this number of rows of each source, and hold none of them out.

    Raises:
        UserError: the first check that fails.
    """
    tokenizer, config = parts.tokenizer, parts.config
    train = tokenized_pairs(spec.data, "train", tokenizer, spec.cache_dir, first=first, poll=poll)
    held_out = {
        name: tokenized_pairs(spec.data, "eval", tokenizer, spec.cache_dir, name, first, poll)
        for name in spec.data.eval
    }
    check_fit(config, train, "data.train", spec)
    for name, pairs in held_out.items():
        check_fit(config, pairs, spec.data.eval_key(name), spec)
    if spec.data.eval_fraction is not None and first is None:
        train, held_out[""] = without_held_out(train, spec.data.eval_fraction, spec.run.seed)
    if first is None:
        check_optim(spec.optimizer, spec.scheduler, _steps(spec, train))
    if parts.user_metrics is not None:
        vocabulary = config.get_text_config().vocab_size
        for name, pairs in held_out.items():
            check_memory(parts.user_metrics, pairs, vocabulary, spec.data.eval_key(name), spec)
    return PreparedRun(**vars(parts), train=train, eval=held_out)


def _steps(spec: RunSpec, train: Pairs) -> int:
    return run_length(train.pairs_per_epoch, spec.batch.global_batch_size, spec.training).steps


def _user_collator(
    spec: RunSpec, user: UserObjects, tokenizer: Any, config: Any
) -> AdaptedCollator | None:
    """Return the user's collator, from the settings or from the caller."""
    named, collator = spec.data.collator, user.data_collator
    if named is not None and collator is not None:
        raise UserError(
            "data.collator",
            named.path,
            "cannot be combined with data_collator",
            "remove one of the two",
        )
    if collator is not None:
        spec.reference.check_collator("data_collator")
    source = named if collator is None else collator
    vocabulary = config.get_text_config().vocab_size
    return (
        None if source is None else AdaptedCollator(source, pad_id(tokenizer, config), vocabulary)
    )


def named_sets(train: OfSet, evaluation: Mapping[str, OfSet]) -> Iterator[tuple[str, OfSet]]:
    """Yield what belongs to each set with the name of the set in printed lines."""
    yield "training", train
    for name, each in evaluation.items():
        yield f"{name} evaluation" if name else "evaluation", each


def pad_id(tokenizer: "PreTrainedTokenizerBase", config: Any) -> int:
    """Return the id of the token that fills up padded rows, where it is masked.

    A pad token that was added without resizing the model's embeddings has an id outside them:
    another token then replaces it, which does not change the results.
    """
    vocabulary = config.get_text_config().vocab_size
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in ids if isinstance(token, int) and token < vocabulary), 0)


def quiet() -> None:
    """Switch off progress bars and advice of libraries, which would hide our lines."""
    import transformers

    if not torch.cuda.is_available():
        # otherwise it warns, and accelerate imports it in any run
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.*")
