"""Settings of data and models that cannot stand together are refused by key."""

from pathlib import Path
from typing import Any

import pytest

from support.repository import ROOT
from support.setting_rules import assert_rule
from support.tiny_settings import refused


@pytest.mark.parametrize(
    ("blocks", "key", "words"),
    [
        (
            {"model": {"init": None}},
            "model.path",
            ["either this or model.init is required", "set model.init"],
        ),
        ({"model": {"path": "x"}}, "model.path", ["= 'x'", "model.init is also set", "remove one"]),
        ({"model": {"init": {"vocab_size": 259}}}, "model.init.vocab_size", ["259", "260 or more"]),
        (
            {"data": {"max_prompt_length": 128}},
            "data.max_prompt_length",
            [
                "= 128",
                "leaves no room for a completion in data.max_length (128)",
                "lower it, or raise data.max_length",
            ],
        ),
        (
            {"data": {"max_completion_length": 129}},
            "data.max_completion_length",
            ["= 129", "is more than data.max_length (128)", "raise data.max_length"],
        ),
        (
            {"data": {"chat_template_kwargs": {"add_generation_prompt": False}}},
            "data.chat_template_kwargs.add_generation_prompt",
            ["= False", "not a template variable", "remove it"],
        ),
        (
            {"data": {"chat_template": "nowhere"}},
            "data.chat_template",
            ["= 'nowhere'", "cannot be read (No such file"],
        ),
        (
            {"data": {"chat_template": str(ROOT / "LICENSE")}},
            "data.chat_template",
            ["is not a Jinja template: it has neither"],
        ),
        (
            {"data": {"system_prompt": ""}},
            "data.system_prompt",
            ["at least 1 character", "a system message"],
        ),
        ({"data": {"eval": {"a b": "x"}}}, "data.eval", ["= 'a b'", "letters, digits, _ and -"]),
        (
            {"data": {"eval": {"easy": 3}}},
            "data.eval.easy",
            ["= 3", "is a block of settings", "path, name, split"],
        ),
        ({"data": {"eval": 3}}, "data.eval", ["= 3", "one source, or {NAME: source}"]),
        (
            {"data": {"eval_fraction": 0.1}},
            "data.eval_fraction",
            ["= 0.1", "data.eval is also set", "remove one of the two"],
        ),
        (
            {"data": {"margin_column": "m"}, "dpo": {"loss_type": ["ipo", "sft"]}},
            "data.margin_column",
            ["= 'm'", "is used by sigmoid, hinge", "not by ipo, sft"],
        ),
        (
            {"data": {"eval": None, "eval_fraction": 1}},
            "data.eval_fraction",
            ["= 1", "less than 1", "held out"],
        ),
        ({"data": {"train": []}}, "data.train", ["= []", "at least 1 item", "JSONL"]),
        (
            {"data": {"train": [{"path": "a", "weight": 0}]}},
            "data.train.0.weight",
            ["= 0", "greater than 0", "How often"],
        ),
        (
            {"data": {"train": ["a", {"path": "/b.jsonl", "split": "odd"}]}},
            "data.train.1.split",
            ["= 'odd'", "/b.jsonl is a file, which has no split", "remove it"],
        ),
        (
            {"data": {"eval": {"easy": {"path": "b.json", "name": "x"}}}},
            "data.eval.easy.name",
            ["= 'x'", "is a file"],
        ),
        ({"data": {"eval": {}}}, "data.eval", ["= {}", "one source, or {NAME: source}"]),
        ({"data": {"collator": "my.collator"}}, "data.collator", ["module:attr"]),
        (
            {"model": {"lora": {}, "num_frozen_layers": 1}},
            "model.num_frozen_layers",
            ["= 1", "model.lora already freezes every layer of the base", "remove one"],
        ),
        (
            {"model": {"lora": {"adapter_path": "a/b", "r": 4, "target_modules": ["q_proj"]}}},
            "model.lora",
            [
                "= {'r': 4, 'target_modules': ['q_proj']}",
                "model.lora.adapter_path already determines these",
                "remove them",
            ],
        ),
        (
            {
                "reference": {"kind": "shared_layers", "num_shared_layers": 1},
                "model": {"num_frozen_layers": 2},
            },
            "model.num_frozen_layers",
            ["= 2", "reference.num_shared_layers is 1", "remove it"],
        ),
        (
            {
                "reference": {"kind": "shared_layers", "num_shared_layers": 1},
                "model": {"disable_dropout": False},
            },
            "model.disable_dropout",
            ["= False", "with kind shared_layers the policy's dropout", "set it to true"],
        ),
        (
            {"reference": {"kind": "adapter_off"}, "model": {"lora": {}, "disable_dropout": False}},
            "model.disable_dropout",
            ["= False", "with kind adapter_off the policy's dropout", "reference.kind=copy"],
        ),
        (
            {
                "model": {"lora": {"base": "bf16"}},
                "data": {"collator": "my_code:collate"},
                "precision": "fp64",
            },
            "model.lora.base",
            ["= 'bf16'", "precision fp64 would compute with weights rounded to this type"],
        ),
        (
            {"model": {"attention": "varlen"}, "precision": "tf32"},
            "model.attention",
            ["= 'varlen'", "precision bf16 or fp16, not tf32", "precision=bf16", "attention=auto"],
        ),
        ({"model": {"attention": "pad"}}, "model.attention", ["did you mean padded?"]),
        (
            {"data": {"collator": "./my/own.py:f"}},
            "data.collator",
            ["names a file", "did you mean my.own:f?"],
        ),
        (
            {"dpo": {"loss_type": "aot_unpaired"}, "model": {"disable_dropout": False}},
            "model.disable_dropout",
            ["= False", "aot_unpaired runs the policy twice per step", "set it to true"],
        ),
        (
            {
                "engine": {"kind": "fsdp"},
                "model": {"lora": {"base": "nf4"}},
                "reference": {"kind": "adapter_off"},
            },
            "model.lora.base",
            [
                "= 'nf4'",
                "fsdp cannot shard quantised weights",
                "engine.zero_stage=2, or model.lora.base=bf16",
            ],
        ),
    ],
)
def test_each_rule_names_key_value_rule_and_cure(
    tmp_path: Path, blocks: dict[str, Any], key: str, words: list[str]
) -> None:
    assert_rule(refused(tmp_path, **blocks), key, words)
