"""A key or value that pydantic refuses is explained in one line, with what was meant."""

import re
from pathlib import Path
from typing import Any

import pytest

from orchestrator.settings.catalogue import described, settings
from orchestrator.settings.errors import SettingsError, UserError
from orchestrator.settings.load import load_spec, make_spec
from orchestrator.settings.near import folded
from orchestrator.settings.other_names import NO_COUNTERPART, OTHER_NAMES, OTHER_VALUES
from orchestrator.settings.run import RunSpec
from orchestrator.settings.trl_names import NOT_NEEDED, TRL_NAMES
from support.tiny_settings import raw_settings, refused, write_settings


@pytest.mark.parametrize(
    ("blocks", "key", "cure"),
    [
        (
            {"optimizer": {"learning_rte": 1}},
            "optimizer.learning_rte",
            "did you mean optimizer.lr?",
        ),
        ({"optimizer": {"zzz": 1}}, "optimizer.zzz", "keys here are name, lr"),
        (
            {"data": {"train": [{"path": "a", "wieght": 1}]}},
            "data.train.0.wieght",
            "did you mean data.train.0.weight?",
        ),
        (
            {"data": {"eval": {"easy": {"path": "a", "splt": 1}}}},
            "data.eval.easy.splt",
            "mean data.eval.easy.split?",
        ),
        (
            {"data": {"eval": {"path": "a", "splt": 1}}},
            "data.eval.splt",
            "did you mean data.eval.split?",
        ),
        (
            {"optimizer": {"weight_decai": 1}},
            "optimizer.weight_decai",
            "did you mean optimizer.weight_decay?",
        ),
        (
            {"batch": {"micro_batchsize": 1}},
            "batch.micro_batchsize",
            "did you mean batch.micro_batch_size?",
        ),
        ({"optimiser": {"lr": 1}}, "optimiser", "did you mean optimizer?"),
        (
            {"model": {"init": {"vocabsize": 400}}},
            "model.init.vocabsize",
            "did you mean model.init.vocab_size?",
        ),
        (
            {"callbacks": [{"path": "a:b", "kwarg": 1}]},
            "callbacks.0.kwarg",
            "did you mean callbacks.0.kwargs?",
        ),
        (
            {"training": {"learning_rate": 1}},
            "training.learning_rate",
            "did you mean optimizer.lr?",
        ),
        (
            {"training": {"weight_decay": 1}},
            "training.weight_decay",
            "did you mean optimizer.weight_decay?",
        ),
        (
            {"training": {"warmup_ratio": 0.1}},
            "training.warmup_ratio",
            "did you mean scheduler.warmup_ratio?",
        ),
        (
            {"lr_scheduler_kwargs": {"a": 1}},
            "lr_scheduler_kwargs",
            "did you mean scheduler.kwargs?",
        ),
        ({"deepspeed": "ds.json"}, "deepspeed", "did you mean engine.deepspeed_config?"),
        ({"fsdp": "full_shard"}, "fsdp", "did you mean engine.kind=fsdp?"),
        (
            {"data": {"truncation_mode": "keep_end"}},
            "data.truncation_mode",
            "did you mean data.truncation?",
        ),
        (
            {"data": {"chat_template_path": "a"}},
            "data.chat_template_path",
            "did you mean data.chat_template?",
        ),
        (
            {"dpo": {"max_prompt_length": 1}},
            "dpo.max_prompt_length",
            "did you mean data.max_prompt_length?",
        ),
        (
            {"data": {"default_system": "a"}},
            "data.default_system",
            "did you mean data.system_prompt?",
        ),
        ({"wandb": {"zzz": 1}}, "wandb.zzz", "the keys here are project, group, mode, key_file"),
    ],
)
def test_an_unknown_key_is_refused_with_the_one_that_was_meant(
    tmp_path: Path, blocks: dict[str, Any], key: str, cure: str
) -> None:
    error = refused(tmp_path, **blocks)
    assert error.key == key
    assert "is not a setting" in str(error)
    assert cure in str(error)


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        # values
        ("dpo.loss_type=sppo", "set dpo.loss_type=sppo_hard"),
        ("dpo.loss_type=[sigmoid,sppo]", "set dpo.loss_type=sppo_hard"),
        ("dpo.loss_type=ODPO", "data.margin_column"),
        (
            "dpo.loss_type=apo",
            "dpo.loss_type=apo_zero (chosen completions better than the model's) or apo_down",
        ),
        ("dpo.loss_type=cpo", "CPO is not implemented"),
        ("dpo.loss_type=kto_pair", "KTO trains on single completions"),
        ("dpo.loss_type=dpo", "set dpo.loss_type=sigmoid"),
        ("dpo.loss_type=sigmoind", "did you mean sigmoid?"),
        ("engine.kind=zero3", "set engine.kind=deepspeed and engine.zero_stage=3"),
        ("engine.kind=DeepSpeed-ZeRO2", "set engine.kind=deepspeed and engine.zero_stage=2"),
        ("engine.kind=fsdp2", "set engine.kind=fsdp, which is FSDP2"),
        ("precision=bfloat16", "set precision=bf16"),
        ("precision=no", "set precision=fp32"),
        ("reference.kind=none", "dpo.loss_type=simpo"),
        ("wandb.mode=off", "set wandb.mode=disabled"),
        ("callbacks=wandb", "set wandb.mode=auto"),
        ("optimizer.name=torch.optim.Adamw", "did you mean torch.optim.AdamW?"),
        ("optimizer.name=ADAMW", "did you mean torch.optim.AdamW?"),
        ("scheduler.name=Cosine", "did you mean cosine?"),
        (
            "model.lora.target_modules=all-linear",
            "remove it: the default is every linear layer except the head",
        ),
        ("model.lora.target_modules=q_proj", "for example model.lora.target_modules=[q_proj]"),
        ("scheduler.warmup_steps=0.1", "for a fraction set scheduler.warmup_ratio=0.1"),
        (
            "evaluation.every_steps=0.1",
            "it is a number of steps; for example evaluation.every_steps=100",
        ),
        ("run.name=2024", "quote it: \"run.name='2024'\""),
        ("cluster.resources={GPU:1}", "write a space after the colon: {GPU: 1}"),
        ("cluster.resources.gpu=1", "did you mean cluster.resources.GPU=1?"),
        # names
        (
            "model.lora.target_parameters=[a]",
            "remove it: adapters are supported on linear layers only",
        ),
        ("model.lora.bias=none", "remove it: an adapter has r, alpha and target_modules"),
        ("model.lora.dropout=0.1", "remove it: an adapter has no dropout"),
        ("model.revision=main", "remove it: download that revision"),
        ("wandb.name=a", "did you mean run.name?"),
        ("wandb.entity=a", "set WANDB_ENTITY"),
        ("torch_dtype=bfloat16", "did you mean precision?"),
        ("stage=dpo", "remove it: only preference pairs are supported"),
        ("pref_beta=0.1", "did you mean dpo.beta?"),
        ("policy.model_name=a", "did you mean model?"),
        ("global_batch_size=4", "did you mean batch.global_batch_size?"),
        ("Batch.global-batch-size=4", "did you mean batch?"),
        ("batch.global-batch-size=4", "did you mean batch.global_batch_size?"),
        ("every_steps=4", "did you mean evaluation.every_steps or checkpoint.every_steps?"),
        (
            "gradient_acumulation_steps=4",
            "did you mean batch.global_batch_size (accumulation is derived)?",
        ),
        ("zzz=1", "`orchestrator help settings` lists all settings"),
        # a value in the place of a block
        ("model.lora=16", "did you mean model.lora.r=16?"),
        ("model.lora=true", "write model.lora={} for its defaults"),
        ("engine=deepspeed", "did you mean engine.kind=deepspeed?"),
        ("engine=zero3", "set engine.kind=deepspeed and engine.zero_stage=3"),
        ("optimizer=1e-5", "did you mean optimizer.lr=1e-05?"),
        ("data=train.jsonl", "did you mean data.train=train.jsonl?"),
        ("wandb=false", "set wandb.mode=disabled"),
    ],
)
def test_a_plausible_mistake_is_answered_with_what_to_write(
    tmp_path: Path, override: str, fix: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_spec(write_settings(tmp_path), [override])
    line = str(caught.value)
    assert "\n" not in line
    assert fix in line.partition("; ")[2]


@pytest.mark.parametrize(
    ("override", "key", "rule"),
    [
        ("data.train=", "data.train", "is empty"),
        ("run.name=", "run.name", "is required"),
        ("run.name=..", "run.name", "must be 1 to 200 letters"),
        ("run.name=.cache", "run.name", "must be 1 to 200 letters"),
        ("run.name='-x'", "run.name", "must be 1 to 200 letters"),
        (f"run.name={'a' * 201}", "run.name", "must be 1 to 200 letters"),
        (f"run.seed={10**23}", "run.seed", "less than or equal to 9223372036854775807"),
        (
            f"training.max_steps={10**23}",
            "training.max_steps",
            "less than or equal to 1000000000000",
        ),
        ("run.seed=10**23", "run.seed", "valid integer"),
    ],
)
def test_an_impossible_value_is_refused_by_its_key(
    tmp_path: Path, override: str, key: str, rule: str
) -> None:
    with pytest.raises(UserError, match=rule) as caught:
        load_spec(write_settings(tmp_path), [override])
    assert caught.value.key == key


NAMES = {**TRL_NAMES, **OTHER_NAMES}
REASONS = {**NOT_NEEDED, **NO_COUNTERPART}


def test_every_answer_to_another_trainers_name_names_settings_that_exist() -> None:
    values = [fix for fixes in OTHER_VALUES.values() for fix in fixes.values()]
    inside_lists = {"data.train", "data.eval"}
    for answer in (*NAMES.values(), *REASONS.values(), *values, *OTHER_VALUES):
        for dotted in re.findall(r"\b[a-z]+(?:\.[a-z_]+)+", answer):
            assert dotted in settings() or dotted in inside_lists, answer


def test_no_name_of_another_trainer_has_two_answers() -> None:
    assert not OTHER_NAMES.keys() & NO_COUNTERPART.keys()
    assert not (TRL_NAMES.keys() | NOT_NEEDED.keys()) & (OTHER_NAMES.keys() | NO_COUNTERPART.keys())
    assert not NAMES.keys() & RunSpec.model_fields.keys()
    assert not (NAMES.keys() | REASONS.keys()) & settings().keys()
    for names in (NAMES, REASONS, *OTHER_VALUES.values()):
        assert list(map(folded, names)) == list(names)


def test_settings_are_described_with_their_defaults() -> None:
    assert described("optimizer.lr") == ["  optimizer.lr (1e-06)  Peak learning rate."]
    (heading, *lines) = described("batch")
    assert heading == "batch: Pairs per step and per forward pass."
    assert [line.split()[0] for line in lines] == [
        "batch.global_batch_size",
        "batch.micro_batch_size",
        "batch.max_tokens_per_microbatch",
    ]
    assert {line.split()[0].rstrip(":") for line in described("") if line} == settings().keys()
    assert described("nope") == []


def test_a_missing_setting_is_named_with_its_description(tmp_path: Path) -> None:
    raw = raw_settings(tmp_path)
    del raw["data"]["train"]
    with pytest.raises(SettingsError, match=r"data.train = \(not set\): is required; it is: JSONL"):
        make_spec(raw)
