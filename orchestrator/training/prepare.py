"""What can be made, and refused, before any rank starts: tokenizer, model config, tokenised data, a user's code."""

import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from orchestrator.data.collate import AdaptedCollator
from orchestrator.data.order import run_length
from orchestrator.data.pairs import Pairs, tokenized_pairs, without_held_out
from orchestrator.data.sources import check_source
from orchestrator.data.user_code import user_attribute
from orchestrator.dpo.losses import check_losses
from orchestrator.engines.optim import check_optim, optimizer_factory
from orchestrator.engines.precision import dtype_held, resolved
from orchestrator.models.adapters import check_adapter
from orchestrator.models.attention import choose_kernel
from orchestrator.models.policy import (
    check_fit,
    check_frozen,
    check_model,
    check_router,
    load_config,
    load_tokenizer,
    made_weights,
)
from orchestrator.models.reference import check_reference
from orchestrator.settings.load import DATA_KEYS, check_model_names, paths_in
from orchestrator.settings.rules import check_cache_with_collator, check_metric_for_best
from orchestrator.settings.spec import RunSpec, UserError
from orchestrator.training.callbacks import check_callbacks
from orchestrator.training.compute_metrics import UserMetrics, check_memory, user_metrics
from orchestrator.training.given import NOTHING, Given

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Parts:
    """The parts of a run that need no tokenised row."""

    tokenizer: "PreTrainedTokenizerBase"
    config: Any
    collator: AdaptedCollator | None  # of a user
    user_metrics: UserMetrics | None


@dataclass(frozen=True)
class Prepared(Parts):
    """The parts of a run that are built, or refused, before any rank starts."""

    train: Pairs
    eval: dict[str, Pairs]  # by the name of the evaluation set


def prepare(spec: RunSpec, given: Given = NOTHING) -> Prepared:
    """Tokenizer, model config and tokenised data, from the cache where they are there already. No collective.

    These are the checks of a run before it starts, in three lists. `orchestrator plan` makes the first two as they
    stand and the third on small data or on the first rows: a new check belongs into the first list that can make it.

    Raises:
        UserError: whatever is wrong with the data, the tokenizer, the model's config or the user's code.
    """
    check_code(spec, given)
    parts = load_parts(spec, given)
    if spec.engine.shards_weights and spec.model.init is not None:
        made_weights(spec, parts.tokenizer, dtype_held(spec.precision))  # once, for all ranks to map
    return tokenize(spec, parts)


def check_code(spec: RunSpec, given: Given = NOTHING) -> None:
    """Check what needs neither model nor rows: that the sources exist, and all code that the settings name.

    Raises:
        UserError: the first check that fails.
    """
    quiet()
    check_model_names(spec)
    for key, source in paths_in(spec, DATA_KEYS).items():
        check_source(key, source)
    check_callbacks(spec, given.callbacks)
    check_optim(spec.optimizer, spec.scheduler)
    check_losses(spec.dpo, with_margins=spec.data.margin_column is not None)
    if spec.data.collator is not None:
        user_attribute("data.collator", spec.data.collator.path)
    if spec.evaluation.compute_metrics is not None:
        user_attribute("evaluation.compute_metrics", spec.evaluation.compute_metrics)


def check_device(spec: RunSpec, device: torch.device) -> None:
    """Check what the settings need of the device that a rank computes on.

    Raises:
        UserError: the first check that fails.
    """
    precision = resolved(spec.precision, device)
    if spec.data.collator is None and spec.model.attention != "padded":
        choose_kernel(spec.model.attention, device, precision)
    optimizer_factory(spec.optimizer, device)


def load_parts(spec: RunSpec, given: Given = NOTHING) -> Parts:
    """Load tokenizer and model config, and check all that follows from them and from the files of the models.

    Raises:
        UserError: the first check that fails.
    """
    tokenizer = load_tokenizer(spec)
    config = load_config(spec, tokenizer)
    collator = _user_collator(spec, given, tokenizer, config)
    metrics = user_metrics(spec, given, pad_id(tokenizer, config))
    check_metric_for_best(spec, has_more=metrics is not None)
    check_frozen(config, spec)
    check_router(config, spec.dpo)
    if spec.model.lora is not None:
        check_adapter(spec.model.lora)
    check_model(spec, config)
    check_reference(spec, config, tokenizer)
    return Parts(tokenizer, config, collator, metrics)


def tokenize(spec: RunSpec, parts: Parts, first: int | None = None) -> Prepared:
    """Tokenise all sets, and check what follows from the tokens.

    first: read only so many rows of each source, and hold none of them out.

    Raises:
        UserError: the first check that fails.
    """
    tokenizer, config = parts.tokenizer, parts.config
    train = tokenized_pairs(spec.data, "train", tokenizer, spec.cache_dir, first=first)
    held_out = {
        name: tokenized_pairs(spec.data, "eval", tokenizer, spec.cache_dir, name, first) for name in spec.data.eval
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
    return Prepared(**vars(parts), train=train, eval=held_out)


def _steps(spec: RunSpec, train: Pairs) -> int:
    return run_length(train.pairs_per_epoch, spec.batch.global_batch_size, spec.training).steps


def _user_collator(spec: RunSpec, given: Given, tokenizer: Any, config: Any) -> AdaptedCollator | None:
    """That of the settings, or of a Python user."""
    named, collator = spec.data.collator, given.data_collator
    if named is not None and collator is not None:
        raise UserError("data.collator", named.path, "data_collator is given as well", "remove one of the two")
    if collator is not None:
        check_cache_with_collator(spec.reference, "data_collator")
    found = named if collator is None else collator
    vocabulary = config.get_text_config().vocab_size
    return None if found is None else AdaptedCollator(found, pad_id(tokenizer, config), vocabulary)


def pad_id(tokenizer: "PreTrainedTokenizerBase", config: Any) -> int:
    """Return the token that fills up padded rows, where it is masked.

    A pad token that was added without resizing the model's embeddings has an id that they lack: another token then
    takes its place, which changes nothing.
    """
    vocabulary = config.get_text_config().vocab_size
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in ids if isinstance(token, int) and token < vocabulary), 0)


def quiet() -> None:
    """Libraries' progress bars and advice would bury our lines."""
    import transformers

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns of that, and accelerate imports it in any run
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.*")
