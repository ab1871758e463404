"""Define every setting of a run: type, unit, default, and whether it may change on resume.

This module imports neither torch nor ray, so settings are checked on a laptop in half a second.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

from orchestrator.settings.precision import Precision


class UserError(Exception):
    """Error of the user's input, printed as one line with key, value, rule and fix. Exit code 2.

    `key` is a setting ("batch.micro_batch_size") or a place in the data ("pairs.jsonl row 17").
    """

    def __init__(self, key: str, value: object, rule: str, cure: str) -> None:
        super().__init__(
            key, value, rule, cure
        )  # all four in args: errors are pickled between processes
        self.key, self.value, self.rule, self.cure = key, value, rule, cure

    def __str__(self) -> str:
        value = "(not set)" if self.value is None else repr(self.value)
        if len(value) > 120:
            value = value[:117] + "..."
        return " ".join(f"{self.key} = {value}: {self.rule}; {self.cure}".split())


LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
    "cdpo",
    "simpo",
    "orpo",
]  # TRL's names; the last three are not among its DPO losses


@dataclass(frozen=True)
class LossTraits:
    """Facts about a loss that decide which settings it uses and how a step computes it."""

    uses_smoothing: bool = False
    """Uses dpo.label_smoothing."""
    takes_margin: bool = False
    """Uses data.margin_column: it is a loss over the difference of a pair's rewards."""
    takes_divergence: bool = False
    """Supports dpo.f_divergence_type. It uses the difference of a pair's scores, in which an
    unknown term that depends only on the prompt cancels; sft uses no scores.
    """
    needs_whole_batch: bool = False
    """Compares all pairs of the global batch with each other, for which the policy runs twice."""
    is_token_mean: bool = False
    """Is a mean over the chosen tokens of the global batch, not over its pairs."""
    beta_is_per_token: bool = False
    """Multiplies log-probs per token by dpo.beta, which is therefore larger."""
    uses_ld_alpha: bool = True
    """Depends on dpo.ld_alpha."""
    own_settings: tuple[str, ...] = ()
    """Settings of the block dpo that only this loss uses."""


LOSS_TRAITS: dict[LossType, LossTraits] = {
    "sigmoid": LossTraits(takes_margin=True, takes_divergence=True),
    "hinge": LossTraits(takes_margin=True, takes_divergence=True),
    "ipo": LossTraits(takes_divergence=True),
    "exo_pair": LossTraits(uses_smoothing=True, takes_margin=True, takes_divergence=True),
    "nca_pair": LossTraits(),
    "robust": LossTraits(uses_smoothing=True, takes_margin=True, takes_divergence=True),
    "bco_pair": LossTraits(),
    "sppo_hard": LossTraits(),
    "aot": LossTraits(uses_smoothing=True, needs_whole_batch=True),
    "aot_unpaired": LossTraits(uses_smoothing=True, needs_whole_batch=True),
    "apo_zero": LossTraits(),
    "apo_down": LossTraits(),
    "discopop": LossTraits(
        takes_margin=True, takes_divergence=True, own_settings=("discopop_tau",)
    ),
    "sft": LossTraits(takes_divergence=True, is_token_mean=True, uses_ld_alpha=False),
    "sigmoid_norm": LossTraits(takes_margin=True, takes_divergence=True, beta_is_per_token=True),
    "cdpo": LossTraits(uses_smoothing=True, takes_margin=True, takes_divergence=True),
    "simpo": LossTraits(
        uses_smoothing=True,
        takes_margin=True,
        beta_is_per_token=True,
        own_settings=("simpo_gamma",),
    ),
    "orpo": LossTraits(),
}
USERS_LOSS = LossTraits(
    uses_smoothing=True,
    takes_margin=True,
    takes_divergence=True,
    own_settings=tuple(name for traits in LOSS_TRAITS.values() for name in traits.own_settings),
)
"""A user's own loss may use any setting of its block."""
SMOOTHED = tuple(name for name, traits in LOSS_TRAITS.items() if traits.uses_smoothing)
OF_BATCH = tuple(name for name, traits in LOSS_TRAITS.items() if traits.needs_whole_batch)
OF_SCORES = tuple(name for name, traits in LOSS_TRAITS.items() if traits.takes_divergence)
WITH_MARGIN = tuple(name for name, traits in LOSS_TRAITS.items() if traits.takes_margin)
FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
EngineKind = Literal["ddp", "deepspeed", "fsdp"]


@dataclass(frozen=True)
class EngineTraits:
    """Facts about an engine that decide which settings it uses and how a run is built for it."""

    own_settings: tuple[str, ...]
    """Settings of the block engine that only this engine uses."""
    holds_16_bit_weights: bool = False
    """In a 16-bit precision it computes with weights of that type, not under autocast."""
    moves_weights: bool = False
    """Moves weights from host memory to the device itself, when it wraps them."""
    keeps_parameters_whole: bool = False
    """Its optimizer updates whole parameters, not flattened or cut ones."""
    updates_in_fp32: bool = False
    """Accumulates gradients and updates weights in fp32, whatever the precision."""
    casts_sharded_reference: bool = False
    """In a 16-bit precision it stores the shards of a reference in that type."""


ENGINE_TRAITS: dict[EngineKind, EngineTraits] = {
    "ddp": EngineTraits(("shard_optimizer",), keeps_parameters_whole=True),
    "deepspeed": EngineTraits(
        ("zero_stage", "deepspeed_config", "overlap_comm"),
        holds_16_bit_weights=True,
        moves_weights=True,
        updates_in_fp32=True,
        casts_sharded_reference=True,
    ),
    "fsdp": EngineTraits(("reshard_after_forward",), holds_16_bit_weights=True, moves_weights=True),
}
ZeroStage = Literal[1, 2, 3]
EngineOffload = Literal["none", "optimizer", "parameters"]
ReferenceKind = Literal["copy", "shared_layers", "int8", "nf4", "adapter_off", "precomputed"]


@dataclass(frozen=True)
class ReferenceTraits:
    """Facts about a kind of reference that decide which settings it uses and how it is built."""

    is_copy: bool = False
    """Holds a whole model in a floating-point type: it can be cast and kept in host memory."""
    is_quantized: bool = False
    """Holds its weights in 8 or 4 bits."""
    shares_layers: bool = False
    """Freezes the policy's lowest layers, and shares them."""
    runs_policy: bool = False
    """Runs layers of the policy, whose dropout would act on it."""
    is_precomputed: bool = False
    """Computes all log-probs before the first step, and is then dropped."""
    can_be_sharded: bool = False
    """Has weights of the policy's type, which an engine can shard with the policy's."""


REFERENCE_TRAITS: dict[ReferenceKind, ReferenceTraits] = {
    "copy": ReferenceTraits(is_copy=True, can_be_sharded=True),
    "shared_layers": ReferenceTraits(shares_layers=True, runs_policy=True, can_be_sharded=True),
    "int8": ReferenceTraits(is_quantized=True),
    "nf4": ReferenceTraits(is_quantized=True),
    "adapter_off": ReferenceTraits(runs_policy=True),
    "precomputed": ReferenceTraits(is_precomputed=True),
}
Quantized = Literal["int8", "nf4"]
Dtype = Literal["fp32", "bf16", "fp16"]
CacheMode = Literal["off", "lazy", "full"]
AttentionName = Literal["auto", "cpu", "varlen", "sdpa", "padded"]
SchedulerName = Literal[
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
    "wsd",
]  # transformers' names of schedules that need no metric, and "wsd" for short
TRACKERS: dict[str, str | None] = {
    "azure_ml": "azureml-sdk",
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet-ml",
    "dagshub": "dagshub",
    "dvclive": "dvclive",
    "flyte": "flytekit",
    "kubeflow": None,
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
}
"""Trackers of transformers' report_to, and the package that each needs; W&B has its own settings
block.
"""
COMPRESSIONS = ("", ".gz", ".bz2", ".xz", ".zst")
TEXT_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv")
DATA_SUFFIXES = (
    *(kind + packed for kind in TEXT_SUFFIXES for packed in COMPRESSIONS),
    ".parquet",
    ".arrow",
)
"""Suffixes of data files that can be read."""
EVALUATED = (
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
    "runtime",
    "samples_per_second",
    "steps_per_second",
)
"""Metrics of an evaluation, without the prefix eval_ or eval_NAME_."""
Split = Literal["train", "eval"]
Exported = Literal["last", "best"]
MOST = 10**12  # limit of every count; larger numbers would overflow in tensors
Positive = Annotated[int, Field(ge=1, le=MOST)]
NonNegative = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[
    int, Field(ge=0, le=2**63 - 1)
]  # torch allows 64 bits, and each rank adds its rank
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
FREE: dict[str, Any] = {"resume": "free"}
"""Marks a field that may change on resume: it does not affect the results of the run."""


class Block(BaseModel):
    """Frozen group of settings without unknown keys; the docstring under a field is its
    description.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


class IdentitySpec(Block):
    """Name and folder of the run; the run directory is dir/name."""

    dir: str = Field("runs", json_schema_extra=FREE)
    """Folder of run directories, on a file system that every node shares.

    Relative to the current folder.
    """
    name: str
    """Name of the run: the same name resumes the same run. Letters, digits, dot, dash, underscore.
    """
    seed: Seed = 42
    """Seed of the data order, of random initial weights and of dropout. An integer."""

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, value: str) -> str:
        if not re.fullmatch(
            r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", value
        ):  # excludes .., .cache and flags
            rule = (
                "must be 1 to 200 letters, digits, '.', '-' and '_', and start with a letter, "
                "digit or '_'"
            )
            raise PydanticCustomError("run_name", rule)  # pyright: ignore[reportArgumentType]
        return value


class InitSpec(Block):
    """A small model with random weights and its tokenizer, for quickstarts and tests: nothing is
    downloaded.
    """

    model_type: str = "qwen2"
    """Architecture, a `model_type` of transformers."""
    config: dict[str, Any] = {}
    """Keyword arguments of that architecture's config (hidden_size, num_hidden_layers, ...)."""
    vocab_size: Positive = 1024
    """Vocabulary size of the byte-level BPE tokenizer, which is trained on data.train.

    At least 260.
    """


class LoraSpec(Block):
    """A low-rank adapter on a frozen base. Hu et al. 2021, arXiv 2106.09685."""

    r: Positive | None = None
    """Rank of the two factors; 16 when not set."""
    alpha: float | None = Field(None, gt=0)
    """Numerator of the adapter's weight, alpha / r; twice r when not set."""
    target_modules: list[str] | None = None
    """Names of the linear layers to adapt (q_proj, v_proj, ...); all except the head when not set.
    """
    adapter_path: str | None = None
    """Folder or hub name of an adapter to continue training, with its rank, alpha and layers; the
    reference is then the model with this adapter as it was at the start.
    """
    base: Literal[Dtype, Quantized] | None = None
    """Type of the frozen base's weights: fp32, bf16, fp16 (it also computes in this type, unless
    precision is a 16-bit type), or int8, nf4 of bitsandbytes (QLoRA: Dettmers et al. 2023, arXiv
    2305.14314); fp32 when not set.
    """

    @property
    def quantized_base(self) -> Quantized | None:
        """Return the type of a base in 8 or 4 bits, or None."""
        return next((kind for kind in get_args(Quantized) if kind == self.base), None)

    @property
    def cast_base(self) -> Dtype | None:
        """Return the type to which the base is cast, or None."""
        return next((dtype for dtype in get_args(Dtype) if dtype == self.base), None)


class ModelSpec(Block):
    """The policy: source of its weights and tokenizer, and which weights train."""

    path: str | None = None
    """Folder or hub name of a causal LM of transformers."""
    init: InitSpec | None = None
    """Instead of a path: a config, with random weights from run.seed."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; the model's own when not set."""
    pad_token: str | None = None
    """Padding token, from the tokenizer's vocabulary; needed only when the tokenizer has none."""
    disable_dropout: bool = True
    """Set all dropout of policy and reference to 0, as in TRL."""
    attention: AttentionName = Field("auto", json_schema_extra=FREE)
    """Layout of a pair and its attention kernel. Packed (the prompt computed once, no padding):
    cpu, varlen (GPUs from Ampere on), sdpa (any device, slower); auto selects the one for the
    device. padded: two padded rows per pair, as in TRL; auto selects it, and prints why, for a
    model whose packed log-probs would not be exact.
    """
    num_frozen_layers: Positive | None = None
    """Number of lowest layers that are frozen, together with the embeddings."""
    tied_head: Literal["untie", "freeze"] = "untie"
    """What to do with an output head tied to the embeddings when these are frozen
    (num_frozen_layers, reference.num_shared_layers): untie: its own, trainable weights; freeze: it
    stays tied and frozen.
    """
    lora: LoraSpec | None = None
    """Train an adapter instead of the weights; needs the extra `peft`."""


class UserCodeSpec(Block):
    """User code, as {path, kwargs}; a plain module:attr is its path."""

    path: str
    """A class, function or object as module:attr."""
    kwargs: dict[str, Any] = {}
    """Keyword arguments of the class's constructor, or of the function."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


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
    def _path_alone(cls, value: Any) -> Any:
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
    def _template_is_read(cls, value: Any) -> Any:
        return jinja_template(value) if isinstance(value, str) else value

    @field_validator("train", mode="before")
    @classmethod
    def _one_or_several_training_sets(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else [value]

    @field_validator("eval", mode="before")
    @classmethod
    def _one_or_several_sets(cls, value: Any) -> Any:
        if value is None:
            return {}
        if isinstance(value, str) or (isinstance(value, dict) and "path" in value):
            return {"": value}
        if not value or not isinstance(value, dict):
            raise PydanticCustomError("sets", "must be one source, or {NAME: source}")
        return {
            str(name): source for name, source in value.items()
        }  # YAML reads a bare 2024 as a number

    @field_serializer("eval")
    def _one_set_has_no_name(self, value: dict[str, SourceSpec]) -> Any:
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


def jinja_template(given: str) -> str:
    """Return the template text for data.chat_template: the text itself, or that of a file or
    tokenizer folder.

    Raises:
        UserError: there is no such file, or it is not a template.
    """
    if "{{" in given or "{%" in given:
        return given
    path = Path(given).expanduser()
    cure = "use a file such as my-template.jinja, a tokenizer's folder, or the template text"
    try:
        found = (path / "chat_template.jinja" if path.is_dir() else path).read_text(
            encoding="utf-8"
        )
    except (OSError, UnicodeDecodeError) as error:
        rule = f"cannot be read ({getattr(error, 'strerror', 'it is not UTF-8 text')})"
        raise UserError("data.chat_template", given, rule, cure) from None
    if "{{" not in found and "{%" not in found:
        raise UserError(
            "data.chat_template", given, "is not a Jinja template: it has neither {{ nor {%", cure
        )
    return found


class DpoSpec(Block):
    """The loss. Names and defaults are TRL's."""

    loss_type: str | list[str] = "sigmoid"
    """Loss, or list of losses to add: sigmoid is DPO (Rafailov et al. 2023, eq. 7), [sigmoid, sft]
    is RPO. The functions with these names in orchestrator/dpo/losses.py cite papers and equations.
    Your own loss as module:attr: a function (terms: PairTerms, dpo: DpoSpec) -> [B], with the types
    of that file.
    """
    loss_weights: list[float] | None = None
    """Factor of each loss, in the order of loss_type; 1 each when not set. Dimensionless."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference: reward = beta * log(policy / reference).

    Dimensionless.
    """
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """robust, aot, aot_unpaired, cdpo, simpo: probability that a pair's label is wrong; exo_pair:
    fraction of the label on the rejected completion, more than 0.
    """
    f_divergence_type: FDivergence = "reverse_kl"
    """Divergence between policy and reference (f-DPO: Wang et al. 2023, arXiv 2309.16240), for
    losses over the difference of a pair's scores.
    """
    f_alpha_divergence_coef: float = 0.5
    """Alpha of alpha_divergence; 1 is reverse_kl. Dimensionless."""
    ld_alpha: float | None = Field(None, ge=0, le=1)
    """Weight of the tokens of the longer completion beyond the length of the shorter one, in the
    log-probs of policy and reference (LD-DPO: Liu et al. 2024, arXiv 2409.06411); 1 when not set.
    """
    use_weighting: bool = False
    """Weight the loss of a pair by its probability under the policy (WPO: Zhou et al.

    2024, arXiv 2406.11827).
    """
    discopop_tau: float = Field(0.05, gt=0)
    """Temperature of the modulation in discopop. Dimensionless."""
    router_aux_loss_coef: float | None = None
    """0: train a mixture of experts without its load-balancing loss, which is not supported; if not
    set, a model whose config has a coefficient for it is an error.
    """
    simpo_gamma: float = Field(0.5, ge=0)
    """Target margin of simpo, in units of its reward: beta times log-prob per token."""

    @field_validator("loss_type", mode="before")
    @classmethod
    def _one_or_several_losses(cls, value: Any) -> Any:
        names = list(value) if isinstance(value, list | tuple) else [value]
        own = [name for name in names if isinstance(name, str) and ":" in name]
        if not names or any(name not in (*get_args(LossType), *own) for name in names):
            raise PydanticKnownError(
                "literal_error", {"expected": ", ".join(map(repr, get_args(LossType)))}
            )
        return (
            names[0] if len(names) == 1 else names
        )  # a list of one equals its entry, also on resume

    @property
    def loss_types(self) -> list[str]:
        """Return the losses as a list."""
        return self.loss_type if isinstance(self.loss_type, list) else [self.loss_type]

    @property
    def own_losses(self) -> list[str]:
        """Return the user's own losses, as module:attr; they may read any setting of this block."""
        return [name for name in self.loss_types if ":" in name]

    @property
    def traits(self) -> list[LossTraits]:
        """Return the facts about each loss."""
        known: dict[str, LossTraits] = {**LOSS_TRAITS}
        return [known.get(name, USERS_LOSS) for name in self.loss_types]

    @property
    def needs_whole_batch(self) -> bool:
        """Return whether a loss needs the whole global batch."""
        return any(traits.needs_whole_batch for traits in self.traits)

    @property
    def weights(self) -> list[float]:
        """Return the factor of each loss."""
        return self.loss_weights or [1.0] * len(self.loss_types)


class BatchSpec(Block):
    """Pairs per optimizer step and per forward pass; gradient accumulation is derived."""

    global_batch_size: Positive = 32
    """Pairs per optimizer step, over all ranks."""
    micro_batch_size: Positive | None = Field(None, json_schema_extra=FREE)
    """Pairs per forward pass on one rank, fewer if that is faster on a CPU.

    Set exactly one of this and the next.
    """
    max_tokens_per_microbatch: Positive | None = Field(None, json_schema_extra=FREE)
    """Maximum tokens per forward pass on one rank: packed: prompt and both completions; padded:
    including padding. A longer single pair gets a pass of its own.
    """

    def pairs_per_rank(self, ranks: int) -> int:
        """Return the most pairs that one of so many ranks has in a step."""
        return -(-self.global_batch_size // ranks)

    def grad_accum(self, ranks: int) -> int | None:
        """Return the forward passes per step on that rank; None if max_tokens_per_microbatch
        decides.
        """
        return (
            -(-self.pairs_per_rank(ranks) // self.micro_batch_size)
            if self.micro_batch_size
            else None
        )


class OptimizerSpec(Block):
    """The optimizer; its state is sharded over the ranks."""

    name: str = "torch.optim.AdamW"
    """Dotted name. With every engine: the elementwise optimizers of torch.optim (AdamW, SGD, ...),
    whose state resumes with any engine and number of ranks. With ddp: torch.optim.Muon and
    Adafactor, and those of bitsandbytes.optim (AdamW8bit, PagedAdamW32bit, ...). With deepspeed:
    FusedAdam and DeepSpeedCPUAdam of deepspeed.ops.adam. With ddp and engine.shard_optimizer=false:
    your own, as module:attr.
    """
    lr: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of matrices, multiplied by the learning rate; norms and biases are never
    decayed.
    """
    kwargs: dict[str, Any] = {}
    """Further keyword arguments of the optimizer, for example {momentum: 0.9}."""

    @property
    def compiles_kernels(self) -> bool:
        """Return whether building it compiles kernels, which takes minutes without a GPU."""
        return self.name.startswith("deepspeed.")


class SchedulerSpec(Block):
    """The learning rate as a function of the optimizer steps actually taken."""

    name: str = "linear"
    """linear, cosine, constant, cosine_with_min_lr, wsd (warmup_stable_decay) or another schedule
    of transformers, or the dotted name of a torch scheduler (torch.optim.lr_scheduler.StepLR).
    """
    warmup_steps: NonNegative = 0
    """Optimizer steps of linear warm-up, for the schedules of transformers."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Warm-up as a fraction of all steps, rounded up."""
    kwargs: dict[str, Any] = {}
    """Keyword arguments of the schedule: {min_lr_rate: 0.1}, {num_decay_steps: 100}, {step_size:
    30, gamma: 0.1}.
    """

    def warmup(self, total_steps: int) -> int:
        """Return the warm-up steps in a run of `total_steps`."""
        return (
            self.warmup_steps
            if self.warmup_ratio is None
            else math.ceil(self.warmup_ratio * total_steps)
        )


class TrainingSpec(Block):
    """Length of training, and options of a step."""

    max_steps: Positive | None = None
    """Maximum optimizer steps; training ends earlier if its epochs end."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training pairs; 1 when neither this nor max_steps is set."""
    gradient_checkpointing: bool = Field(False, json_schema_extra=FREE)
    """Recompute activations in the backward pass: less memory, about a third more time."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Clip the gradient to this L2 norm; no clipping when null."""
    logging_steps: Positive = Field(10, json_schema_extra=FREE)
    """Optimizer steps between two logged lines."""
    token_metrics: bool = Field(True, json_schema_extra=FREE)
    """Also report metrics of the output head: entropy, logits/chosen, logits/rejected,
    mean_token_accuracy.
    """
    pair_ledger: bool = Field(True, json_schema_extra=FREE)
    """Record the results of every pair in every step in RUN_DIR/pairs.parquet, about 50 bytes per
    pair and step, for `orchestrator pairs`.
    """


class EngineSpec(Block):
    """Sharding of weights, gradients and optimizer state; in fp32 it affects only speed and
    memory.
    """

    kind: EngineKind = Field("ddp", json_schema_extra=FREE)
    """ddp: whole weights on every rank, optimizer state sharded. deepspeed: ZeRO at
    engine.zero_stage. fsdp: weights, gradients and optimizer state sharded by torch's fully_shard
    (FSDP2).
    """
    zero_stage: ZeroStage | None = Field(None, json_schema_extra=FREE)
    """What DeepSpeed shards: 1: optimizer state, 2: gradients too, 3: weights too. 2 when neither
    this nor engine.deepspeed_config sets it. Rajbhandari et al. 2019, arXiv 1910.02054.
    """
    deepspeed_config: dict[str, Any] | None = Field(None, json_schema_extra=FREE)
    """A DeepSpeed config, as the path of a JSON or as its content; "auto" is filled from the
    settings, and a contradiction with them is an error.
    """
    shard_optimizer: bool = Field(True, json_schema_extra=FREE)
    """ddp: shard the optimizer state (ZeroRedundancyOptimizer): each parameter's state is on one
    rank.
    """
    offload: EngineOffload = Field("none", json_schema_extra=FREE)
    """What to keep in host memory. optimizer: its state and the weights that it updates
    (deepspeed); parameters: also all weights while they are not used (deepspeed at stage 3; fsdp).
    """
    reshard_after_forward: bool = Field(True, json_schema_extra=FREE)
    """fsdp: free a layer's gathered weights after its forward pass, and gather them again for the
    backward pass.
    """
    bucket_size: Positive | None = Field(None, json_schema_extra=FREE)
    """Gradient elements per communication bucket (deepspeed, ddp); the engine's default when not
    set.
    """
    overlap_comm: bool | None = Field(None, json_schema_extra=FREE)
    """deepspeed: reduce gradients during the backward pass; DeepSpeed's default when not set."""

    @field_validator("deepspeed_config", mode="before")
    @classmethod
    def _file_is_read(cls, value: Any) -> Any:
        return deepspeed_json(value) if isinstance(value, str) else value

    @property
    def stage(self) -> ZeroStage:
        """Return the ZeRO stage that deepspeed runs."""
        zero = (self.deepspeed_config or {}).get("zero_optimization")
        in_file = zero.get("stage") if isinstance(zero, dict) else None
        return self.zero_stage or next(
            (stage for stage in get_args(ZeroStage) if stage == in_file), 2
        )

    @property
    def traits(self) -> EngineTraits:
        """Return the facts about the engine, at any stage."""
        return ENGINE_TRAITS[self.kind]

    @property
    def shards_weights(self) -> bool:
        """Return whether a rank holds only a shard of each weight between forward passes."""
        return self.kind == "fsdp" or (self.kind == "deepspeed" and self.stage == 3)

    @property
    def deals_parameters(self) -> bool:
        """Return whether each parameter's optimizer state is whole, on one of the ranks."""
        return self.traits.keeps_parameters_whole and self.shard_optimizer

    @property
    def label(self) -> str:
        """Return the engine's name in printed lines; empty for ddp, the default."""
        return {"ddp": "", "fsdp": "fsdp", "deepspeed": f"ZeRO-{self.stage}"}[self.kind]


def deepspeed_json(given: str | dict[str, Any] | None) -> dict[str, Any]:
    """Return the content of engine.deepspeed_config, read from its file if it is a path; empty if
    it is not set.

    Raises:
        UserError: there is no such file, or it is not a JSON object.
    """
    if not isinstance(given, str):
        return given or {}
    path, cure = given, "use a DeepSpeed JSON, for example configs/deepspeed/zero2.json"
    try:
        found = json.loads(Path(path).expanduser().read_text())
    except OSError as error:
        rule = f"cannot be read ({error.strerror})"
        raise UserError("engine.deepspeed_config", path, rule, cure) from None
    except ValueError as error:
        raise UserError(
            "engine.deepspeed_config", path, f"is not valid JSON: {error}", cure
        ) from None
    if not isinstance(found, dict):
        raise UserError("engine.deepspeed_config", path, "is not a JSON object", cure)
    return found


class ReferenceSpec(Block):
    """The frozen reference model; each rank holds its own copy unless it is sharded."""

    kind: ReferenceKind = "copy"
    """copy: a frozen copy of the initial policy, or of another model. shared_layers: the policy's
    lowest layers are frozen, and stored and computed once for both. int8, nf4: a copy quantised by
    bitsandbytes, whose error is measured at the start. adapter_off: the policy without its LoRA
    adapter, or with the one it started from. precomputed: all log-probs are computed before the
    first step, by the initial policy or by the model at path, and no reference stays in memory.
    """
    path: str | None = None
    """Folder or hub name of the reference; the initial policy when not set."""
    num_shared_layers: Positive | None = None
    """Layers of kind shared_layers, counted from the embeddings, which are also shared."""
    dtype: Dtype | None = None
    """Type of a copy's weights; the policy's when not set."""
    sharded: bool = Field(False, json_schema_extra=FREE)
    """Shard the weights of a copy, or the reference's own layers of kind shared_layers, with the
    policy's, if the engine shards weights (deepspeed at stage 3, fsdp); otherwise each rank holds
    them whole.
    """
    offload: bool = Field(False, json_schema_extra=FREE)
    """Keep a copy's weights in host memory, and move each layer to the device when it runs
    (accelerate).
    """
    max_reward_error: float | None = Field(None, gt=0)
    """Stop if a reference with int8, nf4 or its own dtype changes a pair's reward margin by more
    than this at the start. Dimensionless, as rewards are: beta times nats.
    """
    cache: CacheMode = Field("lazy", json_schema_extra=FREE)
    """Cache of reference log-probs on disk, keyed by content and shared by all runs with the same
    reference and tokens. lazy: filled as training sees each pair, so the second epoch needs no
    reference; full: filled before the first step; off: the reference runs every time. data.collator
    and sync_every switch it off; lazy does not cache the pairs of training sets with weights.
    """
    sync_every: Positive | None = None
    """Optimizer steps between updates of the reference towards the policy (TR-DPO: Gorbatovski et
    al. 2024, arXiv 2404.09656); never when not set.
    """
    sync_alpha: float = Field(0.6, gt=0, le=1)
    """Size of an update: reference = sync_alpha * policy + (1 - sync_alpha) * reference."""

    @property
    def traits(self) -> ReferenceTraits:
        """Return the facts about the kind of reference."""
        return REFERENCE_TRAITS[self.kind]

    @property
    def is_approximate(self) -> bool:
        """Return whether the reference only approximates the model that it stands for."""
        return self.traits.is_quantized or self.dtype is not None

    @field_validator("cache", mode="before")
    @classmethod
    def _off_is_no_boolean(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare off as False


class EarlyStoppingSpec(Block):
    """Early stopping when evaluations no longer improve (transformers' EarlyStoppingCallback)."""

    patience: Positive
    """Consecutive evaluations without a better evaluation.metric_for_best after which training
    ends.
    """
    min_delta: float = Field(0.0, ge=0)
    """Minimum improvement: it must exceed this. In the units of the metric."""


class EvaluationSpec(Block):
    """Evaluation on data.eval: before the first step, at intervals, and after the last step."""

    every_steps: Positive | None = Field(None, json_schema_extra=FREE)
    """Optimizer steps between evaluations; no evaluation by steps when not set."""
    every_epoch: bool = Field(False, json_schema_extra=FREE)
    """Evaluate at the end of every epoch."""
    at_start: bool = Field(True, json_schema_extra=FREE)
    """Evaluate before the first step."""
    metric_for_best: str | None = None
    """Metric that decides which step was best (and early stopping), for example loss or
    rewards/accuracies; with several evaluation sets NAME_loss. The best step so far is saved and
    its checkpoint kept, except before the first step.
    """
    greater_is_better: bool | None = None
    """Direction of metric_for_best; when not set, false for names that end with loss and true
    otherwise.
    """
    compute_metrics: str | None = Field(None, json_schema_extra=FREE)
    """A user's function as module:attr, EvalPrediction -> {name: number}: additional metrics,
    reported with the prefix eval_. Rank zero passes it the Predictions of
    orchestrator/training/compute_metrics.py; the other ranks wait for at most
    cluster.collective_timeout_s.
    """
    logits: bool = Field(False, json_schema_extra=FREE)
    """Pass what TRL passes: logits and input_ids of padded sequences, for which the policy runs
    once more.
    """
    batch_eval_metrics: bool = Field(False, json_schema_extra=FREE)
    """Pass one batch at a time, as tensors; the last call has compute_result=True, and its result
    is used.
    """
    batch_size: Positive | None = Field(None, json_schema_extra=FREE)
    """Pairs per batch of logits or batch_eval_metrics; batch.micro_batch_size when not set, else 1.
    """
    samples: NonNegative = Field(0, json_schema_extra=FREE)
    """Prompts of the first evaluation set for which rank zero generates answers at the end of the
    run, with the model before and after training, each whole on one device: greedily, 64 tokens at
    most.
    """
    early_stopping: EarlyStoppingSpec | None = Field(None, json_schema_extra=FREE)
    """Early stopping; none when not set."""

    @property
    def best_metric(self) -> str | None:
        """Return metric_for_best as evaluations report it."""
        return (
            None
            if self.metric_for_best is None
            else f"eval_{self.metric_for_best.removeprefix('eval_')}"
        )


class CheckpointSpec(Block):
    """Checkpoints and the exported model."""

    every_steps: Positive | None = Field(None, json_schema_extra=FREE)
    """Optimizer steps between checkpoints; only at the end when not set."""
    keep: Positive = Field(2, json_schema_extra=FREE)
    """Number of newest checkpoints to keep on disk; the best by evaluation.metric_for_best is also
    kept.
    """
    export: Exported = Field("last", json_schema_extra=FREE)
    """Which checkpoint becomes RUN_DIR/model: the last, or the best by evaluation.metric_for_best.
    """
    async_save: bool = Field(False, json_schema_extra=FREE)
    """Copy the state to host memory and write it in the background, while training continues."""


class ClusterSpec(Block):
    """Workers, resources and fault tolerance under Ray."""

    num_workers: int | list[int] = Field(1, json_schema_extra=FREE)
    """Number of ranks, one worker each. [fewest, most]: as many as fit when the run starts or
    resumes; when room is added (in an existing cluster, placed PACK or SPREAD), the run saves and
    resumes with more.
    """
    resources: dict[str, Annotated[float, Field(ge=0)]] = Field({}, json_schema_extra=FREE)
    """Resources of one worker, for example {CPU: 4, GPU: 1}; when empty, one GPU if there is any,
    else one CPU.
    """
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", json_schema_extra=FREE
    )
    """Ray's placement strategy for the workers."""
    storage_path: str | None = Field(None, json_schema_extra=FREE)
    """Folder for Ray Train's own records; RUN_DIR/logs/ray when not set.

    It never contains checkpoints.
    """
    max_failures: NonNegative = Field(3, json_schema_extra=FREE)
    """Failures of workers after which the run resumes, counted since the last new checkpoint."""
    auth: Literal["token", "disabled"] = Field("token", json_schema_extra=FREE)
    """Authentication of a Ray cluster that the run starts (RAY_AUTH_MODE); an existing cluster has
    its own.
    """
    collective_timeout_s: Positive = Field(600, json_schema_extra=FREE)
    """Seconds that a rank waits for the others in a collective before the attempt is aborted and
    resumed.
    """
    preflight: bool = Field(True, json_schema_extra=FREE)
    """Check every node first, as `orchestrator doctor` does, and do not train if a check fails."""
    network_interface: str | None = Field(None, json_schema_extra=FREE)
    """Network interface for collectives, for example ib0; when not set, GLOO_SOCKET_IFNAME and
    NCCL_SOCKET_IFNAME of each node, else the interface through which the node reaches the cluster's
    head.
    """
    replacement_wait_s: NonNegative = Field(600, json_schema_extra=FREE)
    """Seconds to wait for a replacement after a node is lost, if the remaining nodes cannot hold
    the workers.
    """

    @field_validator("num_workers", mode="before")
    @classmethod
    def _one_or_two_numbers(cls, value: Any) -> Any:
        is_range = isinstance(value, list | tuple)
        ends = [
            int(end) if str(end).isdecimal() else 0 for end in (value if is_range else [value] * 2)
        ]
        if len(ends) != 2 or not 1 <= ends[0] <= ends[1]:
            raise PydanticCustomError(
                "workers", "must be an integer of 1 or more, or [fewest, most]"
            )
        return ends if is_range else ends[0]

    @property
    def min_workers(self) -> int:
        """Return the fewest workers with which the run continues."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Return the most workers that the run uses."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class SlurmSpec(Block):
    """Options of `orchestrator submit --to slurm`; nodes, and GPUs and CPUs per node, follow from
    `cluster`.
    """

    workers_per_node: Positive | None = Field(None, json_schema_extra=FREE)
    """Workers per node; not needed with one worker, or with cluster.placement STRICT_PACK or
    STRICT_SPREAD.
    """
    time: str | None = Field(None, json_schema_extra=FREE)
    """Time limit of a start, after which the job is requeued: D-HH:MM:SS, HH:MM:SS or MM:SS, or a
    number of seconds (YAML reads 24:00:00 as one). The partition's limit when not set.
    """
    signal_s: Annotated[int, Field(ge=1, le=65535)] = Field(300, json_schema_extra=FREE)
    """Seconds before the time limit at which the run is signalled to save; Slurm may signal up to a
    minute earlier.
    """
    partition: str | None = Field(None, json_schema_extra=FREE)
    """Partition; the cluster's default when not set."""
    account: str | None = Field(None, json_schema_extra=FREE)
    """Account to charge; your default when not set."""
    qos: str | None = Field(None, json_schema_extra=FREE)
    """Quality of service; the default when not set."""
    args: list[str] = Field([], json_schema_extra=FREE)
    """Further flags of sbatch, for example [--mem=0, --exclusive]; they override the generated
    ones.
    """

    @field_validator("time", mode="before")
    @classmethod
    def _seconds_are_a_time(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return f"{value // 3600}:{value // 60 % 60:02}:{value % 60:02}"
        if value is not None and not re.fullmatch(
            r"\d+-\d+(:\d\d?){0,2}|\d+(:\d\d?){1,2}", str(value)
        ):
            raise PydanticCustomError(
                "time", "must be D-HH:MM:SS, HH:MM:SS or MM:SS, or a number of seconds"
            )
        return value

    @property
    def time_s(self) -> int | None:
        """Return the time limit in seconds."""
        if self.time is None:
            return None
        days, dash, rest = self.time.rpartition("-")
        parts = [int(part) for part in rest.split(":")]
        parts = [*parts, 0, 0][:3] if dash else [0, 0, *parts][-3:]
        return ((int(days or 0) * 24 + parts[0]) * 60 + parts[1]) * 60 + parts[2]


class WandbSpec(Block):
    """Weights & Biases."""

    project: str = Field("dpo-orchestrator", json_schema_extra=FREE)
    """W&B project of the run."""
    group: str | None = Field(None, json_schema_extra=FREE)
    """Group within the project."""
    mode: Literal["auto", "online", "offline", "disabled"] = Field("auto", json_schema_extra=FREE)
    """auto: online if a key is found, else offline files in RUN_DIR/wandb."""
    key_file: str | None = Field(None, json_schema_extra=FREE)
    """File with the API key, readable only by you (chmod 600), on the node of rank zero; when not
    set, W&B looks for a key in WANDB_API_KEY and in ~/.netrc.
    """


class RunSpec(Block):
    """All settings of a run. The rules between them are in rules.py."""

    run: IdentitySpec
    """Name and folder of the run."""
    model: ModelSpec
    """The policy."""
    data: DataSpec
    """The preference pairs."""
    dpo: DpoSpec = DpoSpec()  # pyright: ignore[reportCallIssue]
    """The loss."""
    batch: BatchSpec
    """Pairs per step and per forward pass."""
    optimizer: OptimizerSpec = OptimizerSpec()  # pyright: ignore[reportCallIssue]
    """The optimizer."""
    scheduler: SchedulerSpec = SchedulerSpec()
    """Learning-rate schedule."""
    training: TrainingSpec = TrainingSpec()  # pyright: ignore[reportCallIssue]
    """Length of training, and options of a step."""
    precision: Precision = "auto"
    """Type of the arithmetic, over fp32 weights: auto is bf16 if the GPU supports it, else fp32;
    tf32 is fp32 with matrix products in TF32 (GPUs from Ampere on), which is off for all others;
    fp64 is for tests.
    """
    engine: EngineSpec = EngineSpec()  # pyright: ignore[reportCallIssue]
    """Sharding of weights, gradients and optimizer state."""
    reference: ReferenceSpec = ReferenceSpec()  # pyright: ignore[reportCallIssue]
    """The frozen reference model."""
    callbacks: list[UserCodeSpec] = Field([], json_schema_extra=FREE)
    """Trackers by name (tensorboard, mlflow, ...) and your own transformers.TrainerCallback, as
    module:attr or {path, kwargs}.
    """
    evaluation: EvaluationSpec = EvaluationSpec()  # pyright: ignore[reportCallIssue]
    """When to evaluate."""
    checkpoint: CheckpointSpec = CheckpointSpec()  # pyright: ignore[reportCallIssue]
    """When to save, and how much to keep."""
    cluster: ClusterSpec = ClusterSpec()  # pyright: ignore[reportCallIssue]
    """Workers, resources and fault tolerance under Ray."""
    slurm: SlurmSpec = SlurmSpec()  # pyright: ignore[reportCallIssue]
    """Options of `submit --to slurm`."""
    wandb: WandbSpec = WandbSpec()  # pyright: ignore[reportCallIssue]
    """Weights & Biases."""

    @property
    def run_dir(self) -> Path:
        """Return the run directory, run.dir/run.name."""
        return Path(self.run.dir) / self.run.name

    @property
    def cache_dir(self) -> Path:
        """Return the folder of tokenised data and of models from model.init, shared between runs of
        one run.dir.
        """
        return Path(self.data.cache_dir) if self.data.cache_dir else Path(self.run.dir) / ".cache"

    @property
    def frozen_layers(self) -> int | None:
        """Return the number of lowest layers of the policy that are frozen."""
        return self.model.num_frozen_layers or self.reference.num_shared_layers

    @property
    def reference_cache(self) -> CacheMode:
        """Return the effective cache mode of reference log-probs: off if the reference is synced,
        or if a user's collator decides the tokens.
        """
        if self.reference.sync_every or self.data.collator:
            return "off"
        return "full" if self.reference.kind == "precomputed" else self.reference.cache

    @property
    def greater_is_better(self) -> bool:
        """Return the direction of evaluation.metric_for_best; by the rule of transformers if it is
        not set.
        """
        if self.evaluation.greater_is_better is not None:
            return self.evaluation.greater_is_better
        return not (self.evaluation.metric_for_best or "").endswith("loss")

    @model_validator(mode="after")
    def _rules(self) -> "RunSpec":
        from orchestrator.settings.rules import check_rules  # which imports this module

        check_rules(self)
        return self


def changed_on_resume(before: RunSpec, after: RunSpec) -> list[tuple[str, Any, Any]]:
    """Return (key, old value, new value) of each setting that differs but may not change on
    resume.
    """
    return list(_changes("", before, after))


def _changes(prefix: str, before: Block, after: Block) -> Iterator[tuple[str, Any, Any]]:
    for name, field in type(before).model_fields.items():
        old, new = getattr(before, name), getattr(after, name)
        if old == new or field.json_schema_extra == FREE:
            continue
        if isinstance(old, Block) and isinstance(new, Block):
            yield from _changes(f"{prefix}{name}.", old, new)
        else:
            yield f"{prefix}{name}", _shown(old), _shown(new)


def _shown(value: Any) -> Any:
    """Return a setting as a user would write it: blocks without defaults, and a block with only a
    path as the path.
    """
    if isinstance(value, list):
        return [_shown(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _shown(entry) for name, entry in value.items()}
    plain = value.model_dump(exclude_defaults=True) if isinstance(value, Block) else value
    return plain["path"] if isinstance(value, Block) and plain.keys() == {"path"} else plain
