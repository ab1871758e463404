"""Every setting of a run: its type, unit, default, and which may change on resume.

Importing this module loads neither torch nor ray, so that a bad run is refused on the laptop in half a second.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator
from pydantic_core import PydanticCustomError, PydanticKnownError


class UserError(Exception):
    """What the user asked for cannot be done as written: one line with key, value, rule and cure. Exit code 2.

    `key` is a setting ("batch.micro_batch_size") or a place in the data ("pairs.jsonl row 17").
    """

    def __init__(self, key: str, value: object, rule: str, cure: str) -> None:
        super().__init__(key, value, rule, cure)  # all four in args: the error crosses process borders by pickle
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
SMOOTHED: tuple[LossType, ...] = ("exo_pair", "robust", "aot", "aot_unpaired", "cdpo", "simpo")
"""Losses in which dpo.label_smoothing acts."""
OF_BATCH: tuple[LossType, ...] = ("aot", "aot_unpaired")
"""Losses that look at all pairs of the global batch at once, and for that run the policy twice."""
OF_SCORES: tuple[LossType, ...] = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "robust",
    "discopop",
    "sft",
    "sigmoid_norm",
    "cdpo",
)
"""Losses that dpo.f_divergence_type allows: in the difference of a pair's scores cancels what the others would need to
know, a term of the prompt alone. sft has neither."""
WITH_MARGIN: tuple[LossType, ...] = (
    "sigmoid",
    "hinge",
    "exo_pair",
    "robust",
    "discopop",
    "sigmoid_norm",
    "cdpo",
    "simpo",
)
"""Losses over the difference of a pair's rewards, from which its data.margin_column is taken away."""
FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
EngineKind = Literal["ddp", "deepspeed", "fsdp"]
ZeroStage = Literal[1, 2, 3]
EngineOffload = Literal["none", "optimizer", "parameters"]
ReferenceKind = Literal["copy", "shared_layers", "int8", "nf4", "adapter_off", "precomputed"]
Quantized = Literal["int8", "nf4"]
Dtype = Literal["fp32", "bf16", "fp16"]
CacheMode = Literal["off", "lazy", "full"]
AttentionName = Literal["auto", "cpu", "varlen", "sdpa", "padded"]
Precision = Literal["auto", "bf16", "fp16", "tf32", "fp32", "fp64"]
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
]  # transformers' names of schedules that need no metric, and a short one
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
"""Names that transformers has for trackers (its report_to), and the package that each needs; W&B has a block."""
COMPRESSIONS = ("", ".gz", ".bz2", ".xz", ".zst")
TEXT_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv")
DATA_SUFFIXES = (*(kind + packed for kind in TEXT_SUFFIXES for packed in COMPRESSIONS), ".parquet", ".arrow")
"""Ends of the names of data files that can be read."""
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
"""Metrics of an evaluation, without the eval_ or eval_NAME_ that they are reported with."""
Split = Literal["train", "eval"]
Exported = Literal["last", "best"]
MOST = 10**12  # of anything that is counted; larger numbers overflow where they meet tensors
Positive = Annotated[int, Field(ge=1, le=MOST)]
NonNegative = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]  # torch takes 64 bits, and each rank adds its own number
# Arguments of transformers' apply_chat_template that are no variables of a template, and are given here already.
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
"""Marks a field that may change between a run and its resumption: it does not touch the numbers of the run."""


class Block(BaseModel):
    """A frozen group of settings that refuses unknown keys; the docstring under a field is its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class IdentitySpec(Block):
    """Where the run lives and what it is called; the run directory is dir/name."""

    dir: str = Field("runs", json_schema_extra=FREE)
    """Folder of run directories, on a file system that every node shares. Relative to where the command is given."""
    name: str
    """Name of the run: the same name resumes the same run. Letters, digits, dot, dash, underscore."""
    seed: Seed = 42
    """Seed of the data order, of weights made on the spot and of dropout. An integer."""

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", value):  # neither .., .cache nor a flag
            rule = "must be 1 to 200 letters, digits, '.', '-' and '_', and start with a letter, digit or '_'"
            raise PydanticCustomError("run_name", rule)  # pyright: ignore[reportArgumentType]
        return value


class InitSpec(Block):
    """A model and tokenizer made on the spot, for quickstarts and tests: random weights, nothing downloaded."""

    model_type: str = "qwen2"
    """Architecture, a `model_type` of transformers."""
    config: dict[str, Any] = {}
    """Keyword arguments of that architecture's config (hidden_size, num_hidden_layers, ...)."""
    vocab_size: Positive = 1024
    """Tokens in the byte-level BPE tokenizer, which is trained on data.train. At least 260."""


class LoraSpec(Block):
    """Train an adapter of low rank beside a frozen base. Hu et al. 2021, arXiv 2106.09685."""

    r: Positive | None = None
    """Rank of the two factors; 16 when not set."""
    alpha: float | None = Field(None, gt=0)
    """Numerator of the adapter's weight, alpha / r; twice r when not set."""
    target_modules: list[str] | None = None
    """Names of the linear layers that get one (q_proj, v_proj, ...); every one but the head when not set."""
    adapter_path: str | None = None
    """Folder or hub name of an adapter to go on from, whose rank, alpha and layers are taken; the reference is then
    the model with this adapter as it was at the start."""
    base: Literal[Dtype, Quantized] | None = None
    """How the frozen base is held: fp32, bf16, fp16 (in which it then computes, unless precision is of 16 bits), or by
    bitsandbytes int8, nf4 (QLoRA: Dettmers et al. 2023, arXiv 2305.14314); as any policy, in fp32, when not set."""


class ModelSpec(Block):
    """The policy: where its weights and tokenizer come from, and which of them train."""

    path: str | None = None
    """Folder or hub name of a causal LM of transformers."""
    init: InitSpec | None = None
    """Instead of a path: a config made on the spot with random weights from run.seed."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; the model's own when not set."""
    pad_token: str | None = None
    """Token to pad with, from the tokenizer's vocabulary; needed only when the tokenizer has none."""
    disable_dropout: bool = True
    """Set every dropout of policy and reference to 0, as TRL does."""
    attention: AttentionName = Field("auto", json_schema_extra=FREE)
    """How a pair is laid out and attended to. Packed, the prompt computed once, nothing padded: cpu, varlen (GPUs
    from Ampere on), sdpa (anywhere, slower); auto takes the one for the device. padded: two padded rows per pair, as
    TRL does; auto takes it, and says why, for a model whose packed log-probs would not be exact."""
    num_frozen_layers: Positive | None = None
    """Lowest layers that do not train, and with them the embeddings."""
    tied_head: Literal["untie", "freeze"] = "untie"
    """What becomes of an output head that is one with the embeddings when these are frozen (num_frozen_layers,
    reference.num_shared_layers): untie gives it weights of its own, which train; freeze leaves it as it is."""
    lora: LoraSpec | None = None
    """Train an adapter instead of the weights; needs the extra `peft`."""


class UserCodeSpec(Block):
    """Code of a user's; module:attr alone is its path."""

    path: str
    """A class, function or object as module:attr."""
    kwargs: dict[str, Any] = {}
    """Keyword arguments of the class's constructor, or of the function."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class SourceSpec(Block):
    """A place that holds preference pairs."""

    path: str
    """JSONL, JSON, CSV, TSV (also .gz, .bz2, .xz, .zst), Parquet or Arrow file, a folder saved by `datasets` or of such
    files, or a hub name."""
    name: str | None = None
    """Configuration of a hub data set; its default when not set."""
    split: str | None = None
    """Split of a hub data set or a folder; when not set, train for training pairs, test for evaluation pairs."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class TrainingSetSpec(SourceSpec):
    """A training set."""

    weight: float = Field(1.0, gt=0)
    """How often its pairs are seen in an epoch: 2 is twice; 0.5 is one half of them, and in the next the other."""


class DataSpec(Block):
    """The preference pairs."""

    train: list[TrainingSetSpec] = Field(min_length=1)
    """JSONL, JSON, CSV, Parquet or Arrow file, a folder saved by `datasets`, or a hub name (split train); {path, name,
    split} for another configuration or split; a list of these, with a weight each, for several sets."""
    eval: dict[str, SourceSpec] = {}
    """The same for the evaluation pairs (hub name: split test), or {NAME: ...} for several sets, whose metrics begin
    with eval_NAME_ instead of eval_; no evaluation when not set."""
    eval_fraction: float | None = Field(None, gt=0, lt=1)
    """Instead of eval: the part of the training pairs that is held out and evaluated, chosen by run.seed; pairs of one
    prompt stay together, so that no prompt is trained on and evaluated."""
    weight_column: str | None = None
    """Column of every row with the weight of its pair in loss and metrics, more than 0: a pair of weight 2 counts as
    two such rows; 1 each when not set."""
    margin_column: str | None = None
    """Column of every row with the margin by which its chosen completion is to win, in units of rewards (ODPO: Amini et
    al. 2024, arXiv 2402.10571); none when not set."""
    ignore_columns: list[str] = []
    """Columns to leave unread although they look like a part of the prompt (system, history, images, ...), which is an
    error otherwise."""
    collator: UserCodeSpec | None = None
    """A user's collator of rows into TRL's input_ids, attention_mask and completion_mask, as module:attr or {path,
    kwargs}; trl.trainer.dpo_trainer:DataCollatorForPreference is one. A constructor that takes pad_token_id gets the
    tokenizer's, unless kwargs have it; a parameter `context` of the call receives a CollateContext."""
    max_length: Positive | None = 1024
    """Tokens of prompt plus one completion; longer ones are truncated. No limit when null."""
    truncation: Literal["keep_start", "keep_end"] = "keep_start"
    """Which end of a too long sequence stays; keep_start drops pairs whose prompt alone fills max_length. keep_end is
    the collator's work, also of a user's: one that does not truncate feeds whole sequences."""
    max_prompt_length: Positive | None = None
    """Tokens of a prompt, of which the last ones stay; cut before max_length acts. No limit when not set."""
    max_completion_length: Positive | None = None
    """Tokens of a completion, of which the first ones stay; cut before max_length acts. No limit when not set."""
    system_prompt: str | None = Field(None, min_length=1)
    """Content of a system message that is put before every conversation without one."""
    chat_template: str | None = None
    """Jinja template of conversations, by its file or as it stands, instead of the tokenizer's; exported with it."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the chat template for every conversation, for example {enable_thinking: false}; what a row has in
    its own chat_template_kwargs, and its tools, win."""
    on_bad_row: Literal["error", "drop"] | None = None
    """What to do with every unusable row. Not set: a row of the wrong shape is an error; ties, empty completions and
    over-long prompts are dropped and counted."""
    num_proc: Positive | None = Field(None, json_schema_extra=FREE)
    """Processes that tokenise; as many as cores, 16 at most, when not set."""
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
            raise PydanticCustomError("sets", "must be one source, or one for each name")
        return {str(name): source for name, source in value.items()}  # YAML reads a bare 2024 as a number

    @field_serializer("eval")
    def _one_set_has_no_name(self, value: dict[str, SourceSpec]) -> Any:
        sets = {name: source.model_dump() for name, source in value.items()}
        return sets.get("", sets or None)

    @property
    def eval_sets(self) -> list[str]:
        """Names of the evaluation sets; that of a single one is empty."""
        return list(self.eval) if self.eval_fraction is None else [""]

    def sources(self, split: Split, name: str | None = None) -> dict[str, SourceSpec]:
        """The sources of a split by their settings: data.train, or data.train.0 and on, where there are several;
        data.eval, or data.eval.NAME. name: of the only evaluation set that is wanted."""
        if split == "train":
            several = len(self.train) > 1
            return {f"data.train.{place}" if several else "data.train": each for place, each in enumerate(self.train)}
        wanted = self.eval if name is None else {name: self.eval[name]}
        return {self.eval_key(name): source for name, source in wanted.items()}

    @staticmethod
    def eval_key(name: str) -> str:
        """The setting of the evaluation set with that name."""
        return f"data.eval.{name}" if name else "data.eval"

    @property
    def keep_last(self) -> int | None:
        """Tokens at the end of a sequence that the collator keeps; None where tokenising has truncated already."""
        return self.max_length if self.truncation == "keep_end" else None


def jinja_template(given: str) -> str:
    """The text that data.chat_template stands for: itself, or what is in the file, or the tokenizer's folder, it names.

    Raises:
        UserError: there is no such file, or it is no template.
    """
    if "{{" in given or "{%" in given:
        return given
    path = Path(given).expanduser()
    cure = "give a file such as my-template.jinja, a tokenizer's folder, or the template itself"
    try:
        found = (path / "chat_template.jinja" if path.is_dir() else path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        rule = f"cannot be read ({getattr(error, 'strerror', 'it is not UTF-8 text')})"
        raise UserError("data.chat_template", given, rule, cure) from None
    if "{{" not in found and "{%" not in found:
        raise UserError("data.chat_template", given, "is no Jinja template: it has neither {{ nor {%", cure)
    return found


class DpoSpec(Block):
    """The loss. Names and defaults are TRL's."""

    loss_type: str | list[str] = "sigmoid"
    """Loss, or list of losses that are added: sigmoid is DPO (Rafailov et al. 2023, eq. 7), [sigmoid, sft] RPO. The
    functions of these names in orchestrator/dpo/losses.py have their papers and equations. One of your own as
    module:attr: a function (terms: PairTerms, dpo: DpoSpec) -> [B] of that file's types."""
    loss_weights: list[float] | None = None
    """Factor of each loss, in the order of loss_type; 1 each when not set. Dimensionless."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference: reward = beta * log(policy / reference). Dimensionless."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """robust, aot, aot_unpaired, cdpo, simpo: the probability that a pair's label is wrong; exo_pair: the part of the
    label that goes to the rejected completion, more than 0."""
    f_divergence_type: FDivergence = "reverse_kl"
    """Divergence that keeps the policy near its reference (f-DPO: Wang et al. 2023, arXiv 2309.16240), for the losses
    over the difference of a pair's scores."""
    f_alpha_divergence_coef: float = 0.5
    """Alpha of alpha_divergence; 1 is reverse_kl. Dimensionless."""
    ld_alpha: float | None = Field(None, ge=0, le=1)
    """Weight of the tokens of a completion beyond as many as the other one of its pair has, in the log-probs of policy
    and reference (LD-DPO: Liu et al. 2024, arXiv 2409.06411); 1 when not set."""
    use_weighting: bool = False
    """Multiply the loss of a pair by how likely the policy itself would write it (WPO: Zhou et al. 2024, arXiv
    2406.11827)."""
    discopop_tau: float = Field(0.05, gt=0)
    """Temperature of the modulation in discopop. Dimensionless."""
    router_aux_loss_coef: float | None = None
    """0: train a mixture of experts without its load-balancing loss, which is not computed here; a model whose config
    weighs it is refused when this is not set."""
    simpo_gamma: float = Field(0.5, ge=0)
    """Margin that simpo wants, in units of its reward: beta times log-prob per token."""

    @field_validator("loss_type", mode="before")
    @classmethod
    def _one_or_several_losses(cls, value: Any) -> Any:
        names = list(value) if isinstance(value, list | tuple) else [value]
        own = [name for name in names if isinstance(name, str) and ":" in name]
        if not names or any(name not in (*get_args(LossType), *own) for name in names):
            raise PydanticKnownError("literal_error", {"expected": ", ".join(map(repr, get_args(LossType)))})
        return names[0] if len(names) == 1 else names  # a list of one is that one: it resumes a run that named it

    @property
    def loss_types(self) -> list[str]:
        """The losses, also where there is one."""
        return self.loss_type if isinstance(self.loss_type, list) else [self.loss_type]

    @property
    def own_losses(self) -> list[str]:
        """Those that are a user's, as module:attr: each may read any setting of this block."""
        return [name for name in self.loss_types if ":" in name]

    @property
    def sees_batch(self) -> bool:
        """Whether one of them looks at the whole global batch."""
        return not set(OF_BATCH).isdisjoint(self.loss_types)

    @property
    def weights(self) -> list[float]:
        """The factor of each of them."""
        return self.loss_weights or [1.0] * len(self.loss_types)


class BatchSpec(Block):
    """How many pairs make a step. grad_accum is derived."""

    global_batch_size: Positive = 32
    """Pairs per optimizer step, over all ranks."""
    micro_batch_size: Positive | None = Field(None, json_schema_extra=FREE)
    """Pairs per forward pass on one rank, fewer where a CPU is faster so. Exactly one of this and the next."""
    max_tokens_per_microbatch: Positive | None = Field(None, json_schema_extra=FREE)
    """Tokens per forward pass on one rank as they are laid out: packed, prompt and both completions; padded, with the
    padding. A longer single pair still gets its pass."""

    def pairs_per_rank(self, ranks: int) -> int:
        """Pairs of a step that the busiest of so many ranks has."""
        return -(-self.global_batch_size // ranks)

    def grad_accum(self, ranks: int) -> int | None:
        """Forward passes in a step on that rank; None where tokens say how many."""
        return -(-self.pairs_per_rank(ranks) // self.micro_batch_size) if self.micro_batch_size else None


class OptimizerSpec(Block):
    """The optimizer; its state is sharded over the ranks."""

    name: str = "torch.optim.AdamW"
    """Dotted name. Under every engine the elementwise ones of torch.optim (AdamW, SGD, ...), whose state any engine and
    number of ranks resume; under ddp torch.optim.Muon and Adafactor, and those of bitsandbytes.optim (AdamW8bit,
    PagedAdamW32bit, ...); under deepspeed FusedAdam and DeepSpeedCPUAdam of deepspeed.ops.adam; under ddp with
    engine.shard_optimizer=false your own, as module:attr."""
    lr: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """Decay of matrices per unit of learning rate; norms and biases are never decayed."""
    kwargs: dict[str, Any] = {}
    """Further keyword arguments of the optimizer, for example {momentum: 0.9}."""


class SchedulerSpec(Block):
    """The learning rate over optimizer steps actually taken."""

    name: str = "linear"
    """linear, cosine, constant, cosine_with_min_lr, wsd (warmup_stable_decay) or another name of transformers', or a
    scheduler of torch by its dotted name (torch.optim.lr_scheduler.StepLR)."""
    warmup_steps: NonNegative = 0
    """Optimizer steps of linear warm-up, before the schedules of transformers."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """The same as a part of all steps, rounded up."""
    kwargs: dict[str, Any] = {}
    """Keyword arguments of the schedule: {min_lr_rate: 0.1}, {num_decay_steps: 100}, {step_size: 30, gamma: 0.1}."""

    def warmup(self, total_steps: int) -> int:
        """Optimizer steps of warm-up in a run of that many."""
        return self.warmup_steps if self.warmup_ratio is None else math.ceil(self.warmup_ratio * total_steps)


class TrainingSpec(Block):
    """How long to train, and how a step is taken."""

    max_steps: Positive | None = None
    """Optimizer steps after which training ends, if its epochs have not ended before."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training pairs after which training ends; 1 when neither this nor max_steps is set."""
    gradient_checkpointing: bool = Field(False, json_schema_extra=FREE)
    """Recompute activations in the backward pass: less memory, about a third more time."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Clip the gradient to this L2 norm; no clipping when null."""
    logging_steps: Positive = Field(10, json_schema_extra=FREE)
    """Optimizer steps between two logged lines."""
    token_metrics: bool = Field(True, json_schema_extra=FREE)
    """Also report what the head says of each token: entropy, logits/chosen, logits/rejected, mean_token_accuracy."""
    pair_ledger: bool = Field(True, json_schema_extra=FREE)
    """Keep what each step saw of each pair in RUN_DIR/pairs.parquet, about 50 bytes a pair and step, for
    `orchestrator pairs`."""


class EngineSpec(Block):
    """Who owns gradients and optimizer state. Changes speed and memory and, in fp32, nothing else."""

    kind: EngineKind = Field("ddp", json_schema_extra=FREE)
    """ddp: whole weights on every rank, the optimizer's state sharded. deepspeed: ZeRO, of engine.zero_stage. fsdp:
    weights, gradients and state sharded by torch's fully_shard (FSDP2)."""
    zero_stage: ZeroStage | None = Field(None, json_schema_extra=FREE)
    """What DeepSpeed shards: 1 the optimizer's state, 2 gradients too, 3 weights too. 2 when neither this nor
    engine.deepspeed_config says. Rajbhandari et al. 2019, arXiv 1910.02054."""
    deepspeed_config: dict[str, Any] | None = Field(None, json_schema_extra=FREE)
    """A DeepSpeed JSON, by its path, or what would stand in one; "auto" in it is filled from the settings, and what
    contradicts them is refused."""
    shard_optimizer: bool = Field(True, json_schema_extra=FREE)
    """ddp: deal the optimizer's state over the ranks (ZeroRedundancyOptimizer), a parameter to one rank."""
    offload: EngineOffload = Field("none", json_schema_extra=FREE)
    """What lies in the host's memory. optimizer: its state and the weights that it updates (deepspeed); parameters:
    all weights between their uses as well (deepspeed at stage 3; fsdp)."""
    reshard_after_forward: bool = Field(True, json_schema_extra=FREE)
    """fsdp: drop a layer's gathered weights after its forward pass, and gather them again for the backward one."""
    bucket_size: Positive | None = Field(None, json_schema_extra=FREE)
    """Elements of gradient that travel together (deepspeed, ddp); their own choice when not set."""
    overlap_comm: bool | None = Field(None, json_schema_extra=FREE)
    """deepspeed: reduce gradients while the backward pass goes on; its own choice when not set."""

    @field_validator("deepspeed_config", mode="before")
    @classmethod
    def _file_is_read(cls, value: Any) -> Any:
        return deepspeed_json(value) if isinstance(value, str) else value

    @property
    def stage(self) -> ZeroStage:
        """The ZeRO stage that deepspeed runs."""
        zero = (self.deepspeed_config or {}).get("zero_optimization")
        in_file = zero.get("stage") if isinstance(zero, dict) else None
        return self.zero_stage or next((stage for stage in get_args(ZeroStage) if stage == in_file), 2)

    @property
    def shards_weights(self) -> bool:
        """Whether a rank holds only a part of each weight between forward passes."""
        return self.kind == "fsdp" or (self.kind == "deepspeed" and self.stage == 3)


def deepspeed_json(given: str | dict[str, Any] | None) -> dict[str, Any]:
    """What engine.deepspeed_config stands for, or the file that it names; nothing where it is not set.

    Raises:
        UserError: there is no such file, or it is no JSON object.
    """
    if not isinstance(given, str):
        return given or {}
    path, cure = given, "give a DeepSpeed JSON, for example configs/deepspeed/zero2.json"
    try:
        found = json.loads(Path(path).expanduser().read_text())
    except OSError as error:
        rule = f"cannot be read ({error.strerror})"
        raise UserError("engine.deepspeed_config", path, rule, cure) from None
    except ValueError as error:
        raise UserError("engine.deepspeed_config", path, f"is no JSON: {error}", cure) from None
    if not isinstance(found, dict):
        raise UserError("engine.deepspeed_config", path, "is no JSON object", cure)
    return found


class ReferenceSpec(Block):
    """The frozen model that the policy is measured against, held by each rank for itself."""

    kind: ReferenceKind = "copy"
    """copy: a frozen copy of the policy's start, or of another model. shared_layers: the policy's lowest layers are
    frozen, and stored and computed once for both. int8, nf4: a copy quantised by bitsandbytes, whose error is measured
    at the start. adapter_off: the policy without its LoRA adapter, or with the one it started from. precomputed: every
    log-prob is made before the first step, by the policy as it starts or by the model at path, and no reference stays
    in memory."""
    path: str | None = None
    """Folder or hub name of the reference; the policy's start when not set."""
    num_shared_layers: Positive | None = None
    """Layers of kind shared_layers, counted from the embeddings, which are shared as well."""
    dtype: Dtype | None = None
    """Type of a copy's weights; the policy's when not set."""
    sharded: bool = Field(False, json_schema_extra=FREE)
    """Shard the weights of a copy, or the own layers of kind shared_layers, with the policy's, where the engine shards
    weights (deepspeed at stage 3, fsdp); otherwise each rank holds them whole."""
    offload: bool = Field(False, json_schema_extra=FREE)
    """Keep a copy's weights in the host's memory, and bring each layer to the device when it runs (accelerate)."""
    max_reward_error: float | None = Field(None, gt=0)
    """Refuse a reference of int8, nf4 or a dtype of its own that changes a pair's reward margin by more than this at
    the start. Dimensionless, as rewards are: beta times nats."""
    cache: CacheMode = Field("lazy", json_schema_extra=FREE)
    """Log-probs of the reference kept on disk, by content, and shared by every run that asks the same reference about
    the same tokens. lazy: as training meets a pair, so that the second epoch costs nothing; full: all of them before
    the first step; off: the reference runs every time, as it does with data.collator and with sync_every, and where
    it is lazy for the pairs of training sets with weights."""
    sync_every: Positive | None = None
    """Optimizer steps after which the reference moves towards the policy (TR-DPO: Gorbatovski et al. 2024, arXiv
    2404.09656); never when not set."""
    sync_alpha: float = Field(0.6, gt=0, le=1)
    """How far: reference = sync_alpha * policy + (1 - sync_alpha) * reference."""

    @property
    def is_approximate(self) -> bool:
        """Whether it computes otherwise than the model that it stands for."""
        return self.kind in get_args(Quantized) or self.dtype is not None

    @field_validator("cache", mode="before")
    @classmethod
    def _off_is_no_boolean(cls, value: Any) -> Any:
        return "off" if value is False else value  # how YAML reads a bare off


class EarlyStoppingSpec(Block):
    """When evaluations that get no better end the training (transformers' EarlyStoppingCallback)."""

    patience: Positive
    """Evaluations in a row without a better evaluation.metric_for_best after which training ends."""
    min_delta: float = Field(0.0, ge=0)
    """Better by no more than this is not better. In the units of the metric."""


class EvaluationSpec(Block):
    """Evaluation on data.eval: before the first step, as often as is said here, and after the last."""

    every_steps: Positive | None = Field(None, json_schema_extra=FREE)
    """Optimizer steps between evaluations; none for their number when not set."""
    every_epoch: bool = Field(False, json_schema_extra=FREE)
    """Evaluate at the end of every epoch."""
    at_start: bool = Field(True, json_schema_extra=FREE)
    """Evaluate before the first step."""
    metric_for_best: str | None = None
    """Metric that decides which step was best (and early stopping), for example loss or rewards/accuracies; of several
    evaluation sets it names one, as NAME_loss. A step that is the best so far is saved, and its checkpoint kept;
    that before the first step never is."""
    greater_is_better: bool | None = None
    """Direction of metric_for_best; when not set, false for names that end in loss and true otherwise."""
    compute_metrics: str | None = Field(None, json_schema_extra=FREE)
    """A user's function as module:attr, EvalPrediction -> {name: number}: metrics besides ours, with eval_ before their
    names. Rank zero hands it the Predictions of orchestrator/training/compute_metrics.py; the other ranks wait for it,
    cluster.collective_timeout_s at most."""
    logits: bool = Field(False, json_schema_extra=FREE)
    """Hand over what TRL does: logits and input_ids of padded sequences, for which the policy runs once more."""
    batch_eval_metrics: bool = Field(False, json_schema_extra=FREE)
    """Hand over a batch at a time, as tensors, with compute_result=True at the last, whose answer counts."""
    batch_size: Positive | None = Field(None, json_schema_extra=FREE)
    """Pairs in a batch of logits or of batch_eval_metrics; batch.micro_batch_size when not set, else 1."""
    samples: NonNegative = Field(0, json_schema_extra=FREE)
    """Prompts of the first evaluation set that rank zero answers at the end of the run, by the model before and after
    training, each whole on one device: greedily, 64 tokens at most."""
    early_stopping: EarlyStoppingSpec | None = Field(None, json_schema_extra=FREE)
    """End training early; not when not set."""

    @property
    def best_metric(self) -> str | None:
        """metric_for_best as evaluations report it."""
        return None if self.metric_for_best is None else f"eval_{self.metric_for_best.removeprefix('eval_')}"


class CheckpointSpec(Block):
    """What survives a crash."""

    every_steps: Positive | None = Field(None, json_schema_extra=FREE)
    """Optimizer steps between checkpoints; only at the end when not set."""
    keep: Positive = Field(2, json_schema_extra=FREE)
    """Newest checkpoints that stay on disk; the best by evaluation.metric_for_best stays as well."""
    export: Exported = Field("last", json_schema_extra=FREE)
    """Which checkpoint becomes RUN_DIR/model: the last, or the best by evaluation.metric_for_best."""
    async_save: bool = Field(False, json_schema_extra=FREE)
    """Copy the state to the host's memory and write it in the background, while training goes on."""


class ClusterSpec(Block):
    """What the driver asks of Ray."""

    num_workers: int | list[int] = Field(1, json_schema_extra=FREE)
    """Ranks: one worker each. [fewest, most]: as many as there is room for when the run starts or goes on; where room
    comes (in a cluster that is joined, placed PACK or SPREAD), the run is saved and goes on with more."""
    resources: dict[str, Annotated[float, Field(ge=0)]] = Field({}, json_schema_extra=FREE)
    """Resources of one worker, for example {CPU: 4, GPU: 1}; when empty, one GPU where there is any, else one CPU."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field("PACK", json_schema_extra=FREE)
    """Ray's placement strategy for the workers."""
    storage_path: str | None = Field(None, json_schema_extra=FREE)
    """Folder for Ray Train's own records; RUN_DIR/logs/ray when not set. Checkpoints never go there."""
    max_failures: NonNegative = Field(3, json_schema_extra=FREE)
    """Deaths of workers since the last new checkpoint that are survived by resuming."""
    auth: Literal["token", "disabled"] = Field("token", json_schema_extra=FREE)
    """Authentication of a Ray that we start ourselves (RAY_AUTH_MODE); a Ray we join has its own."""
    collective_timeout_s: Positive = Field(600, json_schema_extra=FREE)
    """Seconds that a rank waits for the others in a collective before the run is given up and resumed."""
    preflight: bool = Field(True, json_schema_extra=FREE)
    """Look at every node first, as `orchestrator doctor` does, and refuse to train where something is wrong."""
    network_interface: str | None = Field(None, json_schema_extra=FREE)
    """Interface over which ranks meet, for example ib0; when not set, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME of each
    node say, else the one by which it reaches the cluster's head."""
    replacement_wait_s: NonNegative = Field(600, json_schema_extra=FREE)
    """Seconds that a run which has lost a node waits for another, where what is left cannot hold its workers."""

    @field_validator("num_workers", mode="before")
    @classmethod
    def _one_or_two_numbers(cls, value: Any) -> Any:
        is_range = isinstance(value, list | tuple)
        ends = [int(end) if str(end).isdecimal() else 0 for end in (value if is_range else [value] * 2)]
        if len(ends) != 2 or not 1 <= ends[0] <= ends[1]:
            raise PydanticCustomError("workers", "must be an integer of 1 or more, or [fewest, most]")
        return ends if is_range else ends[0]

    @property
    def min_workers(self) -> int:
        """Fewest workers that the run goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Most workers that the run takes."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class SlurmSpec(Block):
    """What `orchestrator submit --to slurm` asks of sbatch; nodes, GPUs and CPUs of a node follow from `cluster`."""

    workers_per_node: Positive | None = Field(None, json_schema_extra=FREE)
    """Workers on each node; follows where there is one worker, or cluster.placement is STRICT_PACK or STRICT_SPREAD."""
    time: str | None = Field(None, json_schema_extra=FREE)
    """Limit of a start, after which the job is requeued: D-HH:MM:SS, HH:MM:SS or MM:SS, or a number of seconds, as
    YAML reads 24:00:00. The partition's own when not set."""
    signal_s: Annotated[int, Field(ge=1, le=65535)] = Field(300, json_schema_extra=FREE)
    """Seconds before that limit at which the run is asked to save; Slurm may ask up to a minute sooner."""
    partition: str | None = Field(None, json_schema_extra=FREE)
    """Partition; the cluster's default when not set."""
    account: str | None = Field(None, json_schema_extra=FREE)
    """Account that is charged; your own default when not set."""
    qos: str | None = Field(None, json_schema_extra=FREE)
    """Quality of service; the default when not set."""
    args: list[str] = Field([], json_schema_extra=FREE)
    """Further flags of sbatch, for example [--mem=0, --exclusive]; they win over ours."""

    @field_validator("time", mode="before")
    @classmethod
    def _seconds_are_a_time(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return f"{value // 3600}:{value // 60 % 60:02}:{value % 60:02}"
        if value is not None and not re.fullmatch(r"\d+-\d+(:\d\d?){0,2}|\d+(:\d\d?){1,2}", str(value)):
            raise PydanticCustomError("time", "must be D-HH:MM:SS, HH:MM:SS or MM:SS, or a number of seconds")
        return value

    @property
    def time_s(self) -> int | None:
        """The limit in seconds."""
        if self.time is None:
            return None
        days, dash, rest = self.time.rpartition("-")
        parts = [int(part) for part in rest.split(":")]
        parts = [*parts, 0, 0][:3] if dash else [0, 0, *parts][-3:]
        return ((int(days or 0) * 24 + parts[0]) * 60 + parts[1]) * 60 + parts[2]


class WandbSpec(Block):
    """Weights & Biases."""

    project: str = Field("dpo-orchestrator", json_schema_extra=FREE)
    """Project the run appears in."""
    group: str | None = Field(None, json_schema_extra=FREE)
    """Group within the project."""
    mode: Literal["auto", "online", "offline", "disabled"] = Field("auto", json_schema_extra=FREE)
    """auto: online where a key is found, else offline files in RUN_DIR/wandb."""
    key_file: str | None = Field(None, json_schema_extra=FREE)
    """File that holds the API key and that others cannot read (chmod 600), where rank zero runs; when not set, W&B
    looks for a key in WANDB_API_KEY and in ~/.netrc."""


class RunSpec(Block):
    """One run, whole. The rules between its settings stand in rules.py."""

    run: IdentitySpec
    """Where the run lives and what it is called."""
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
    """The learning rate over time."""
    training: TrainingSpec = TrainingSpec()  # pyright: ignore[reportCallIssue]
    """Length of training and how a step is taken."""
    precision: Precision = "auto"
    """Type of the arithmetic over fp32 weights: auto is bf16 where the GPU has it, else fp32; tf32 is fp32 with the
    products of matrices in TF32 (GPUs from Ampere on), which is off in every other; fp64 is for tests."""
    engine: EngineSpec = EngineSpec()  # pyright: ignore[reportCallIssue]
    """Who owns gradients and optimizer state."""
    reference: ReferenceSpec = ReferenceSpec()  # pyright: ignore[reportCallIssue]
    """The frozen model the policy is measured against."""
    callbacks: list[UserCodeSpec] = Field([], json_schema_extra=FREE)
    """Trackers by name (tensorboard, mlflow, ...) and a user's transformers.TrainerCallback as module:attr, alone or as
    {path, kwargs}."""
    evaluation: EvaluationSpec = EvaluationSpec()  # pyright: ignore[reportCallIssue]
    """When to evaluate."""
    checkpoint: CheckpointSpec = CheckpointSpec()  # pyright: ignore[reportCallIssue]
    """When to save, and how much to keep."""
    cluster: ClusterSpec = ClusterSpec()  # pyright: ignore[reportCallIssue]
    """What the driver asks of Ray."""
    slurm: SlurmSpec = SlurmSpec()  # pyright: ignore[reportCallIssue]
    """What `submit --to slurm` asks of sbatch."""
    wandb: WandbSpec = WandbSpec()  # pyright: ignore[reportCallIssue]
    """Weights & Biases."""

    @property
    def run_dir(self) -> Path:
        """The run directory, run.dir/run.name."""
        return Path(self.run.dir) / self.run.name

    @property
    def cache_dir(self) -> Path:
        """Where tokenised data and models made on the spot are kept, shared between runs of one run.dir."""
        return Path(self.data.cache_dir) if self.data.cache_dir else Path(self.run.dir) / ".cache"

    @property
    def frozen_layers(self) -> int | None:
        """Lowest layers of the policy that do not train."""
        return self.model.num_frozen_layers or self.reference.num_shared_layers

    @property
    def reference_cache(self) -> CacheMode:
        """What is done about the reference's log-probs: nothing that it says is known if it moves, or before a user's
        collator has run."""
        if self.reference.sync_every or self.data.collator:
            return "off"
        return "full" if self.reference.kind == "precomputed" else self.reference.cache

    @property
    def greater_is_better(self) -> bool:
        """Direction of evaluation.metric_for_best, by the rule of transformers when it is not set."""
        if self.evaluation.greater_is_better is not None:
            return self.evaluation.greater_is_better
        return not (self.evaluation.metric_for_best or "").endswith("loss")

    @model_validator(mode="after")
    def _rules(self) -> "RunSpec":
        from orchestrator.settings.rules import check_rules  # which imports this module

        check_rules(self)
        return self


def changed_on_resume(before: RunSpec, after: RunSpec) -> list[tuple[str, Any, Any]]:
    """(key, value before, value now) of each setting that differs although it may not change on resume."""
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
    """A setting as one would write it: blocks without defaults, and a path alone as that."""
    if isinstance(value, list):
        return [_shown(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _shown(entry) for name, entry in value.items()}
    said = value.model_dump(exclude_defaults=True) if isinstance(value, Block) else value
    return said["path"] if isinstance(value, Block) and said.keys() == {"path"} else said
