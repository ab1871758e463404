"""Settings of losses and references that cannot stand together are refused by key."""

import math
from pathlib import Path
from typing import Any

import pytest

from support.setting_rules import assert_rule
from support.tiny_settings import refused


@pytest.mark.parametrize(
    ("blocks", "key", "words"),
    [
        (
            {"dpo": {"loss_type": ["sigmoid", "mine:"]}},
            "dpo.loss_type",
            ["'mine:'", "not of the form module:attr"],
        ),
        (
            {"dpo": {"router_aux_loss_coef": 0.1}},
            "dpo.router_aux_loss_coef",
            ["= 0.1", "is not supported", "set it to 0"],
        ),
        (
            {"data": {"collator": "my:collator"}, "reference": {"cache": "full"}},
            "reference.cache",
            ["= 'full'", "data.collator", "ref_chosen_logps"],
        ),
        (
            {"data": {"collator": "my:collator"}, "reference": {"kind": "precomputed"}},
            "reference.kind",
            ["= 'precomputed'", "data.collator", "not known in advance", "ref_chosen_logps"],
        ),
        (
            {"reference": {"kind": "shared_layers"}},
            "reference.num_shared_layers",
            ["(not set)", "kind shared_layers needs the number", "half of the model's layers"],
        ),
        (
            {"reference": {"num_shared_layers": 1}},
            "reference.num_shared_layers",
            [
                "= 1",
                "is not used by kind copy",
                "set reference.kind=shared_layers; model.num_frozen_layers",
            ],
        ),
        (
            {"reference": {"kind": "shared_layers", "num_shared_layers": 1, "path": "a/b"}},
            "reference.path",
            ["= 'a/b'", "which another model does not have", "reference.kind=copy"],
        ),
        (
            {"reference": {"kind": "adapter_off", "path": "a/b"}, "model": {"lora": {}}},
            "reference.path",
            ["= 'a/b'", "uses the policy's own base", "reference.kind=copy"],
        ),
        (
            {"reference": {"kind": "int8", "dtype": "bf16"}},
            "reference.dtype",
            ["= 'bf16'", "kind int8 determines the type of the weights", "reference.kind=copy"],
        ),
        (
            {"reference": {"kind": "precomputed", "dtype": "bf16"}},
            "reference.dtype",
            ["= 'bf16'", "the policy itself computes the log-probs, in its own type", "remove it"],
        ),
        (
            {"reference": {"kind": "nf4", "offload": True}},
            "reference.offload",
            ["= True", "kind nf4 has no copy of the weights on the device", "reference.kind=copy"],
        ),
        (
            {"reference": {"max_reward_error": 0.1}},
            "reference.max_reward_error",
            ["= 0.1", "so no error is measured", "remove it"],
        ),
        (
            {"reference": {"sync_every": 2}, "model": {"lora": {}}},
            "reference.sync_every",
            ["= 2", "averaging the factors of two adapters", "train without model.lora"],
        ),
        (
            {"reference": {"sync_every": 2, "kind": "int8"}},
            "reference.sync_every",
            ["= 2", "weights in int8 cannot represent small updates", "set reference.kind=copy"],
        ),
        (
            {"reference": {"sync_every": 2, "kind": "precomputed"}},
            "reference.sync_every",
            ["= 2", "computed once belong to one fixed reference", "set reference.kind=copy"],
        ),
        (
            {"reference": {"sync_every": 2, "cache": "full"}},
            "reference.sync_every",
            ["= 2", "wrong once the reference is updated", "set reference.cache=off"],
        ),
        (
            {
                "reference": {"sync_every": 2, "sharded": True},
                "engine": {"kind": "deepspeed", "zero_stage": 3},
                "precision": "bf16",
            },
            "reference.sync_every",
            ["= 2", "deepspeed shards in bf16 loses small updates", "reference.sharded=false"],
        ),
        (
            {
                "reference": {"sync_every": 2, "sharded": True},
                "engine": {"kind": "deepspeed", "zero_stage": 3},
                "precision": "auto",
            },
            "reference.sync_every",
            ["= 2", "in 16 bits, as precision=auto may choose, loses", "precision=fp32"],
        ),
        (
            {"reference": {"sync_every": 2, "sync_alpha": 1.5}},
            "reference.sync_alpha",
            ["1.5", "less than or equal to 1"],
        ),
        (
            {"reference": {"kind": "int4"}},
            "reference.kind",
            ["must be one of copy, shared_layers", "set reference.kind=nf4"],
        ),
        ({"reference": {"cache": "lasy"}}, "reference.cache", ["did you mean lazy?"]),
        (
            {"dpo": {"loss_type": "hing"}},
            "dpo.loss_type",
            ["must be one of sigmoid, hinge", "did you mean hinge?"],
        ),
        (
            {"dpo": {"loss_type": ["sigmoid", "stf"]}},
            "dpo.loss_type",
            ["'stf'", "must be one of", "did you mean sft?"],
        ),
        (
            {"dpo": {"loss_type": []}},
            "dpo.loss_type",
            ["= []", "must be one of", "set it to sigmoid"],
        ),
        ({"dpo": {"loss_type": None}}, "dpo.loss_type", ["must be one of", "set it to sigmoid"]),
        (
            {"dpo": {"loss_type": "rpo"}},
            "dpo.loss_type",
            ["set dpo.loss_type=[sigmoid, sft] and dpo.loss_weights=[1, "],
        ),
        (
            {"dpo": {"rpo_alpha": 1}},
            "dpo.rpo_alpha",
            ["did you mean dpo.loss_type=[sigmoid, sft] with dpo.loss_weig"],
        ),
        (
            {"dpo": {"loss_weights": [1, 2]}},
            "dpo.loss_weights",
            [
                "[1.0, 2.0]",
                "is not one number for each of sigmoid",
                "set 1 number, or remove it: then each is 1",
            ],
        ),
        ({"dpo": {"loss_weights": ["inf"]}}, "dpo.loss_weights.0", ["'inf'", "finite"]),
        ({"dpo": {"loss_weights": [0]}}, "dpo.loss_weights", ["= [0.0]", "nothing would train"]),
        ({"dpo": {"beta": math.inf}}, "dpo.beta", ["= inf", "a finite number"]),
        (
            {"dpo": {"loss_type": "mine.py:loss"}},
            "dpo.loss_type",
            ["names a file", "did you mean mine:loss?"],
        ),
        (
            {"dpo": {"label_smoothing": 0.1}},
            "dpo.label_smoothing",
            [
                "is used by exo_pair, robust, aot, aot_unpaired, cdpo, simpo, not by sigmoid",
                "set dpo.loss_type=cdpo",
            ],
        ),
        (
            {"dpo": {"label_smoothing": 0.1, "loss_type": ["ipo", "sft"]}},
            "dpo.label_smoothing",
            ["not by ipo, sft"],
        ),
        (
            {"dpo": {"loss_type": "exo_pair"}},
            "dpo.label_smoothing",
            ["= 0.0", "its logarithm", "set it to 0.001"],
        ),
        (
            {"dpo": {"loss_type": "robust", "label_smoothing": 0.5}},
            "dpo.label_smoothing",
            ["= 0.5", "robust divides by 1 - 2 * dpo.label_smoothing", "set it below 0.5"],
        ),
        (
            {"dpo": {"loss_type": "cdpo", "label_smoothing": 1}},
            "dpo.label_smoothing",
            ["less than 1"],
        ),
        (
            {"dpo": {"loss_type": ["sigmoid", "nca_pair"], "f_divergence_type": "forward_kl"}},
            "dpo.f_divergence_type",
            ["'forward_kl'", "not for nca_pair", "set dpo.loss_type to one of sigmoid, hinge"],
        ),
        (
            {"dpo": {"f_divergence_type": "js"}},
            "dpo.f_divergence_type",
            ["must be one of reverse_kl, forward_kl, js_divergence, alpha_divergence"],
        ),
        (
            {"dpo": {"f_alpha_divergence_coef": 0.3}},
            "dpo.f_alpha_divergence_coef",
            ["= 0.3", "is not used by reverse_kl", "set dpo.f_divergence_type=alpha_divergence"],
        ),
        ({"dpo": {"ld_alpha": 1.1}}, "dpo.ld_alpha", ["= 1.1", "less than or equal to 1"]),
        (
            {"dpo": {"ld_alpha": 0.5, "loss_type": "sft"}},
            "dpo.ld_alpha",
            ["is not used by sft", "remove it"],
        ),
        (
            {"dpo": {"use_weighting": True, "loss_type": ["sigmoid", "aot"]}},
            "dpo.use_weighting",
            ["weights single pairs, but sigmoid, aot compares sorted pairs", "remove it"],
        ),
        (
            {"dpo": {"discopop_tau": 0.1}},
            "dpo.discopop_tau",
            ["is not used by sigmoid", "dpo.loss_type=discopop"],
        ),
        (
            {"dpo": {"simpo_gamma": 1.0}},
            "dpo.simpo_gamma",
            ["is not used by sigmoid", "set dpo.loss_type=simpo"],
        ),
        (
            {"reference": {"sharded": True}},
            "reference.sharded",
            ["= True", "ddp does not shard weights", "set engine.kind=fsdp"],
        ),
        (
            {"reference": {"sharded": True}, "engine": {"kind": "deepspeed"}},
            "reference.sharded",
            ["deepspeed at stage 2 does not shard weights"],
        ),
        (
            {"reference": {"sharded": True, "kind": "int8"}, "engine": {"kind": "fsdp"}},
            "reference.sharded",
            ["kind int8 has no weights to shard", "set reference.kind=copy"],
        ),
        (
            {"reference": {"sharded": True, "dtype": "bf16"}, "engine": {"kind": "fsdp"}},
            "reference.sharded",
            ["have the policy's type, not bf16", "remove it, or reference.dtype"],
        ),
        (
            {"reference": {"sharded": True, "offload": True}, "engine": {"kind": "fsdp"}},
            "reference.sharded",
            ["engine.offload decides where shards are stored", "remove it, or reference.offload"],
        ),
    ],
)
def test_each_rule_names_key_value_rule_and_cure(
    tmp_path: Path, blocks: dict[str, Any], key: str, words: list[str]
) -> None:
    assert_rule(refused(tmp_path, **blocks), key, words)
