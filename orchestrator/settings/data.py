"""The block data: the sources of preference pairs, and how their rows become tokens."""

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator
from pydantic_core import PydanticCustomError

from orchestrator.settings.base import FREE, Block, Positive, UserCodeSpec, check_user_code
from orchestrator.settings.errors import UserError
from orchestrator.settings.os_errors import read_regular

Split = Literal["train", "eval"]
COMPRESSIONS = ("", ".gz", ".bz2", ".xz", ".zst")
TEXT_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv")
DATA_SUFFIXES = (
    *(kind + packed for kind in TEXT_SUFFIXES for packed in COMPRESSIONS),
    ".parquet",
    ".arrow",
)
"""Suffixes of data files that can be read."""
# Arguments of transformers' apply_chat_template that are set here already and are not template
# variables.
TEMPLATE_CALL = (
    "conversation",
    "add_generation_prompt",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)


class SourceSpec(Block):
    """A source of preference pairs."""

    path: str
    """JSONL, JSON, CSV, TSV (also .gz, .bz2, .xz, .zst), Parquet or Arrow file, a folder of such
    files or saved by `datasets`, or a hub name.
    """
    name: str | None = None
    """Configuration of a hub data set; its default when not set."""
    split: str | None = None
    """Split of a hub data set or a folder; when not set, train for training pairs, test for
    evaluation pairs.
    """

    @model_validator(mode="before")
    @classmethod
    def _wrap_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class TrainingSetSpec(SourceSpec):
    """A training set: a source with a weight."""

    weight: float = Field(1.0, gt=0)
    """How often its pairs are seen per epoch: 2: twice; 0.5: one half of them, and the other half
    in the next epoch.
    """


class DataSpec(Block):
    """The preference pairs."""

    train: list[TrainingSetSpec] = Field(min_length=1)
    """JSONL, JSON, CSV, Parquet or Arrow file, a folder saved by `datasets`, or a hub name (split
    train); {path, name, split} for another configuration or split; a list of these, with a weight
    each, for several sets.
    """
    eval: dict[str, SourceSpec] = {}
    """The same for the evaluation pairs (hub name: split test), or {NAME: ...} for several sets,
    whose metrics start with eval_NAME_ instead of eval_; no evaluation when not set.
    """
    eval_fraction: float | None = Field(None, gt=0, lt=1)
    """Instead of eval: the fraction of the training pairs that is held out for evaluation, chosen
    by run.seed; pairs with the same prompt stay together, so no prompt is both trained on and
    evaluated.
    """
    weight_column: str | None = None
    """Column with the weight of each pair in loss and metrics, more than 0: a pair of weight 2
    counts as two rows; 1 each when not set.
    """
    margin_column: str | None = None
    """Column with the margin by which the chosen reward should exceed the rejected one, in units of
    rewards (ODPO: Amini et al. 2024, arXiv 2402.10571); none when not set.
    """
    ignore_columns: list[str] = []
    """Columns to ignore although they look like part of the prompt (system, history, images, ...),
    which is an error otherwise.
    """
    collator: UserCodeSpec | None = None
    """A user's collator from rows to TRL's input_ids, attention_mask and completion_mask, as
    module:attr or {path, kwargs}, for example trl.trainer.dpo_trainer:DataCollatorForPreference. A
    constructor parameter pad_token_id receives the tokenizer's, unless kwargs set it; a parameter
    `context` of the call receives a CollateContext.
    """
    max_length: Positive | None = 1024
    """Tokens of prompt plus one completion; longer ones are truncated. No limit when null."""
    truncation: Literal["keep_start", "keep_end"] = "keep_start"
    """Which end of a sequence longer than max_length is kept; keep_start drops pairs whose prompt
    fills max_length. keep_end is applied by the collator: a user's collator must truncate by
    itself.
    """
    max_prompt_length: Positive | None = None
    """Maximum tokens of a prompt, of which the last are kept; applied before max_length.

    No limit when not set.
    """
    max_completion_length: Positive | None = None
    """Maximum tokens of a completion, of which the first are kept; applied before max_length.

    No limit when not set.
    """
    system_prompt: str | None = Field(None, min_length=1)
    """Content of a system message that is added to every conversation without one."""
    chat_template: str | None = None
    """Jinja chat template, as a file or as text, instead of the tokenizer's; exported with the
    model.
    """
    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the chat template for every conversation, for example {enable_thinking: false};
    a row's own chat_template_kwargs and tools take precedence.
    """
    on_bad_row: Literal["error", "drop"] | None = None
    """What to do with every unusable row. Not set: a row of the wrong shape is an error; ties,
    empty completions and over-long prompts are dropped and counted.
    """
    num_proc: Positive | None = Field(None, json_schema_extra=FREE)
    """Processes that tokenise; one per core, 16 at most, when not set."""
    cache_dir: str | None = Field(None, json_schema_extra=FREE)
    """Folder of tokenised data, shared by every node; run.dir/.cache when not set."""

    @field_validator("chat_template", mode="before")
    @classmethod
    def _read_template(cls, value: Any) -> Any:
        return jinja_template(value) if isinstance(value, str) else value

    @field_validator("train", mode="before")
    @classmethod
    def _wrap_training_set(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else [value]

    @field_validator("eval", mode="before")
    @classmethod
    def _name_sets(cls, value: Any) -> Any:
        if value is None:
            return {}
        if isinstance(value, str) or (isinstance(value, dict) and "path" in value):
            return {"": value}
        if not value or not isinstance(value, dict):
            raise PydanticCustomError("sets", "must be one source, or {NAME: source}")
        # YAML reads a bare 2024 as a number
        return {str(name): source for name, source in value.items()}

    @field_serializer("eval")
    def _unwrap_single_set(self, value: dict[str, SourceSpec]) -> Any:
        sets = {name: source.model_dump() for name, source in value.items()}
        return sets.get("", sets or None)

    @property
    def eval_sets(self) -> list[str]:
        """Return the names of the evaluation sets; the name of a single set is empty."""
        return list(self.eval) if self.eval_fraction is None else [""]

    def sources(self, split: Split, name: str | None = None) -> dict[str, SourceSpec]:
        """Return the sources of a split by their settings: data.train, or data.train.0, ... if
        there are several; data.eval, or data.eval.NAME. name: return only this evaluation set.
        """
        if split == "train":
            several = len(self.train) > 1
            return {
                f"data.train.{place}" if several else "data.train": each
                for place, each in enumerate(self.train)
            }
        sets = self.eval if name is None else {name: self.eval[name]}
        return {self.eval_key(name): source for name, source in sets.items()}

    @staticmethod
    def eval_key(name: str) -> str:
        """Return the setting of the evaluation set with that name."""
        return f"data.eval.{name}" if name else "data.eval"

    @property
    def keep_last(self) -> int | None:
        """Return how many tokens the collator keeps at the end of a sequence; None if tokenising
        already truncated.
        """
        return self.max_length if self.truncation == "keep_end" else None

    def check(self) -> None:
        """Check the lengths, the sources and the user's collator."""
        _check_lengths(self)
        taken = next((name for name in self.chat_template_kwargs if name in TEMPLATE_CALL), None)
        if taken is not None:
            key, value = f"data.chat_template_kwargs.{taken}", self.chat_template_kwargs[taken]
            rule = "is an argument of apply_chat_template that the tokeniser sets itself, "
            raise UserError(key, value, f"{rule}not a template variable", "remove it")
        for key, source in {**self.sources("train"), **self.sources("eval")}.items():
            _check_file_parts(key, source)
        if self.eval and self.eval_fraction is not None:
            key, fraction = "data.eval_fraction", self.eval_fraction
            raise UserError(key, fraction, "data.eval is also set", "remove one of the two")
        if self.collator:
            check_user_code("data.collator", self.collator.path)


def jinja_template(source: str) -> str:
    """Return the template text for data.chat_template: the text itself, or that of a file or
    tokenizer folder.

    Raises:
        UserError: there is no such file, or it is not a template.
    """
    if "{{" in source or "{%" in source:
        return source
    path = Path(source).expanduser()
    cure = "use a file such as my-template.jinja, a tokenizer's folder, or the template text"
    try:
        text = read_regular(path / "chat_template.jinja" if path.is_dir() else path)
    except (OSError, UnicodeDecodeError) as error:
        rule = f"cannot be read ({getattr(error, 'strerror', 'it is not UTF-8 text')})"
        raise UserError("data.chat_template", source, rule, cure) from None
    if "{{" not in text and "{%" not in text:
        raise UserError(
            "data.chat_template", source, "is not a Jinja template: it has neither {{ nor {%", cure
        )
    return text


def _check_lengths(data: DataSpec) -> None:
    longest = data.max_length or math.inf
    prompt, completion = data.max_prompt_length, data.max_completion_length
    if (prompt or 0) >= longest:
        rule = f"leaves no room for a completion in data.max_length ({longest})"
        cure = "lower it, or raise data.max_length"
        raise UserError("data.max_prompt_length", prompt, rule, cure)
    if (completion or 0) > longest:
        rule = f"is more than data.max_length ({longest}), which includes the prompt"
        cure = "remove it, or raise data.max_length"
        raise UserError("data.max_completion_length", completion, rule, cure)


def _check_file_parts(key: str, source: SourceSpec) -> None:
    """Check that a file has neither a configuration nor a split, which hub data sets have."""
    for part in ("name", "split"):
        value = getattr(source, part)
        if value is not None and source.path.endswith(DATA_SUFFIXES):
            rule = f"{source.path} is a file, which has no {part}"
            raise UserError(f"{key}.{part}", value, rule, "remove it, or use a hub name")
