"""Tokenise a row: the token ids of its prompt and both completions, exactly as in TRL 1.16."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from orchestrator.data.row import BadRow, Row
from orchestrator.data.shapes import checked, template_arguments
from orchestrator.settings.data import DataSpec
from orchestrator.settings.errors import UserError, message_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Arguments of apply_chat_template that a row may set although templates do not read them as
# variables.
NO_VARIABLES = ("chat_template", "continue_final_message", "sanitize_control_tokens")


class TokenizedPair(NamedTuple):
    """Token ids of one pair. The model's sequences are prompt + chosen and prompt + rejected."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a hash of all that determines token ids: vocabulary, merges, special tokens, chat
    template.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = backend.to_str()
    else:
        state = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    parts = [
        state,
        str(tokenizer.chat_template),
        str(tokenizer.special_tokens_map),
        type(tokenizer).__name__,
    ]
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()


def tokenize_pair(
    row: Row, tokenizer: "PreTrainedTokenizerBase", data: DataSpec
) -> tuple[TokenizedPair, list[int]]:
    """Return `tokenize_checked` of a raw row.

    Raises:
        BadRow: the row is malformed.
        UserError: the chat template does not fit the settings.
    """
    return tokenize_checked(checked(row, data).row, tokenizer, data)


def tokenize_checked(
    row: Row, tokenizer: "PreTrainedTokenizerBase", data: DataSpec
) -> tuple[TokenizedPair, list[int]]:
    """Return token ids exactly as TRL 1.16: EOS on plain text only, completion from where the ids
    diverge.

    Also returns the last tokens of the prompt, tokenised alone, that are in neither sequence: they
    merge with the completion's first tokens, or the template renders the prompt differently when an
    answer follows.

    Args:
        row: a row of `checked`.
        tokenizer: the model's tokenizer.
        data: the settings of the data.

    Raises:
        BadRow: the chat template does not accept the row.
        UserError: the chat template does not fit the settings.
    """
    if isinstance(row["prompt"], list):
        prompt, chosen, rejected = _conversations(row, tokenizer, data)
    else:
        eos = str(tokenizer.eos_token)
        ends = [
            text if text.endswith(eos) else text + eos for text in (row["chosen"], row["rejected"])
        ]
        prompt, chosen, rejected = (
            tokenizer(text=text)["input_ids"]
            for text in (row["prompt"], *(row["prompt"] + end for end in ends))
        )
    start = min(common_prefix(prompt, chosen), common_prefix(prompt, rejected))
    return TokenizedPair(prompt[:start], chosen[start:], rejected[start:]), prompt[start:]


def truncated(pair: TokenizedPair, data: DataSpec) -> TokenizedPair:
    """Return a pair truncated as set: the end of the prompt, the start of the completions, then
    max_length of both.

    The collator applies keep_end, as the prompts of the two sides would differ.

    Raises:
        BadRow: the pair has nothing left to train on.
    """
    prompt = (
        pair.prompt_ids[-data.max_prompt_length :] if data.max_prompt_length else pair.prompt_ids
    )
    room = data.max_completion_length
    if data.truncation == "keep_start" and data.max_length is not None:
        left = data.max_length - len(prompt)
        if left <= 0:
            raise BadRow(
                "prompts that fill data.max_length",
                f"its prompt alone has {len(prompt)} tokens, data.max_length is {data.max_length}",
            )
        room = min(left, room or left)
    pair = TokenizedPair(prompt, pair.chosen_ids[:room], pair.rejected_ids[:room])
    if not pair.chosen_ids or not pair.rejected_ids:
        raise BadRow(
            "empty completions",
            f"{'chosen' if not pair.chosen_ids else 'rejected'} has no token of its own",
        )
    if pair.chosen_ids == pair.rejected_ids:
        raise BadRow("ties", "chosen equals rejected")
    return pair


def _conversations(
    row: Row, tokenizer: "PreTrainedTokenizerBase", data: DataSpec
) -> Iterator[list[int]]:
    """Yield the token ids of the prompt (with generation prompt), and of the prompt with each of
    the two answers.
    """
    prompt, arguments = row["prompt"], template_arguments(row, data)
    if data.system_prompt and not any(
        message["role"] in ("system", "developer") for message in prompt
    ):
        prompt = [{"role": "system", "content": data.system_prompt}, *prompt]
    try:
        template = tokenizer.get_chat_template(arguments.get("chat_template"), arguments["tools"])
    except ValueError:
        raise UserError(
            "model.tokenizer",
            tokenizer.name_or_path,
            "has no chat template"
            + (" that is the default" if tokenizer.chat_template else "")
            + ", but the data are conversations",
            "set data.chat_template, use an instruct model's tokenizer, or write the rows as "
            "plain text",
        ) from None
    _check_settings_read(template, data)
    if arguments["tools"] and "tools" not in _words(template):
        # The answers depend on the tools. A row's own variables are only reported: see
        # unread_variables.
        raise BadRow(
            "malformed rows",
            "has tools, not read by the chat template",
            "set data.chat_template to one that does",
        )
    yield _chat(tokenizer, data, prompt, add_generation_prompt=True, **arguments)
    for side in ("chosen", "rejected"):
        yield _chat(tokenizer, data, prompt + row[side], **arguments)


def _check_settings_read(template: str, data: DataSpec) -> None:
    """Check that the template reads every variable of the settings, which may be misspelt."""
    for name, value in data.chat_template_kwargs.items():
        if value not in (None, []) and not _reads(template, name):
            near = _nearest(template, name)
            cure = "remove it, or set data.chat_template to one that does"
            if near:
                cure = f"did you mean {near}?"
            raise UserError(
                f"data.chat_template_kwargs.{name}", value, "is not read by the chat template", cure
            )


def unread_variables(row: Row, tokenizer: "PreTrainedTokenizerBase", data: DataSpec) -> list[str]:
    """Return the names of a row's own chat_template_kwargs that its chat template does not read.

    Each name is followed by the most similar variable that the template reads. The row trains
    without them, as in TRL: the same rows may serve templates of several models. row: a row of
    `checked`.
    """
    if not row.get("chat_template_kwargs") or isinstance(row["chosen"], str):
        return []
    arguments = template_arguments(row, data)
    template = tokenizer.get_chat_template(arguments.get("chat_template"), arguments["tools"])
    unread = [name for name in row["chat_template_kwargs"] if not _reads(template, name)]
    return [
        f"{name} (it reads {near})" if (near := _nearest(template, name)) else name
        for name in unread
    ]


def _reads(template: str, name: str) -> bool:
    return name in NO_VARIABLES or name in _words(template)


@lru_cache
def _nearest(template: str, name: str) -> str | None:
    return next(iter(difflib.get_close_matches(name, _words(template), n=1)), None)


@lru_cache
def _words(template: str) -> frozenset[str]:
    """Return every word of a template, a superset of its variable names."""
    return frozenset(re.findall(r"\w+", template))


def _chat(
    tokenizer: "PreTrainedTokenizerBase", data: DataSpec, messages: list[Row], **options: Any
) -> list[int]:
    from jinja2 import TemplateSyntaxError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)[
            "input_ids"
        ]  # pyright: ignore
    except TemplateSyntaxError as error:
        key, value = "data.chat_template", data.chat_template
        if value is None:
            key, value = "model.tokenizer", tokenizer.name_or_path
        rule = f"has a chat template that is not Jinja: {error.message} (line {error.lineno})"
        raise UserError(key, value, rule, "fix that line") from None
    except Exception as error:  # templates raise any exception (roles must alternate, ...)
        raise BadRow(
            "malformed rows", f"the chat template rejects it: {message_of(error)}"
        ) from None


def common_prefix(left: ArrayLike, right: ArrayLike) -> int:
    """Return the length of the common prefix of two sequences of token ids."""
    left, right = np.asarray(left), np.asarray(right)
    shorter = min(len(left), len(right))
    differs = left[:shorter] != right[:shorter]
    return int(differs.argmax()) if differs.any() else shorter
