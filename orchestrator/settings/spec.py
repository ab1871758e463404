"""Every setting of a run: its type, unit, default, the rules between settings, and which may change on resume.

Importing this module loads neither torch nor ray, so that a bad run is refused on the laptop in half a second.
"""

import difflib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, field_validator, model_validator
from pydantic_core import PydanticCustomError, PydanticKnownError

from orchestrator.settings.deepspeed import contradictions


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
OptimizerKind = Literal["elementwise", "whole", "unknown"]
DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
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
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]

# Optimizers whose update of an element reads that element alone: they stay exact however the state is sharded.
ELEMENTWISE_OPTIMIZERS = [
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
]  # of torch.optim
# By the module that they are named by; those beside the elementwise ones and DeepSpeed's read more of a parameter.
OPTIMIZERS: dict[str, list[str]] = {
    "torch.optim": [*ELEMENTWISE_OPTIMIZERS, "Muon", "Adafactor"],
    "bitsandbytes.optim": [
        "Adam8bit",
        "AdamW8bit",
        "PagedAdam8bit",
        "PagedAdamW8bit",
        "PagedAdamW32bit",
        "Lion8bit",
        "PagedLion8bit",
        "AdEMAMix8bit",
        "PagedAdEMAMix8bit",
    ],
    "deepspeed.ops.adam": ["FusedAdam", "DeepSpeedCPUAdam"],
}
USELESS_OPTIMIZERS = {
    "torch.optim.LBFGS": "needs a closure, and looks across all parameters, of which a rank has some",
    "torch.optim.SparseAdam": "takes sparse gradients only, and a language model's are dense",
}
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

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class IdentitySpec(Block):
    """Where the run lives and what it is called; the run directory is dir/name."""

    dir: str = Field("runs", json_schema_extra=FREE)
    """Folder of run directories, on a file system that every node shares. Relative to where the command is given."""
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the run: the same name resumes the same run. Letters, digits, dot, dash, underscore."""
    seed: NonNegative = 42
    """Seed of the data order, of weights made on the spot and of dropout. An integer."""


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
    """JSONL, JSON or Parquet file, a folder saved by `datasets` or of such files, or a hub name."""
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

    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """How often its pairs are seen in an epoch: 2 is twice; 0.5 is one half of them, and in the next the other."""


class DataSpec(Block):
    """The preference pairs."""

    train: list[TrainingSetSpec] = Field(min_length=1)
    """JSONL, JSON or Parquet file, a folder saved by `datasets`, or a hub name (split train); {path, name, split} for
    another configuration or split; a list of these, with a weight each, for several sets."""
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
    loss_weights: list[Annotated[float, Field(allow_inf_nan=False)]] | None = None
    """Factor of each loss, in the order of loss_type; 1 each when not set. Dimensionless."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference: reward = beta * log(policy / reference). Dimensionless."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """robust, aot, aot_unpaired, cdpo, simpo: the probability that a pair's label is wrong; exo_pair: the part of the
    label that goes to the rejected completion, more than 0."""
    f_divergence_type: FDivergence = "reverse_kl"
    """Divergence that keeps the policy near its reference (f-DPO: Wang et al. 2023, arXiv 2309.16240), for the losses
    over the difference of a pair's scores."""
    f_alpha_divergence_coef: float = Field(0.5, allow_inf_nan=False)
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
    """Optimizer steps; instead of epochs."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training pairs; 1 when neither this nor max_steps is set."""
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
    """One run, whole. The rules between settings are here."""

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
        for rule in (
            _one_model,
            _one_micro_batch_key,
            _one_length,
            _row_tokens,
            _known_optimizer,
            _known_scheduler,
            _sources,
            _evaluation,
            _engine_parts,
            _engine_limits,
            _deepspeed_file,
            _loss_parts,
            _model_parts,
            _reference_parts,
            _reference_sharded,
            _reference_sync,
            _reference_cache,
            _resources,
            _elastic,
            _slurm,
        ):
            rule(self)
        for entry in self.callbacks:
            _known_callback(entry.path)
        if self.data.collator:
            _user_code("data.collator", self.data.collator.path)
        if self.evaluation.compute_metrics:
            _user_code("evaluation.compute_metrics", self.evaluation.compute_metrics)
        return self


def _one_model(spec: RunSpec) -> None:
    if spec.model.path and spec.model.init:
        raise UserError("model.path", spec.model.path, "model.init is set as well", "remove one of the two")
    if not (spec.model.path or spec.model.init):
        cure = "set it to a folder or hub name of a causal LM, or set model.init"
        raise UserError("model.path", spec.model.path, "there is no model to train", cure)
    if spec.model.init and spec.model.init.vocab_size < 260:
        raise UserError(
            "model.init.vocab_size",
            spec.model.init.vocab_size,
            "a byte-level tokenizer has 256 bytes and 4 special tokens",
            "set it to 260 or more",
        )


def _one_micro_batch_key(spec: RunSpec) -> None:
    batch = spec.batch
    if (batch.micro_batch_size is None) == (batch.max_tokens_per_microbatch is None):
        raise UserError(
            "batch",
            {"micro_batch_size": batch.micro_batch_size, "max_tokens_per_microbatch": batch.max_tokens_per_microbatch},
            "exactly one of the two says how large a forward pass is",
            "remove one, or set batch.micro_batch_size=1",
        )
    if batch.micro_batch_size and batch.micro_batch_size > batch.global_batch_size:
        raise UserError(
            "batch.micro_batch_size",
            batch.micro_batch_size,
            f"is more than batch.global_batch_size ({batch.global_batch_size})",
            f"set it to {batch.global_batch_size} or less",
        )


def _loss_parts(spec: RunSpec) -> None:
    """What acts in some losses and not in others."""
    dpo, names = spec.dpo, spec.dpo.loss_types
    listed, smoothing = ", ".join(names), dpo.label_smoothing
    own = dpo.own_losses
    not_of_scores = [name for name in names if name not in (*OF_SCORES, *own)]
    for name in own:
        _user_code("dpo.loss_type", name)
    _refuse(
        [
            _Clash(
                len(dpo.weights) != len(names),
                "dpo.loss_weights",
                dpo.loss_weights,
                f"is not one number for each of {listed}",
                f"give {len(names)}, or remove it: then each is 1",
            ),
            _Clash(
                smoothing > 0 and not {*SMOOTHED, *own} & set(names),
                "dpo.label_smoothing",
                smoothing,
                f"acts in {', '.join(SMOOTHED)}, not in {listed}",
                "remove it, or set dpo.loss_type=cdpo (sigmoid with smoothed labels) or robust",
            ),
            _Clash(
                smoothing == 0 and "exo_pair" in names,
                "dpo.label_smoothing",
                smoothing,
                "exo_pair takes its logarithm",
                "set it to 0.001, as its paper does",
            ),
            _Clash(
                smoothing >= 0.5 and "robust" in names,
                "dpo.label_smoothing",
                smoothing,
                "robust divides by 1 - 2 * dpo.label_smoothing, and with more every label would be the wrong one",
                "set it below 0.5, for example to 0.1",
            ),
            _Clash(
                spec.data.margin_column is not None and not {*WITH_MARGIN, *own} & set(names),
                "data.margin_column",
                spec.data.margin_column,
                f"acts in {', '.join(WITH_MARGIN)}, not in {listed}",
                "remove it, or take one of these as dpo.loss_type",
            ),
            _Clash(
                dpo.f_divergence_type != "reverse_kl" and not_of_scores != [],
                "dpo.f_divergence_type",
                dpo.f_divergence_type,
                f"is for losses over the difference of a pair's scores, which {', '.join(not_of_scores)} is not",
                f"remove it, or take dpo.loss_type of {', '.join(OF_SCORES)}",
            ),
            _Clash(
                dpo.f_alpha_divergence_coef != 0.5 and dpo.f_divergence_type != "alpha_divergence",
                "dpo.f_alpha_divergence_coef",
                dpo.f_alpha_divergence_coef,
                f"does not act on {dpo.f_divergence_type}",
                "remove it, or set dpo.f_divergence_type=alpha_divergence",
            ),
            _Clash(
                dpo.ld_alpha is not None and set(names) == {"sft"},
                "dpo.ld_alpha",
                dpo.ld_alpha,
                "does not act in sft, which counts every token of the chosen alike",
                "remove it",
            ),
            _Clash(
                dpo.router_aux_loss_coef not in (None, 0),
                "dpo.router_aux_loss_coef",
                dpo.router_aux_loss_coef,
                "the load-balancing loss of a mixture of experts is not computed here",
                "set it to 0",
            ),
            _Clash(
                dpo.use_weighting and dpo.sees_batch,
                "dpo.use_weighting",
                dpo.use_weighting,
                f"weighs pairs, and {listed} compares sorted pairs with one another",
                "remove it, or take another dpo.loss_type",
            ),
            _Clash(
                dpo.sees_batch and not spec.model.disable_dropout,
                "model.disable_dropout",
                spec.model.disable_dropout,
                f"{listed} runs the policy twice a step, and dropout would differ between the two",
                "set it to true, or take another dpo.loss_type",
            ),
            _Clash(
                dpo.discopop_tau != 0.05 and not own and "discopop" not in names,
                "dpo.discopop_tau",
                dpo.discopop_tau,
                f"does not act in {listed}",
                "remove it, or set dpo.loss_type=discopop",
            ),
            _Clash(
                dpo.simpo_gamma != 0.5 and not own and "simpo" not in names,
                "dpo.simpo_gamma",
                dpo.simpo_gamma,
                f"does not act in {listed}",
                "remove it, or set dpo.loss_type=simpo",
            ),
        ]
    )


def _one_length(spec: RunSpec) -> None:
    if spec.training.max_steps is not None and spec.training.epochs is not None:
        raise UserError(
            "training",
            {"max_steps": spec.training.max_steps, "epochs": spec.training.epochs},
            "only one of the two says how long to train",
            "remove training.epochs or training.max_steps",
        )


def _row_tokens(spec: RunSpec) -> None:
    """How a row becomes tokens."""
    data, whole = spec.data, spec.data.max_length or math.inf
    taken = next((name for name in data.chat_template_kwargs if name in TEMPLATE_CALL), "")
    _refuse(
        [
            _Clash(
                (data.max_prompt_length or 0) >= whole,
                "data.max_prompt_length",
                data.max_prompt_length,
                f"leaves no room for a completion in data.max_length ({whole})",
                "lower it, or raise data.max_length",
            ),
            _Clash(
                (data.max_completion_length or 0) > whole,
                "data.max_completion_length",
                data.max_completion_length,
                f"is more than data.max_length ({whole}), which counts the prompt as well",
                "remove it, or raise data.max_length",
            ),
            _Clash(
                taken != "",
                f"data.chat_template_kwargs.{taken}",
                data.chat_template_kwargs.get(taken),
                "is no variable of a template, and said already where rows become tokens",
                "remove it",
            ),
        ]
    )


def optimizer_kind(name: str) -> OptimizerKind:
    """What an optimizer, by its dotted name or module:attr, reads in order to update an element of a parameter.

    elementwise: that element alone, so that its state may be cut anywhere, and resumed by any engine at any world size.
    whole: more of the same parameter. unknown: code of a user's.
    """
    module, _, last = name.rpartition(".")
    if module == "deepspeed.ops.adam" or (module == "torch.optim" and last in ELEMENTWISE_OPTIMIZERS):
        return "elementwise"
    return "whole" if module in OPTIMIZERS else "unknown"


def check_optimizer(key: str, name: str, engine: EngineSpec) -> None:
    """Refuse an optimizer whose maths that engine would change.

    key: the setting, or argument, that it comes from. name: dotted, or module:attr.

    Raises:
        UserError: with the reason.
    """
    module, _, last = name.rpartition(".")
    kind, adamw = optimizer_kind(name), "take torch.optim.AdamW"
    if name in USELESS_OPTIMIZERS:
        raise UserError(key, name, USELESS_OPTIMIZERS[name], adamw)
    if module == "deepspeed.ops.adam" and engine.kind != "deepspeed":
        raise UserError(key, name, "is DeepSpeed's own", f"set engine.kind=deepspeed, or {adamw}")
    if kind == "unknown" and (engine.kind != "ddp" or engine.shard_optimizer):
        rule = "is code of yours, whose maths may need more than the shard that a rank holds"
        raise UserError(key, name, rule, "set engine.kind=ddp and engine.shard_optimizer=false")
    if kind == "whole" and engine.kind != "ddp":
        why = "works on whole matrices, and under fsdp a rank holds some rows of each"
        if module == "bitsandbytes.optim":
            why = f"keeps its state in blocks of 8 bits or in pages, which the shards of {engine.kind} would cut"
        elif engine.kind == "deepspeed":
            why = "works on matrices, and deepspeed makes one long vector of them: it would "
            why += "raise" if last == "Muon" else "silently compute something else"
        raise UserError(key, name, why, f"set engine.kind=ddp, or {adamw}")
    if name == "torch.optim.Adagrad" and engine.kind == "deepspeed":
        rule = "is made anew by deepspeed, with one group of weights, so that norms and biases would be decayed"
        raise UserError(key, name, rule, f"set engine.kind=ddp or fsdp, or {adamw}")
    if last == "DeepSpeedCPUAdam" and engine.offload == "none":
        rule, cure = "updates weights that lie in the host's memory", "set engine.offload=optimizer"
        raise UserError(key, name, rule, f"{cure}, or take deepspeed.ops.adam.FusedAdam")
    if last == "FusedAdam" and engine.offload != "none":
        rule = f"updates weights that lie on the GPU, and engine.offload is {engine.offload}"
        raise UserError(key, name, rule, "take deepspeed.ops.adam.DeepSpeedCPUAdam, or torch.optim.AdamW")


# What TRL calls them.
TRL_OPTIMIZERS = {
    "adamw": "torch.optim.AdamW",
    "adamw_torch": "torch.optim.AdamW",
    "adamw_hf": "torch.optim.AdamW",
    "adamw_torch_fused": "torch.optim.AdamW with optimizer.kwargs={fused: true}",
    "adam": "torch.optim.Adam",
    "sgd": "torch.optim.SGD",
    "adagrad": "torch.optim.Adagrad",
    "rmsprop": "torch.optim.RMSprop",
    "adafactor": "torch.optim.Adafactor",
    "muon": "torch.optim.Muon",
    "adamw_8bit": "bitsandbytes.optim.AdamW8bit",
    "adamw_bnb_8bit": "bitsandbytes.optim.AdamW8bit",
    "paged_adamw": "bitsandbytes.optim.PagedAdamW32bit",
    "paged_adamw_32bit": "bitsandbytes.optim.PagedAdamW32bit",
    "paged_adamw_8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "lion_8bit": "bitsandbytes.optim.Lion8bit",
    "paged_lion_8bit": "bitsandbytes.optim.PagedLion8bit",
    "ademamix_8bit": "bitsandbytes.optim.AdEMAMix8bit",
    "paged_ademamix_8bit": "bitsandbytes.optim.PagedAdEMAMix8bit",
}


def _known_optimizer(spec: RunSpec) -> None:
    name, kwargs = spec.optimizer.name, spec.optimizer.kwargs
    module, _, last = name.rpartition(".")
    if ":" in name:
        _user_code("optimizer.name", name)
    elif last not in OPTIMIZERS.get(module, ()) and name not in USELESS_OPTIMIZERS:
        dotted = {end: f"{home}.{end}" for home, ends in OPTIMIZERS.items() if module in ("", home) for end in ends}
        near = [dotted[end] for end in difflib.get_close_matches(last, dotted, n=1)]
        meant = TRL_OPTIMIZERS.get(name) or (near[0] if near else "")
        rule = "is neither an optimizer of torch, bitsandbytes or deepspeed whose maths is known here nor a module:attr"
        cure = f"did you mean {meant}?" if meant else "take one of torch.optim." + ", ".join(ELEMENTWISE_OPTIMIZERS)
        raise UserError("optimizer.name", name, rule, cure)
    check_optimizer("optimizer.name", name, spec.engine)
    for key in {"lr", "weight_decay"} & kwargs.keys():
        cure = f"set optimizer.{key} instead"
        raise UserError(f"optimizer.kwargs.{key}", kwargs[key], "has a setting of its own", cure)


def _known_scheduler(spec: RunSpec) -> None:
    scheduler, name = spec.scheduler, spec.scheduler.name
    dotted, last = name.startswith("torch.optim.lr_scheduler."), name.rpartition(".")[2]
    in_python = "in Python give it as train(spec, optimizers=(None, optimizer -> schedule))"
    near = difflib.get_close_matches(name, get_args(SchedulerName), n=1)
    meant = near[0] if near else f"torch.optim.lr_scheduler.{last}" if last.endswith("LR") else ""
    warmup = "warmup_steps" if scheduler.warmup_ratio is None else "warmup_ratio"
    _refuse(
        [
            _Clash(
                last in ("ReduceLROnPlateau", "reduce_lr_on_plateau", "greedy", "GreedyLR"),
                "scheduler.name",
                name,
                "needs a metric at every step",
                "take linear, cosine or another that needs the step alone",
            ),
            _Clash(
                last in ("SequentialLR", "ChainedScheduler"),
                "scheduler.name",
                name,
                "takes other schedulers as arguments",
                in_python,
            ),
            _Clash(last in ("LambdaLR", "MultiplicativeLR"), "scheduler.name", name, "takes a function", in_python),
            _Clash(
                name not in get_args(SchedulerName) and not dotted,
                "scheduler.name",
                name,
                "is neither a schedule of transformers nor a torch.optim.lr_scheduler.NAME",
                f"did you mean {meant}?" if meant else "take one of " + ", ".join(get_args(SchedulerName)),
            ),
            _Clash(
                bool(scheduler.warmup_steps and scheduler.warmup_ratio is not None),
                "scheduler.warmup_ratio",
                scheduler.warmup_ratio,
                f"scheduler.warmup_steps ({scheduler.warmup_steps}) says it already",
                "remove one of the two",
            ),
            _Clash(
                dotted and bool(getattr(scheduler, warmup)),
                f"scheduler.{warmup}",
                getattr(scheduler, warmup),
                f"does not act on {name}",
                "remove it, or take linear, cosine or constant",
            ),
            _Clash(
                name in ("linear", "constant", "constant_with_warmup") and bool(scheduler.kwargs),
                "scheduler.kwargs",
                scheduler.kwargs,
                f"{name} takes none",
                "remove scheduler.kwargs",
            ),
        ]
    )
    said = {
        "num_warmup_steps": ("has a setting of its own", "set scheduler.warmup_steps instead"),
        "num_training_steps": ("is the length of the run", "remove it"),
        "last_epoch": ("is where the schedule was, which a checkpoint says", "remove it"),
    }
    for key in said.keys() & scheduler.kwargs.keys():
        raise UserError(f"scheduler.kwargs.{key}", scheduler.kwargs[key], *said[key])


def _sources(spec: RunSpec) -> None:
    for key, source in {**spec.data.sources("train"), **spec.data.sources("eval")}.items():
        for part in ("name", "split"):
            if (value := getattr(source, part)) is not None and source.path.endswith(DATA_SUFFIXES):
                rule = f"{source.path} is a file, which has no such part"
                raise UserError(f"{key}.{part}", value, rule, "remove it, or give a hub name")


def _evaluation(spec: RunSpec) -> None:
    for key, value in spec.evaluation:
        if value != EvaluationSpec.model_fields[key].default and not spec.data.eval_sets:
            raise UserError(
                f"evaluation.{key}",
                value,
                "needs evaluation pairs",
                "set data.eval to a file of preference pairs, or data.eval_fraction=0.05",
            )
    if spec.data.eval and spec.data.eval_fraction is not None:
        rule = "data.eval already says what is evaluated"
        raise UserError("data.eval_fraction", spec.data.eval_fraction, rule, "remove one of the two")
    for name in spec.data.eval_sets:
        if name and not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            cure = "take letters, digits, _ and -"
            raise UserError("data.eval", name, "cannot be a part of the names of metrics", cure)
        if name in EVALUATED:
            raise UserError("data.eval", name, "is the name of a metric", "give that set another name")
    no_best, by = spec.evaluation.metric_for_best is None, "for example evaluation.metric_for_best=loss"
    which, stopping = spec.checkpoint.export, spec.evaluation.early_stopping
    rule = "needs evaluation.metric_for_best, which says what is better"
    if no_best and stopping is not None:
        raise UserError("evaluation.early_stopping", stopping.model_dump(), rule, by)
    if no_best and which == "best":
        raise UserError("checkpoint.export", which, rule, by)


def check_metric_for_best(spec: RunSpec, has_more: bool = False) -> None:
    """Refuse a metric that no evaluation has.

    has_more: a user's compute_metrics adds some, whose names are not known before it was asked.

    Raises:
        UserError: evaluation.metric_for_best is such a one.
    """
    given = spec.evaluation.metric_for_best
    if given is None:
        return
    metrics = [f"{name}_{metric}" if name else metric for name in spec.data.eval_sets for metric in EVALUATED]
    bare = given.removeprefix("eval_")
    if has_more and any(bare.startswith(f"{name}_" * bool(name)) for name in spec.data.eval_sets):
        return
    if bare not in metrics:
        near = difflib.get_close_matches(bare, metrics, n=1)
        cure = f"did you mean {near[0]}?" if near else f"for example evaluation.metric_for_best={metrics[0]}"
        raise UserError("evaluation.metric_for_best", given, "is not among the evaluated metrics", cure)


class _Clash(NamedTuple):
    """Settings that contradict each other where `found`."""

    found: bool
    key: str
    value: object
    rule: str
    cure: str


def _refuse(clashes: list[_Clash]) -> None:
    for clash in clashes:
        if clash.found:
            raise UserError(*clash[1:])


def _engine_parts(spec: RunSpec) -> None:
    """What one engine has and another has not."""
    engine, kind = spec.engine, spec.engine.kind
    no_buckets = kind == "fsdp" and engine.bucket_size is not None
    owners = {
        "deepspeed": ("zero_stage", "deepspeed_config", "overlap_comm"),
        "fsdp": ("reshard_after_forward",),
        "ddp": ("shard_optimizer",),
    }
    others = [(name, owner) for owner, names in owners.items() for name in names if owner != kind]
    defaults = {name: EngineSpec.model_fields[name].default for name, _ in others}
    _refuse(
        [
            _Clash(
                getattr(engine, name) != defaults[name],
                f"engine.{name}",
                getattr(engine, name),
                f"does not act on engine.kind {kind}",
                f"set engine.kind={owner}, or remove it",
            )
            for name, owner in others
        ]
        + [
            _Clash(
                no_buckets,
                "engine.bucket_size",
                engine.bucket_size,
                "does not act on engine.kind fsdp, where the gradient of a layer travels by itself",
                "remove it",
            ),
            _Clash(
                engine.offload == "optimizer" and kind != "deepspeed",
                "engine.offload",
                engine.offload,
                "under fsdp the state lies where the weights are" if kind == "fsdp" else "ddp has no offload",
                "set engine.offload=parameters" if kind == "fsdp" else "set engine.kind=deepspeed",
            ),
            _Clash(
                engine.offload == "parameters" and not engine.shards_weights,
                "engine.offload",
                engine.offload,
                f"under {_named(engine)} every rank computes with whole weights that stay on its device",
                "set engine.zero_stage=3, or engine.offload=optimizer"
                if kind == "deepspeed"
                else "set engine.kind=fsdp, or engine.kind=deepspeed and engine.zero_stage=3",
            ),
        ]
    )


def _engine_limits(spec: RunSpec) -> None:
    """What an engine cannot do without changing numbers."""
    engine, lora = spec.engine, spec.model.lora
    base = lora.base if lora else None
    _refuse(
        [
            _Clash(
                spec.precision == "fp64" and engine.kind == "deepspeed",
                "precision",
                spec.precision,
                "deepspeed adds gradients and keeps the weights that it updates in fp32",
                "set engine.kind=ddp or fsdp, or precision=fp32",
            ),
            _Clash(
                base in get_args(Quantized) and engine.shards_weights,
                "model.lora.base",
                base,
                f"the codes of a quantised layer cannot be cut into the shards of {_named(engine)}",
                "set engine.kind=ddp, or engine.kind=deepspeed and engine.zero_stage=2, or model.lora.base=bf16",
            ),
        ]
    )


def _named(engine: EngineSpec) -> str:
    return f"deepspeed at stage {engine.stage}" if engine.kind == "deepspeed" else engine.kind


def _deepspeed_file(spec: RunSpec) -> None:
    for found in contradictions(spec):
        raise UserError(f"engine.deepspeed_config.{found.path}", found.value, found.rule, found.cure)


def _model_parts(spec: RunSpec) -> None:
    model, lora = spec.model, spec.model.lora or LoraSpec()  # pyright: ignore[reportCallIssue]
    own = {name: getattr(lora, name) for name in ("r", "alpha", "target_modules") if getattr(lora, name) is not None}
    _refuse(
        [
            _Clash(
                bool(model.lora and model.num_frozen_layers),
                "model.num_frozen_layers",
                model.num_frozen_layers,
                "model.lora freezes every layer of the base already",
                "remove one of the two",
            ),
            _Clash(
                bool(lora.adapter_path and own),
                "model.lora",
                own,
                "the adapter at model.lora.adapter_path has these already",
                "remove them, or model.lora.adapter_path",
            ),
            _Clash(
                spec.precision == "fp64" and lora.base is not None,
                "model.lora.base",
                lora.base,
                "precision fp64 would compute with what these bits have left",
                "remove it, or set precision=fp32",
            ),
        ]
    )


def _reference_parts(spec: RunSpec) -> None:
    reference, model, kind = spec.reference, spec.model, spec.reference.kind
    shared, quantised, copied = kind == "shared_layers", kind in get_args(Quantized), kind == "copy"
    own_start = reference.path is None
    base = model.lora.base if model.lora else None
    _refuse(
        [
            _Clash(
                shared and reference.num_shared_layers is None,
                "reference.num_shared_layers",
                None,
                "kind shared_layers needs the number of lowest layers that both models share",
                "set it, for example to half of the model's layers",
            ),
            _Clash(
                not shared and reference.num_shared_layers is not None,
                "reference.num_shared_layers",
                reference.num_shared_layers,
                f"does not act on kind {kind}",
                "set reference.kind=shared_layers; model.num_frozen_layers freezes without sharing",
            ),
            _Clash(
                shared and not own_start,
                "reference.path",
                reference.path,
                "the layers that kind shared_layers shares are the policy's own, which another model does not have",
                "remove it, or set reference.kind=copy",
            ),
            _Clash(
                shared and model.lora is not None,
                "reference.kind",
                kind,
                "with model.lora every layer of the base can be shared",
                "set reference.kind=adapter_off",
            ),
            _Clash(
                shared and model.num_frozen_layers not in (None, reference.num_shared_layers),
                "model.num_frozen_layers",
                model.num_frozen_layers,
                f"the shared layers are the frozen ones, and reference.num_shared_layers is "
                f"{reference.num_shared_layers}",
                "remove it",
            ),
            _Clash(
                kind in ("shared_layers", "adapter_off") and not model.disable_dropout,
                "model.disable_dropout",
                model.disable_dropout,
                f"with kind {kind} the policy's dropout would reach the reference",
                "set it to true, or reference.kind=copy",
            ),
            _Clash(
                kind == "adapter_off" and model.lora is None,
                "reference.kind",
                kind,
                "there is no adapter to switch off",
                "set model.lora, or reference.kind=copy",
            ),
            _Clash(
                kind == "adapter_off" and not own_start,
                "reference.path",
                reference.path,
                "kind adapter_off judges by the policy's own base, not by another model",
                "remove it, or set reference.kind=copy",
            ),
            _Clash(
                (copied or quantised) and own_start and base in get_args(Quantized),
                "reference.kind",
                kind,
                f"a base in {base} has no second set of weights to copy: its own are frozen",
                "set reference.kind=adapter_off",
            ),
            _Clash(
                quantised and spec.precision == "fp64",
                "precision",
                spec.precision,
                f"a reference in {kind} computes in 16 or 32 bits",
                "set precision=fp32, or reference.kind=copy",
            ),
            _Clash(
                reference.dtype is not None and not (copied or (kind == "precomputed" and not own_start)),
                "reference.dtype",
                reference.dtype,
                "the policy itself makes the log-probs, in its own type"
                if kind == "precomputed"
                else f"the weights of kind {kind} have a type already",
                "remove it, or set reference.kind=copy",
            ),
            _Clash(
                reference.offload and not copied,
                "reference.offload",
                reference.offload,
                f"kind {kind} has no copy of the weights in the device's memory",
                "remove it, or set reference.kind=copy",
            ),
            _Clash(
                reference.max_reward_error is not None and not reference.is_approximate,
                "reference.max_reward_error",
                reference.max_reward_error,
                f"kind {kind} computes as the model it stands for, so no error is measured",
                "remove it",
            ),
        ]
    )


def _reference_sharded(spec: RunSpec) -> None:
    reference, engine = spec.reference, spec.engine
    why, cure = "", "remove it, or set reference.kind=copy"
    if not reference.sharded:
        return
    if not engine.shards_weights:
        why, cure = f"{_named(engine)} shards no weights", "remove it, or set engine.kind=fsdp"
    elif reference.kind not in ("copy", "shared_layers"):
        why = f"kind {reference.kind} has no weights that could be cut"
    elif reference.dtype is not None:
        why, cure = f"the shards are of the policy's type, not {reference.dtype}", "remove it, or reference.dtype"
    elif reference.offload:
        why, cure = "engine.offload says where shards lie", "remove it, or reference.offload"
    if why:
        raise UserError("reference.sharded", reference.sharded, why, cure)


def _reference_sync(spec: RunSpec) -> None:
    reference, why = spec.reference, ""
    if reference.sync_every is None:
        return
    if spec.model.lora is not None:
        why = "mixing the factors of two adapters is not mixing their weights"
    elif reference.kind in get_args(Quantized):
        why = f"weights in {reference.kind} cannot move by small steps"
    elif reference.dtype in ("bf16", "fp16"):
        why = f"weights in {reference.dtype} lose small steps"
    elif reference.kind == "precomputed":
        why = "log-probs that are made once are those of one reference"
    elif reference.cache == "full":
        why = "what reference.cache=full knows of the reference is wrong once it has moved"
    if why:
        cure = "remove it, or train without model.lora" if spec.model.lora else "remove it, or set reference.kind=copy"
        if reference.kind in ("copy", "shared_layers") and not spec.model.lora:
            cure = "remove reference.dtype" if reference.dtype in ("bf16", "fp16") else "set reference.cache=off"
        raise UserError("reference.sync_every", reference.sync_every, why, cure)


def _reference_cache(spec: RunSpec) -> None:
    reference = spec.reference
    if reference.kind == "precomputed" and reference.cache == "off":
        cure = "remove reference.cache, or set reference.kind=copy"
        raise UserError("reference.cache", reference.cache, "kind precomputed keeps its log-probs there", cure)
    if spec.data.collator:
        check_cache_with_collator(reference, "data.collator")


def check_cache_with_collator(reference: ReferenceSpec, collator: str) -> None:
    """Refuse log-probs that are wanted before a user's collator, given under that name, has run.

    Raises:
        UserError: reference.kind or reference.cache.
    """
    if reference.kind != "precomputed" and reference.cache != "full":
        return
    key, value = ("kind", reference.kind) if reference.kind == "precomputed" else ("cache", reference.cache)
    rule = f"what {collator} will feed is not known beforehand"
    cure = "remove it, or let the collator return ref_chosen_logps and ref_rejected_logps"
    raise UserError(f"reference.{key}", value, rule, cure)


def _resources(spec: RunSpec) -> None:
    resources = spec.cluster.resources
    if resources and not any(resources.values()):
        raise UserError(
            "cluster.resources",
            resources,
            "asks for nothing, so nothing would limit the workers",
            "for example {CPU: 1}",
        )


def _elastic(spec: RunSpec) -> None:
    name, cluster = spec.optimizer.name, spec.cluster
    if cluster.min_workers < cluster.max_workers and optimizer_kind(name) != "elementwise":
        raise UserError(
            "cluster.num_workers",
            cluster.num_workers,
            f"the state of {name} is not elementwise, so that only as many ranks as wrote it can go on from it",
            f"set cluster.num_workers={cluster.max_workers}, or take torch.optim.AdamW",
        )


def _slurm(spec: RunSpec) -> None:
    slurm, cluster = spec.slurm, spec.cluster
    each = slurm.workers_per_node
    no_flag = next((entry for entry in slurm.args if not entry.startswith("--")), None)
    exported = next((entry for entry in slurm.args if entry.startswith("--export=") and entry.count("=") > 1), None)
    _refuse(
        [
            _Clash(
                slurm.time_s is not None and slurm.signal_s >= slurm.time_s,
                "slurm.signal_s",
                slurm.signal_s,
                f"is not less than slurm.time ({slurm.time}), so that every start would be asked to stop at once",
                "lower it, or raise slurm.time",
            ),
            _Clash(
                cluster.placement == "STRICT_PACK" and each is not None and each < cluster.max_workers,
                "slurm.workers_per_node",
                each,
                f"cluster.placement STRICT_PACK wants all {cluster.max_workers} workers on one node",
                "remove it, or set cluster.placement=PACK",
            ),
            _Clash(
                cluster.placement == "STRICT_SPREAD" and each is not None and each > 1,
                "slurm.workers_per_node",
                each,
                "cluster.placement STRICT_SPREAD wants each worker on a node of its own",
                "remove it, or set cluster.placement=PACK",
            ),
            _Clash(
                no_flag is not None,
                "slurm.args",
                no_flag,
                "is not a flag of the form --name or --name=value",
                "for example slurm.args=[--mem=0]",
            ),
            _Clash(
                exported is not None,
                "slurm.args",
                "=".join((exported or "").split("=")[:2]) + "=...",
                "would leave the value in the run directory, for all to read",
                "remove it, and set the variable where you submit: the job's environment is that one",
            ),
        ]
    )


def _known_callback(name: str) -> None:
    if name in TRACKERS:
        return
    if name == "wandb":
        raise UserError("callbacks", name, "has a block of settings", "remove it, and set wandb.mode=auto")
    if near := difflib.get_close_matches(name, TRACKERS, n=1):
        raise UserError("callbacks", name, "is no tracker", f"did you mean {near[0]}?")
    _user_code("callbacks", name)


def _user_code(key: str, value: str) -> None:
    module, colon, attribute = value.partition(":")
    if not (colon and module and attribute):
        raise UserError(key, value, "is not of the form module:attr", "for example my_package.my_module:my_name")


def explain(error: ValidationError) -> list[UserError]:
    """Pydantic's complaints as errors of ours, one per key, each with its rule and cure."""
    return [_explain_one(details) for details in error.errors()]


def _explain_one(details: Any) -> UserError:
    location, kind, value = details["loc"], details["type"], details["input"]
    key, name = _dotted(location), str(location[-1])
    block = _block_at(location[:-1])
    field = block.model_fields.get(name) if block else None
    if kind == "extra_forbidden" and block:
        return UserError(key, value, "is not a setting", _cure_of_unknown(block, location))
    if kind == "model_type" and (inner := _block_at(location)):
        return UserError(key, value, "is a block of settings", "its keys are " + ", ".join(inner.model_fields))
    described = f"it is: {field.description}" if field and field.description else "see orchestrator/settings/spec.py"
    if kind == "missing":
        return UserError(key, None, "is required", described)
    if kind == "literal_error":
        allowed = details["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        meant = "disabled" if value is False and "disabled" in allowed else str(value)  # YAML reads off as false
        if isinstance(value, list):
            meant = next((str(entry) for entry in value if entry not in allowed), "")
        near = difflib.get_close_matches(meant, allowed, n=1)
        cure = f"did you mean {near[0]}?" if near else f"set it to {allowed[0]}"
        if name == "loss_type" and meant in RECIPES:
            cure = f"set {RECIPES[meant]}"
        return UserError(key, value, f"must be one of {', '.join(allowed)}", cure)
    default = field.get_default(call_default_factory=True) if field and not field.is_required() else None
    cure = f"for example {key}={default} ({described})" if default not in (None, {}, []) else described
    if key == "callbacks":
        cure = f"for example callbacks=[{value}]" if isinstance(value, str) else "give a list of module:attr"
    return UserError(key, value, details["msg"][0].lower() + details["msg"][1:], cure)


# Losses that are others here, and how to have them.
RECIPES = {
    "dpo": "dpo.loss_type=sigmoid",
    "rpo": "dpo.loss_type=[sigmoid, sft] and dpo.loss_weights=[1, alpha]",
    "mpo": "dpo.loss_type=[sigmoid, bco_pair, sft] and dpo.loss_weights=[0.8, 0.2, 1]",
    "slic": "dpo.loss_type=hinge",
}
# What users of TRL will type first, and where it is here.
TRL_NAMES = {
    "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "per_device_train_batch_size": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.global_batch_size (accumulation is derived)",
    "max_grad_norm": "training.max_grad_norm",
    "lr_scheduler_type": "scheduler.name",
    "lr_scheduler_kwargs": "scheduler.kwargs",
    "warmup_steps": "scheduler.warmup_steps",
    "warmup_ratio": "scheduler.warmup_ratio",
    "weight_decay": "optimizer.weight_decay",
    "optim_args": "optimizer.kwargs",
    "deepspeed": "engine.deepspeed_config",
    "fsdp": "engine.kind=fsdp",
    "optim": "optimizer.name",
    "output_dir": "run.dir and run.name",
    "model_name_or_path": "model.path",
    "bf16": "precision=bf16",
    "fp16": "precision=fp16",
    "tf32": "precision=tf32",
    "eval_steps": "evaluation.every_steps",
    "eval_strategy": "evaluation.every_steps=N, or evaluation.every_epoch=true",
    "eval_on_start": "evaluation.at_start",
    "metric_for_best_model": "evaluation.metric_for_best",
    "greater_is_better": "evaluation.greater_is_better",
    "load_best_model_at_end": "checkpoint.export=best",
    "compute_metrics": "evaluation.compute_metrics",
    "batch_eval_metrics": "evaluation.batch_eval_metrics",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "early_stopping_patience": "evaluation.early_stopping.patience",
    "early_stopping_threshold": "evaluation.early_stopping.min_delta",
    "save_steps": "checkpoint.every_steps",
    "save_strategy": "checkpoint.every_steps (with evaluation.metric_for_best the best is saved as well)",
    "save_total_limit": "checkpoint.keep",
    "logging_steps": "training.logging_steps",
    "max_length": "data.max_length",
    "max_prompt_length": "data.max_prompt_length",
    "max_completion_length": "data.max_completion_length",
    "truncation_mode": "data.truncation",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "dataset_num_proc": "data.num_proc",
    "data_collator": "data.collator",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "dataset_name": "data.train",
    "train_dataset": "data.train",
    "dataset_config": "data.train as {path, name}",
    "dataset_train_split": "data.train as {path, split}",
    "dataset_test_split": "data.eval as {path, split}",
    "datasets": "data.train, a list of {path, weight}",
    "test_split_size": "data.eval_fraction",
    "chat_template": "data.chat_template",
    "chat_template_path": "data.chat_template",
    "chat_template_kwargs": "data.chat_template_kwargs",
    "default_system": "data.system_prompt",
    "pad_token": "model.pad_token",
    "beta": "dpo.beta",
    "loss_type": "dpo.loss_type",
    "loss_weights": "dpo.loss_weights",
    "label_smoothing": "dpo.label_smoothing",
    "f_divergence_type": "dpo.f_divergence_type",
    "f_alpha_divergence_coef": "dpo.f_alpha_divergence_coef",
    "discopop_tau": "dpo.discopop_tau",
    "ld_alpha": "dpo.ld_alpha",
    "use_weighting": "dpo.use_weighting",
    "router_aux_loss_coef": "dpo.router_aux_loss_coef",
    "simpo_gamma": "dpo.simpo_gamma",
    "rpo_alpha": "dpo.loss_type=[sigmoid, sft] with dpo.loss_weights=[1, rpo_alpha]",
    "seed": "run.seed",
    "report_to": "callbacks=[tensorboard] for TensorBoard and others, wandb.mode for W&B",
    "peft_config": "model.lora",
    "lora_r": "model.lora.r",
    "lora_alpha": "model.lora.alpha",
    "precompute_ref_log_probs": "reference.kind=precomputed",
    "sync_ref_model": "reference.sync_every",
    "ref_model_sync_steps": "reference.sync_every",
    "ref_model_mixup_alpha": "reference.sync_alpha",
    "ref_model": "reference.path",
}


def _cure_of_unknown(block: type[Block], location: tuple[int | str, ...]) -> str:
    name = str(location[-1])
    if name in TRL_NAMES:
        return f"did you mean {TRL_NAMES[name]}?"
    if near := difflib.get_close_matches(name, block.model_fields, n=1, cutoff=0.6):
        return f"did you mean {_dotted((*location[:-1], near[0]))}?"
    return "the keys here are " + ", ".join(block.model_fields)


def _dotted(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location if part != "")  # which a single evaluation set has as its name


def _block_at(location: tuple[int | str, ...]) -> type[Block] | None:
    """The block of settings that a path of keys leads to, if it leads to one."""
    block: type[Block] = RunSpec
    parts = iter(location)
    for part in parts:
        if isinstance(part, int):  # an entry of a list of blocks
            continue
        field = block.model_fields.get(part)
        if field and get_origin(field.annotation) is dict:  # blocks by name
            next(parts, None)
        blocks = [kind for kind in _types_in(field.annotation) if issubclass(kind, Block)] if field else []
        if not blocks:
            return None
        block = blocks[0]
    return block


def _types_in(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for part in get_args(annotation):
        yield from _types_in(part)


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
