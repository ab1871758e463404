"""Check, before any weight is loaded, that the policy fits the settings and the pairs."""

from typing import Any

import torch

from orchestrator.data.order import fed_lengths, longest_sequences
from orchestrator.data.pairs import Pairs
from orchestrator.models.adapters import add_adapter
from orchestrator.models.loading import check_weights
from orchestrator.models.rope import most_positions
from orchestrator.settings.counts import counted
from orchestrator.settings.errors import UserError
from orchestrator.settings.loss import DpoSpec
from orchestrator.settings.run import RunSpec


def check_model(spec: RunSpec, config: Any) -> None:
    """Check the files of model.path, and that the adapter fits the model, without reading the
    base's weights.

    Raises:
        UserError: weights are missing or not used, or the adapter does not fit.
    """
    if spec.model.path is None:
        return
    model = check_weights("model.path", spec.model.path, config)
    if model is not None and spec.model.lora is not None:
        add_adapter(
            model, spec.model.lora, spec.run.seed, torch.float32, spec.model.disable_dropout
        )


def check_frozen(config: Any, spec: RunSpec) -> None:
    """Check that fewer layers are frozen than the model has.

    Raises:
        UserError: the model has no layer left above the frozen ones.
    """
    layers, frozen = getattr(config.get_text_config(), "num_hidden_layers", 0), spec.frozen_layers
    if frozen is not None and frozen >= layers:
        key = "reference.num_shared_layers"
        if spec.model.num_frozen_layers:
            key = "model.num_frozen_layers"
        raise UserError(
            key,
            frozen,
            f"the model has {counted(layers, 'layer')}",
            f"set it to {layers - 1} or less",
        )


def check_router(config: Any, dpo: DpoSpec) -> None:
    """Check that a mixture of experts has no load-balancing loss: TRL would add it, and it is not
    computed here.

    Raises:
        UserError: the coefficient in the model's config is not 0, and the settings do not set it to
            0.
    """
    text = config.get_text_config()
    coefficient = getattr(text, "router_aux_loss_coef", 0)
    if hasattr(text, "output_router_logits") and coefficient and dpo.router_aux_loss_coef is None:
        rule = (
            f"the model's config sets {coefficient} for a load-balancing loss, which is not "
            "computed here"
        )
        raise UserError(
            "dpo.router_aux_loss_coef", None, rule, "set it to 0 to train without that loss"
        )


def check_fit(config: Any, pairs: Pairs, key: str, spec: RunSpec) -> None:
    """Check that the pairs fit the model: not longer than its positions, and no ids outside its
    vocabulary.

    Raises:
        UserError: a pair is too long (with its row), or an id is outside the vocabulary.
    """
    vocabulary = config.get_text_config().vocab_size
    if pairs.largest_id >= vocabulary:
        rule = (
            f"the model's vocabulary has {vocabulary} tokens, the tokenizer returned id "
            f"{pairs.largest_id} for {key}"
        )
        if spec.model.init is not None and spec.model.tokenizer is None:
            keys = spec.model.init.config
            raise UserError("model.init.config", keys, rule, "remove vocab_size from it")
        raise UserError(
            "model.tokenizer", spec.model.tokenizer, rule, "use the model's own tokenizer"
        )
    limit = most_positions(config)
    longest = longest_sequences(fed_lengths(pairs.lengths, spec.data.keep_last))
    worst = int(longest.argmax())
    if limit is not None and longest[worst] > limit:
        raise UserError(
            str(pairs.place(pairs.pair_ids[worst])),
            f"{longest[worst]} tokens",
            f"is longer than the model's {limit} positions",
            f"set data.max_length={limit} or less",
        )
