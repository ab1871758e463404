"""Check rules between settings; each violation is one line with key, value, rule and fix."""

import difflib
import math
import re
from typing import NamedTuple, get_args

from orchestrator.settings.counts import counted
from orchestrator.settings.deepspeed import contradictions
from orchestrator.settings.near import folded, nearest
from orchestrator.settings.optimizers import (
    ELEMENTWISE_OPTIMIZERS,
    OPTIMIZERS,
    TRL_OPTIMIZERS,
    USELESS_OPTIMIZERS,
    check_optimizer,
    optimizer_kind,
)
from orchestrator.settings.precision import PRECISION_TRAITS
from orchestrator.settings.spec import (
    DATA_SUFFIXES,
    EVALUATED,
    OF_SCORES,
    SMOOTHED,
    TEMPLATE_CALL,
    TRACKERS,
    WITH_MARGIN,
    EngineSpec,
    EvaluationSpec,
    LoraSpec,
    Quantized,
    ReferenceSpec,
    RunSpec,
    SchedulerName,
    UserError,
)

# Common names of Ray's built-in resources, in lower case; any other name is a custom resource of
# the cluster.
RAY_NAMES = {
    "gpu": "GPU",
    "gpus": "GPU",
    "num_gpus": "GPU",
    "cpu": "CPU",
    "cpus": "CPU",
    "num_cpus": "CPU",
}


def check_rules(spec: RunSpec) -> None:
    """Check all rules between settings, before anything is loaded.

    Raises:
        UserError: the first rule that is violated.
    """
    for rule in (
        _one_model,
        _one_micro_batch_key,
        _row_tokens,
        _known_optimizer,
        _known_scheduler,
        _sources,
        _evaluation,
        _engine_parts,
        _engine_limits,
        _deepspeed_file,
        _losses,
        _loss_options,
        _model_parts,
        _attention,
        _reference_shares,
        _reference_weights,
        _reference_sharded,
        _reference_sync,
        _reference_cache,
        _resources,
        _elastic,
        _slurm,
    ):
        rule(spec)
    for entry in spec.callbacks:
        _known_callback(entry.path)
    if spec.data.collator:
        _user_code("data.collator", spec.data.collator.path)
    if spec.evaluation.compute_metrics:
        _user_code("evaluation.compute_metrics", spec.evaluation.compute_metrics)


class _Clash(NamedTuple):
    """A rule between settings that is violated if `found` is true."""

    found: bool
    key: str
    value: object
    rule: str
    cure: str


def _refuse(clashes: list[_Clash]) -> None:
    for clash in clashes:
        if clash.found:
            raise UserError(*clash[1:])


def _one_model(spec: RunSpec) -> None:
    if spec.model.path and spec.model.init:
        raise UserError(
            "model.path", spec.model.path, "model.init is also set", "remove one of the two"
        )
    if not (spec.model.path or spec.model.init):
        cure = "set it to a folder or hub name of a causal LM, or set model.init"
        raise UserError(
            "model.path", spec.model.path, "either this or model.init is required", cure
        )
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
            {
                "micro_batch_size": batch.micro_batch_size,
                "max_tokens_per_microbatch": batch.max_tokens_per_microbatch,
            },
            "exactly one of the two must set the size of a forward pass",
            "remove one" if batch.micro_batch_size else "set batch.micro_batch_size=1",
        )
    if batch.micro_batch_size and batch.micro_batch_size > batch.global_batch_size:
        raise UserError(
            "batch.micro_batch_size",
            batch.micro_batch_size,
            f"is more than batch.global_batch_size ({batch.global_batch_size})",
            f"set it to {batch.global_batch_size} or less",
        )


def _losses(spec: RunSpec) -> None:
    """Check what the selected losses require, and what they cannot be combined with."""
    dpo, names = spec.dpo, spec.dpo.loss_types
    listed, smoothing = ", ".join(names), dpo.label_smoothing
    for name in dpo.own_losses:
        _user_code("dpo.loss_type", name)
    _refuse(
        [
            _Clash(
                len(dpo.weights) != len(names),
                "dpo.loss_weights",
                dpo.loss_weights,
                f"is not one number for each of {listed}",
                f"set {counted(len(names), 'number')}, or remove it: then each is 1",
            ),
            _Clash(
                not any(dpo.weights),
                "dpo.loss_weights",
                dpo.loss_weights,
                "all weights are 0, so nothing would train",
                "set one to another value, or remove it: then each is 1",
            ),
            _Clash(
                smoothing == 0 and "exo_pair" in names,
                "dpo.label_smoothing",
                smoothing,
                "exo_pair needs its logarithm",
                "set it to 0.001, as in its paper",
            ),
            _Clash(
                smoothing >= 0.5 and "robust" in names,
                "dpo.label_smoothing",
                smoothing,
                "robust divides by 1 - 2 * dpo.label_smoothing, which must be more than 0",
                "set it below 0.5, for example to 0.1",
            ),
            _Clash(
                dpo.router_aux_loss_coef not in (None, 0),
                "dpo.router_aux_loss_coef",
                dpo.router_aux_loss_coef,
                "the load-balancing loss of a mixture of experts is not supported",
                "set it to 0",
            ),
            _Clash(
                dpo.use_weighting and dpo.needs_whole_batch,
                "dpo.use_weighting",
                dpo.use_weighting,
                f"weights single pairs, but {listed} compares sorted pairs with each other",
                "remove it, or use another dpo.loss_type",
            ),
            _Clash(
                dpo.needs_whole_batch and not spec.model.disable_dropout,
                "model.disable_dropout",
                spec.model.disable_dropout,
                f"{listed} runs the policy twice per step, and dropout would differ between the "
                "two passes",
                "set it to true, or use another dpo.loss_type",
            ),
        ]
    )


def _loss_options(spec: RunSpec) -> None:
    """Check that each option of a loss is used by a selected loss; a user's own loss may use
    any.
    """
    dpo, own = spec.dpo, spec.dpo.own_losses
    names, listed = set(dpo.loss_types), ", ".join(dpo.loss_types)
    not_of_scores = [name for name in dpo.loss_types if name not in (*OF_SCORES, *own)]
    _refuse(
        [
            _Clash(
                dpo.label_smoothing > 0 and not {*SMOOTHED, *own} & names,
                "dpo.label_smoothing",
                dpo.label_smoothing,
                f"is used by {', '.join(SMOOTHED)}, not by {listed}",
                "remove it, or set dpo.loss_type=cdpo (sigmoid with smoothed labels) or robust",
            ),
            _Clash(
                spec.data.margin_column is not None and not {*WITH_MARGIN, *own} & names,
                "data.margin_column",
                spec.data.margin_column,
                f"is used by {', '.join(WITH_MARGIN)}, not by {listed}",
                "remove it, or set dpo.loss_type to one of these",
            ),
            _Clash(
                dpo.f_divergence_type != "reverse_kl" and not_of_scores != [],
                "dpo.f_divergence_type",
                dpo.f_divergence_type,
                "works only for losses of the difference of a pair's scores, not for "
                f"{', '.join(not_of_scores)}",
                f"remove it, or set dpo.loss_type to one of {', '.join(OF_SCORES)}",
            ),
            _Clash(
                dpo.f_alpha_divergence_coef != 0.5 and dpo.f_divergence_type != "alpha_divergence",
                "dpo.f_alpha_divergence_coef",
                dpo.f_alpha_divergence_coef,
                f"is not used by {dpo.f_divergence_type}",
                "remove it, or set dpo.f_divergence_type=alpha_divergence",
            ),
            _Clash(
                dpo.ld_alpha is not None and names == {"sft"},
                "dpo.ld_alpha",
                dpo.ld_alpha,
                "is not used by sft, which weights all tokens of the chosen completion equally",
                "remove it",
            ),
            _Clash(
                dpo.discopop_tau != 0.05 and not own and "discopop" not in names,
                "dpo.discopop_tau",
                dpo.discopop_tau,
                f"is not used by {listed}",
                "remove it, or set dpo.loss_type=discopop",
            ),
            _Clash(
                dpo.simpo_gamma != 0.5 and not own and "simpo" not in names,
                "dpo.simpo_gamma",
                dpo.simpo_gamma,
                f"is not used by {listed}",
                "remove it, or set dpo.loss_type=simpo",
            ),
        ]
    )


def _row_tokens(spec: RunSpec) -> None:
    """Check how rows become tokens."""
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
                f"is more than data.max_length ({whole}), which includes the prompt",
                "remove it, or raise data.max_length",
            ),
            _Clash(
                taken != "",
                f"data.chat_template_kwargs.{taken}",
                data.chat_template_kwargs.get(taken),
                "is an argument of apply_chat_template that the tokeniser sets itself, not a "
                "template variable",
                "remove it",
            ),
        ]
    )


def _known_optimizer(spec: RunSpec) -> None:
    name, kwargs = spec.optimizer.name, spec.optimizer.kwargs
    module, _, last = name.rpartition(".")
    if ":" in name:
        _user_code("optimizer.name", name)
    elif last not in OPTIMIZERS.get(module, ()) and name not in USELESS_OPTIMIZERS:
        dotted = {
            end: f"{home}.{end}"
            for home, ends in OPTIMIZERS.items()
            if module in ("", home)
            for end in ends
        }
        near = nearest(last, dotted)
        meant = TRL_OPTIMIZERS.get(folded(name)) or (dotted[near] if near else "")
        rule = (
            "is neither a supported optimizer of torch, bitsandbytes or deepspeed nor a module:attr"
        )
        cure = (
            f"did you mean {meant}?"
            if meant
            else "use one of torch.optim." + ", ".join(ELEMENTWISE_OPTIMIZERS)
        )
        raise UserError("optimizer.name", name, rule, cure)
    check_optimizer("optimizer.name", name, spec.engine)
    for key in {"lr", "weight_decay"} & kwargs.keys():
        cure = f"set optimizer.{key} instead"
        raise UserError(f"optimizer.kwargs.{key}", kwargs[key], "has its own setting", cure)


def _known_scheduler(spec: RunSpec) -> None:
    scheduler, name = spec.scheduler, spec.scheduler.name
    dotted, last = name.startswith("torch.optim.lr_scheduler."), name.rpartition(".")[2]
    in_python = "pass it from Python: train(spec, optimizers=(None, optimizer -> schedule))"
    near = nearest(name, get_args(SchedulerName))
    meant = near or (f"torch.optim.lr_scheduler.{last}" if last.endswith("LR") else "")
    warmup = "warmup_steps" if scheduler.warmup_ratio is None else "warmup_ratio"
    _refuse(
        [
            _Clash(
                last in ("ReduceLROnPlateau", "reduce_lr_on_plateau", "greedy", "GreedyLR"),
                "scheduler.name",
                name,
                "needs a metric at every step",
                "use linear, cosine or another that needs only the step",
            ),
            _Clash(
                last in ("SequentialLR", "ChainedScheduler"),
                "scheduler.name",
                name,
                "needs other schedulers as arguments",
                in_python,
            ),
            _Clash(
                last in ("LambdaLR", "MultiplicativeLR"),
                "scheduler.name",
                name,
                "needs a function as an argument",
                in_python,
            ),
            _Clash(
                name not in get_args(SchedulerName) and not dotted,
                "scheduler.name",
                name,
                "is neither a schedule of transformers nor a torch.optim.lr_scheduler.NAME",
                f"did you mean {meant}?"
                if meant
                else "use one of " + ", ".join(get_args(SchedulerName)),
            ),
            _Clash(
                bool(scheduler.warmup_steps and scheduler.warmup_ratio is not None),
                "scheduler.warmup_ratio",
                scheduler.warmup_ratio,
                f"scheduler.warmup_steps ({scheduler.warmup_steps}) is also set",
                "remove one of the two",
            ),
            _Clash(
                dotted and bool(getattr(scheduler, warmup)),
                f"scheduler.{warmup}",
                getattr(scheduler, warmup),
                f"is not used by {name}",
                "remove it, or use linear, cosine or constant",
            ),
            _Clash(
                name in ("linear", "constant", "constant_with_warmup") and bool(scheduler.kwargs),
                "scheduler.kwargs",
                scheduler.kwargs,
                f"{name} has no arguments",
                "remove scheduler.kwargs",
            ),
        ]
    )
    not_allowed = {
        "num_warmup_steps": ("has its own setting", "set scheduler.warmup_steps instead"),
        "num_training_steps": ("is always the length of the run", "remove it"),
        "last_epoch": ("is restored from a checkpoint", "remove it"),
    }
    for key in not_allowed.keys() & scheduler.kwargs.keys():
        raise UserError(f"scheduler.kwargs.{key}", scheduler.kwargs[key], *not_allowed[key])


def _sources(spec: RunSpec) -> None:
    for key, source in {**spec.data.sources("train"), **spec.data.sources("eval")}.items():
        for part in ("name", "split"):
            if (value := getattr(source, part)) is not None and source.path.endswith(DATA_SUFFIXES):
                rule = f"{source.path} is a file, which has no {part}"
                raise UserError(f"{key}.{part}", value, rule, "remove it, or use a hub name")


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
        rule = "data.eval is also set"
        raise UserError(
            "data.eval_fraction", spec.data.eval_fraction, rule, "remove one of the two"
        )
    for name in spec.data.eval_sets:
        if name and not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            cure = "use letters, digits, _ and -"
            raise UserError("data.eval", name, "cannot be part of a metric's name", cure)
        if name in EVALUATED:
            raise UserError("data.eval", name, "is the name of a metric", "rename that set")
    no_best, by = (
        spec.evaluation.metric_for_best is None,
        "for example evaluation.metric_for_best=loss",
    )
    which, stopping = spec.checkpoint.export, spec.evaluation.early_stopping
    rule = "needs evaluation.metric_for_best, which decides what is better"
    if no_best and stopping is not None:
        raise UserError("evaluation.early_stopping", stopping.model_dump(), rule, by)
    if no_best and which == "best":
        raise UserError("checkpoint.export", which, rule, by)


def check_metric_for_best(spec: RunSpec, has_more: bool = False) -> None:
    """Check that evaluation.metric_for_best is a metric of the evaluation.

    has_more: a user's compute_metrics adds metrics, whose names are not known before it is called.

    Raises:
        UserError: no evaluation has that metric.
    """
    metric_for_best = spec.evaluation.metric_for_best
    if metric_for_best is None:
        return
    metrics = [
        f"{name}_{metric}" if name else metric
        for name in spec.data.eval_sets
        for metric in EVALUATED
    ]
    bare = metric_for_best.removeprefix("eval_")
    if has_more and any(bare.startswith(f"{name}_" * bool(name)) for name in spec.data.eval_sets):
        return
    if bare not in metrics:
        near = difflib.get_close_matches(bare, metrics, n=1)
        cure = (
            f"did you mean {near[0]}?"
            if near
            else f"for example evaluation.metric_for_best={metrics[0]}"
        )
        raise UserError(
            "evaluation.metric_for_best", metric_for_best, "is not an evaluated metric", cure
        )


def _engine_parts(spec: RunSpec) -> None:
    """Check settings that only one engine has."""
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
                f"is not used by engine.kind {kind}",
                f"set engine.kind={owner}, or remove it",
            )
            for name, owner in others
        ]
        + [
            _Clash(
                no_buckets,
                "engine.bucket_size",
                engine.bucket_size,
                "is not used by engine.kind fsdp, which reduces gradients layer by layer",
                "remove it",
            ),
            _Clash(
                engine.offload == "optimizer" and kind != "deepspeed",
                "engine.offload",
                engine.offload,
                "under fsdp the state is stored with the weights"
                if kind == "fsdp"
                else "ddp does not support offload",
                "set engine.offload=parameters" if kind == "fsdp" else "set engine.kind=deepspeed",
            ),
            _Clash(
                engine.offload == "parameters" and not engine.shards_weights,
                "engine.offload",
                engine.offload,
                f"{_named(engine)} keeps the whole weights on every rank's device",
                "set engine.zero_stage=3, or engine.offload=optimizer"
                if kind == "deepspeed"
                else "set engine.kind=fsdp, or engine.kind=deepspeed and engine.zero_stage=3",
            ),
        ]
    )


def _engine_limits(spec: RunSpec) -> None:
    """Check combinations that an engine cannot compute exactly."""
    engine, lora = spec.engine, spec.model.lora
    base = lora.base if lora else None
    _refuse(
        [
            _Clash(
                spec.precision == "fp64" and engine.kind == "deepspeed",
                "precision",
                spec.precision,
                "deepspeed accumulates gradients and updates weights in fp32",
                "set engine.kind=ddp or fsdp, or precision=fp32",
            ),
            _Clash(
                base in get_args(Quantized) and engine.shards_weights,
                "model.lora.base",
                base,
                f"{_named(engine)} cannot shard quantised weights",
                "set engine.kind=ddp, or engine.kind=deepspeed and engine.zero_stage=2, or "
                "model.lora.base=bf16",
            ),
        ]
    )


def _named(engine: EngineSpec) -> str:
    return f"deepspeed at stage {engine.stage}" if engine.kind == "deepspeed" else engine.kind


def _deepspeed_file(spec: RunSpec) -> None:
    for contradiction in contradictions(spec):
        path, value, rule, cure = contradiction
        raise UserError(f"engine.deepspeed_config.{path}", value, rule, cure)


def _model_parts(spec: RunSpec) -> None:
    model, lora = spec.model, spec.model.lora or LoraSpec()  # pyright: ignore[reportCallIssue]
    own = {
        name: getattr(lora, name)
        for name in ("r", "alpha", "target_modules")
        if getattr(lora, name) is not None
    }
    _refuse(
        [
            _Clash(
                bool(model.lora and model.num_frozen_layers),
                "model.num_frozen_layers",
                model.num_frozen_layers,
                "model.lora already freezes every layer of the base",
                "remove one of the two",
            ),
            _Clash(
                bool(lora.adapter_path and own),
                "model.lora",
                own,
                "the adapter at model.lora.adapter_path already determines these",
                "remove them, or model.lora.adapter_path",
            ),
            _Clash(
                spec.precision == "fp64" and lora.base is not None,
                "model.lora.base",
                lora.base,
                "precision fp64 would compute with weights rounded to this type",
                "remove it, or set precision=fp32",
            ),
        ]
    )


def _reference_shares(spec: RunSpec) -> None:
    """Check what a reference can share with the policy."""
    reference, model, kind = spec.reference, spec.model, spec.reference.kind
    shared, own_start = kind == "shared_layers", reference.path is None
    _refuse(
        [
            _Clash(
                shared and reference.num_shared_layers is None,
                "reference.num_shared_layers",
                None,
                "kind shared_layers needs the number of layers that both models share",
                "set it, for example to half of the model's layers",
            ),
            _Clash(
                not shared and reference.num_shared_layers is not None,
                "reference.num_shared_layers",
                reference.num_shared_layers,
                f"is not used by kind {kind}",
                "set reference.kind=shared_layers; model.num_frozen_layers freezes without sharing",
            ),
            _Clash(
                shared and not own_start,
                "reference.path",
                reference.path,
                "kind shared_layers shares the policy's own layers, which another model does not "
                "have",
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
                f"with kind {kind} the policy's dropout would also act on the reference",
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
                "kind adapter_off uses the policy's own base, not another model",
                "remove it, or set reference.kind=copy",
            ),
        ]
    )


def _reference_weights(spec: RunSpec) -> None:
    """Check settings that depend on which weights the reference has."""
    reference, kind = spec.reference, spec.reference.kind
    quantised, copied, own_start = (
        kind in get_args(Quantized),
        kind == "copy",
        reference.path is None,
    )
    base = spec.model.lora.base if spec.model.lora else None
    _refuse(
        [
            _Clash(
                (copied or quantised) and own_start and base in get_args(Quantized),
                "reference.kind",
                kind,
                f"a base in {base} is frozen, so the reference needs no copy of it",
                "set reference.kind=adapter_off",
            ),
            _Clash(
                quantised and spec.precision == "fp64",
                "precision",
                spec.precision,
                f"a reference of kind {kind} computes in 16 or 32 bits",
                "set precision=fp32, or reference.kind=copy",
            ),
            _Clash(
                reference.dtype is not None
                and not (copied or (kind == "precomputed" and not own_start)),
                "reference.dtype",
                reference.dtype,
                "the policy itself computes the log-probs, in its own type"
                if kind == "precomputed"
                else f"kind {kind} determines the type of the weights",
                "remove it, or set reference.kind=copy",
            ),
            _Clash(
                reference.offload and not copied,
                "reference.offload",
                reference.offload,
                f"kind {kind} has no copy of the weights on the device",
                "remove it, or set reference.kind=copy",
            ),
            _Clash(
                reference.max_reward_error is not None and not reference.is_approximate,
                "reference.max_reward_error",
                reference.max_reward_error,
                f"kind {kind} is exact, so no error is measured",
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
        why, cure = f"{_named(engine)} does not shard weights", "remove it, or set engine.kind=fsdp"
    elif reference.kind not in ("copy", "shared_layers"):
        why = f"kind {reference.kind} has no weights to shard"
    elif reference.dtype is not None:
        why, cure = (
            f"the shards have the policy's type, not {reference.dtype}",
            "remove it, or reference.dtype",
        )
    elif reference.offload:
        why, cure = (
            "engine.offload decides where shards are stored",
            "remove it, or reference.offload",
        )
    if why:
        raise UserError("reference.sharded", reference.sharded, why, cure)


def _reference_sync(spec: RunSpec) -> None:
    reference, why = spec.reference, ""
    if reference.sync_every is None:
        return
    if spec.model.lora is not None:
        why = "averaging the factors of two adapters does not average their weights"
    elif reference.kind in get_args(Quantized):
        why = f"weights in {reference.kind} cannot represent small updates"
    elif reference.dtype in ("bf16", "fp16"):
        why = f"weights in {reference.dtype} lose small updates"
    elif reference.kind == "precomputed":
        why = "log-probs computed once belong to one fixed reference"
    elif reference.cache == "full":
        why = "log-probs cached by reference.cache=full are wrong once the reference is updated"
    if not why and reference.sharded and spec.engine.traits.casts_sharded_reference:
        _check_synced_shards(spec)
    if why:
        cure = (
            "remove it, or train without model.lora"
            if spec.model.lora
            else "remove it, or set reference.kind=copy"
        )
        if reference.kind in ("copy", "shared_layers") and not spec.model.lora:
            cure = (
                "remove reference.dtype"
                if reference.dtype in ("bf16", "fp16")
                else "set reference.cache=off"
            )
        raise UserError("reference.sync_every", reference.sync_every, why, cure)


def _check_synced_shards(spec: RunSpec) -> None:
    """Check that an engine does not store the shards of a synced reference in 16 bits."""
    kind, precision, sync_every = spec.engine.kind, spec.precision, spec.reference.sync_every
    if precision == "auto":
        rule = f"a reference that {kind} shards in 16 bits, as precision=auto may choose, loses "
        cure = "set precision=fp32, or reference.sharded=false"
        raise UserError("reference.sync_every", sync_every, f"{rule}small updates", cure)
    if PRECISION_TRAITS[precision].is_16_bit:
        rule = f"a reference that {kind} shards in {precision} loses small updates"
        raise UserError("reference.sync_every", sync_every, rule, "set reference.sharded=false")


def _attention(spec: RunSpec) -> None:
    precision, attention = spec.precision, spec.model.attention
    if attention != "varlen" or precision == "auto" or spec.data.collator is not None:
        return
    if not PRECISION_TRAITS[precision].is_16_bit:
        rule = f"needs a GPU from Ampere on and precision bf16 or fp16, not {precision}"
        cure = "set precision=bf16, or model.attention=auto"
        raise UserError("model.attention", attention, rule, cure)


def _reference_cache(spec: RunSpec) -> None:
    reference = spec.reference
    if reference.kind == "precomputed" and reference.cache == "off":
        cure = "remove reference.cache, or set reference.kind=copy"
        raise UserError(
            "reference.cache",
            reference.cache,
            "kind precomputed stores its log-probs in the cache",
            cure,
        )
    if spec.data.collator:
        check_cache_with_collator(reference, "data.collator")


def check_cache_with_collator(reference: ReferenceSpec, collator: str) -> None:
    """Check that no log-probs are cached before the user's collator runs; `collator` names it in
    the error.

    Raises:
        UserError: reference.kind or reference.cache needs log-probs in advance.
    """
    if reference.kind != "precomputed" and reference.cache != "full":
        return
    key, value = (
        ("kind", reference.kind) if reference.kind == "precomputed" else ("cache", reference.cache)
    )
    rule = f"the batches of {collator} are not known in advance"
    cure = "remove it, or return ref_chosen_logps and ref_rejected_logps from the collator"
    raise UserError(f"reference.{key}", value, rule, cure)


def _resources(spec: RunSpec) -> None:
    resources = spec.cluster.resources
    for name in resources:
        if (ray_name := RAY_NAMES.get(name.lower(), name)) != name:
            fix = f"did you mean cluster.resources.{ray_name}={resources[name]:g}?"
            raise UserError(
                f"cluster.resources.{name}",
                resources[name],
                "is not the name of a Ray resource",
                fix,
            )
    if resources and not any(resources.values()):
        raise UserError(
            "cluster.resources",
            resources,
            "requests no resources, so the number of workers would be unbounded",
            "for example {CPU: 1}",
        )


def _elastic(spec: RunSpec) -> None:
    name, cluster = spec.optimizer.name, spec.cluster
    if cluster.min_workers < cluster.max_workers and optimizer_kind(name) != "elementwise":
        raise UserError(
            "cluster.num_workers",
            cluster.num_workers,
            f"the state of {name} is not elementwise, so it can be resumed only on the same "
            "number of ranks",
            f"set cluster.num_workers={cluster.max_workers}, or use torch.optim.AdamW",
        )


def _slurm(spec: RunSpec) -> None:
    slurm, cluster = spec.slurm, spec.cluster
    each = slurm.workers_per_node
    no_flag = next((entry for entry in slurm.args if not entry.startswith("--")), None)
    exported = next(
        (entry for entry in slurm.args if entry.startswith("--export=") and entry.count("=") > 1),
        None,
    )
    _refuse(
        [
            _Clash(
                slurm.time_s is not None and slurm.signal_s >= slurm.time_s,
                "slurm.signal_s",
                slurm.signal_s,
                f"is not less than slurm.time ({slurm.time}), so every start would be stopped at "
                "once",
                "lower it, or raise slurm.time",
            ),
            _Clash(
                cluster.placement == "STRICT_PACK"
                and each is not None
                and each < cluster.max_workers,
                "slurm.workers_per_node",
                each,
                f"cluster.placement STRICT_PACK needs all {cluster.max_workers} workers on one "
                "node",
                "remove it, or set cluster.placement=PACK",
            ),
            _Clash(
                cluster.placement == "STRICT_SPREAD" and each is not None and each > 1,
                "slurm.workers_per_node",
                each,
                "cluster.placement STRICT_SPREAD needs each worker on its own node",
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
                "would store the value in the run directory, readable by all",
                "remove it, and set the variable where you submit: the job inherits that "
                "environment",
            ),
        ]
    )


def _known_callback(name: str) -> None:
    if name in TRACKERS:
        return
    if name == "wandb":
        raise UserError(
            "callbacks",
            name,
            "W&B has its own settings block",
            "remove it here, and set wandb.mode=auto",
        )
    if near := difflib.get_close_matches(name, TRACKERS, n=1):
        raise UserError("callbacks", name, "is not a known tracker", f"did you mean {near[0]}?")
    _user_code("callbacks", name)


def _user_code(key: str, value: str) -> None:
    module, colon, attribute = value.partition(":")
    if colon and attribute and (module.endswith(".py") or "/" in module):
        meant = module.removesuffix(".py").lstrip("./").replace("/", ".")
        raise UserError(
            key, value, "names a file, not a module", f"did you mean {meant}:{attribute}?"
        )
    if not (colon and module and attribute):
        raise UserError(
            key, value, "is not of the form module:attr", "for example my_package.my_module:my_name"
        )
