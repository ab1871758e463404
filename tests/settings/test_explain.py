"""A key or value that pydantic refuses is explained in one line, with what was meant."""

import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from support import raw_settings, refused, tiny_spec

from orchestrator.settings.load import SettingsError, make_spec
from orchestrator.settings.trl_names import NOT_NEEDED, RECIPES, TRL_NAMES


@pytest.mark.parametrize(
    ("blocks", "key", "cure"),
    [
        ({"optimizer": {"learning_rte": 1}}, "optimizer.learning_rte", "keys here are name, lr"),
        ({"data": {"train": [{"path": "a", "wieght": 1}]}}, "data.train.0.wieght", "did you mean data.train.0.weight?"),
        ({"data": {"eval": {"easy": {"path": "a", "splt": 1}}}}, "data.eval.easy.splt", "mean data.eval.easy.split?"),
        ({"data": {"eval": {"path": "a", "splt": 1}}}, "data.eval.splt", "did you mean data.eval.split?"),
        ({"optimizer": {"weight_decai": 1}}, "optimizer.weight_decai", "did you mean optimizer.weight_decay?"),
        ({"batch": {"micro_batchsize": 1}}, "batch.micro_batchsize", "did you mean batch.micro_batch_size?"),
        ({"optimiser": {"lr": 1}}, "optimiser", "did you mean optimizer?"),
        ({"model": {"init": {"vocabsize": 400}}}, "model.init.vocabsize", "did you mean model.init.vocab_size?"),
        ({"callbacks": [{"path": "a:b", "kwarg": 1}]}, "callbacks.0.kwarg", "did you mean callbacks.0.kwargs?"),
        ({"training": {"learning_rate": 1}}, "training.learning_rate", "did you mean optimizer.lr?"),
        ({"training": {"weight_decay": 1}}, "training.weight_decay", "did you mean optimizer.weight_decay?"),
        ({"training": {"warmup_ratio": 0.1}}, "training.warmup_ratio", "did you mean scheduler.warmup_ratio?"),
        ({"lr_scheduler_kwargs": {"a": 1}}, "lr_scheduler_kwargs", "did you mean scheduler.kwargs?"),
        ({"deepspeed": "ds.json"}, "deepspeed", "did you mean engine.deepspeed_config?"),
        ({"fsdp": "full_shard"}, "fsdp", "did you mean engine.kind=fsdp?"),
        ({"data": {"truncation_mode": "keep_end"}}, "data.truncation_mode", "did you mean data.truncation?"),
        ({"data": {"chat_template_path": "a"}}, "data.chat_template_path", "did you mean data.chat_template?"),
        ({"dpo": {"max_prompt_length": 1}}, "dpo.max_prompt_length", "did you mean data.max_prompt_length?"),
        ({"data": {"default_system": "a"}}, "data.default_system", "did you mean data.system_prompt?"),
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


def test_what_an_answer_to_a_name_of_trl_names_is_a_setting(tmp_path: Path) -> None:
    stopping = {"metric_for_best": "loss", "early_stopping": {"patience": 1}}
    given = tiny_spec(tmp_path, model={"lora": {}}, evaluation=stopping)
    for said in (*TRL_NAMES.values(), *RECIPES.values(), *NOT_NEEDED.values()):
        for dotted in re.findall(r"\b[a-z]+(?:\.[a-z_]+)+", said):
            attrgetter(dotted)(given)


def test_a_missing_setting_is_named_with_its_description(tmp_path: Path) -> None:
    raw = raw_settings(tmp_path)
    del raw["data"]["train"]
    with pytest.raises(SettingsError, match=r"data.train = \(not set\): is required; it is: JSONL"):
        make_spec(raw)
