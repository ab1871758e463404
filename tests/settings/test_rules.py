"""Settings that cannot stand together are refused; each rule names key, value, rule and fix."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.settings.errors import UserError
from orchestrator.training.metrics import EVALUATED
from support.setting_rules import assert_rule
from support.tiny_settings import refused, tiny_spec


@pytest.mark.parametrize(
    ("blocks", "key", "words"),
    [
        (
            {"batch": {"micro_batch_size": None}},
            "batch",
            ["exactly one of the two", "batch.micro_batch_size=1"],
        ),
        ({"batch": {"max_tokens_per_microbatch": 9}}, "batch", ["exactly one of the two"]),
        (
            {"batch": {"micro_batch_size": 9}},
            "batch.micro_batch_size",
            ["= 9", "batch.global_batch_size (8)"],
        ),
        ({"training": {"epochs": 0, "max_steps": None}}, "training.epochs", ["greater than 0"]),
        (
            {"data": {"eval": None}, "evaluation": {"every_steps": 3}},
            "evaluation.every_steps",
            ["set data.eval"],
        ),
        (
            {"data": {"eval": None}, "evaluation": {"metric_for_best": "x"}},
            "evaluation.metric_for_best",
            ["data.eval"],
        ),
        (
            {"data": {"eval": None}, "evaluation": {"at_start": False}},
            "evaluation.at_start",
            ["= False", "data.eval"],
        ),
        (
            {"evaluation": {"compute_metrics": "mine"}},
            "evaluation.compute_metrics",
            ["= 'mine'", "module:attr"],
        ),
        (
            {"evaluation": {"eval_strategy": "epoch"}},
            "evaluation.eval_strategy",
            ["evaluation.every_epoch=true?"],
        ),
        (
            {"evaluation": {"early_stopping": {"patience": 2}}},
            "evaluation.early_stopping",
            [
                "'patience': 2",
                "needs evaluation.metric_for_best",
                "evaluation.metric_for_best=loss",
            ],
        ),
        (
            {"evaluation": {"early_stopping": {"patience": 0}}},
            "evaluation.early_stopping.patience",
            ["= 0"],
        ),
        (
            {"checkpoint": {"export": "best"}},
            "checkpoint.export",
            ["= 'best'", "needs evaluation.metric_for_best"],
        ),
        (
            {"checkpoint": {"load_best_model_at_end": True}},
            "checkpoint.load_best_model_at_end",
            ["export=best?"],
        ),
        ({"callbacks": ["my_module"]}, "callbacks", ["module:attr", "my_module"]),
        ({"callbacks": [{"path": ":attr"}]}, "callbacks", ["module:attr"]),
        ({"precision": "bf61"}, "precision", ["'bf61'", "must be one of", "did you mean bf16?"]),
        ({"run": {"name": "a/b"}}, "run.name", ["'a/b'", "must be 1 to 200 letters, digits"]),
        ({"run": {"name": None}}, "run.name", ["(not set)"]),
        ({"run": {"seed": -1}}, "run.seed", ["-1"]),
        (
            {"slurm": {"time": "soon"}},
            "slurm.time",
            ["'soon'", "D-HH:MM:SS, HH:MM:SS or MM:SS, or a number of seconds"],
        ),
        ({"slurm": {"time": True}}, "slurm.time", ["True", "D-HH:MM:SS"]),
        (
            {"slurm": {"time": 60}},
            "slurm.signal_s",
            ["= 300", "not less than slurm.time (0:01:00)", "raise slurm.time"],
        ),
        ({"slurm": {"time": "5:00"}}, "slurm.signal_s", ["not less than slurm.time (5:00)"]),
        (
            {"slurm": {"args": ["-x"]}},
            "slurm.args",
            ["= '-x'", "is not a flag", "slurm.args=[--mem=0]"],
        ),
        (
            {"slurm": {"args": ["--export=A=b,C=d"]}},
            "slurm.args",
            ["= '--export=A=...'", "in the run directory"],
        ),
        (
            {
                "slurm": {"workers_per_node": 1},
                "cluster": {"num_workers": 2, "placement": "STRICT_PACK"},
            },
            "slurm.workers_per_node",
            ["= 1", "all 2 workers on one node", "cluster.placement=PACK"],
        ),
        (
            {
                "slurm": {"workers_per_node": 2},
                "cluster": {"num_workers": 2, "placement": "STRICT_SPREAD"},
            },
            "slurm.workers_per_node",
            ["= 2", "each worker on its own node", "remove it"],
        ),
        (
            {"cluster": {"num_workers": "many"}},
            "cluster.num_workers",
            ["'many'", "integer of 1 or more, or [fewest,"],
        ),
        (
            {"cluster": {"num_workers": 0}},
            "cluster.num_workers",
            ["= 0", "1 or more", "cluster.num_workers=1"],
        ),
        ({"cluster": {"num_workers": True}}, "cluster.num_workers", ["= True", "integer"]),
        (
            {"cluster": {"num_workers": [2, 1]}},
            "cluster.num_workers",
            ["= [2, 1]", "[fewest, most]"],
        ),
        ({"cluster": {"num_workers": [2]}}, "cluster.num_workers", ["= [2]", "[fewest, most]"]),
        (
            {"cluster": {"num_workers": [1, 2]}, "optimizer": {"name": "torch.optim.Adafactor"}},
            "cluster.num_workers",
            ["= [1, 2]", "only on the same number of ranks", "set cluster.num_workers=2"],
        ),
        (
            {"engine": {"kind": "deepspeed"}, "precision": "fp64"},
            "precision",
            ["= 'fp64'", "in fp32", "set engine.kind=ddp or fsdp, or precision=fp32"],
        ),
        ({"cluster": {"resources": {"GPU": -1}}}, "cluster.resources.GPU", ["-1"]),
        (
            {"run": "tiny"},
            "run",
            ["'tiny'", "is a block of settings", "did you mean run.name=tiny?"],
        ),
        (
            {"cluster": {"resources": {"CPU": 0}}},
            "cluster.resources",
            ["requests no resources", "for example {CPU: 1}"],
        ),
        ({"wandb": {"mode": False}}, "wandb.mode", ["set wandb.mode=disabled"]),
        ({"callbacks": "a.b:C"}, "callbacks", ["for example callbacks=[a.b:C]"]),
    ],
)
def test_each_rule_names_key_value_rule_and_cure(
    tmp_path: Path, blocks: dict[str, Any], key: str, words: list[str]
) -> None:
    assert_rule(refused(tmp_path, **blocks), key, words)


SETS = {"easy": "a.jsonl", 2024: "b.jsonl"}  # as YAML reads a bare number


@pytest.mark.parametrize(
    ("best", "sets", "has_more", "says"),
    [
        ("loss", None, False, None),
        ("eval_rewards/margins", None, False, None),
        (
            "rewards/accuracy",
            None,
            False,
            "is not an evaluated metric; did you mean rewards/accuracies?",
        ),
        ("rewards/accuracy", None, True, None),
        ("easy_loss", SETS, False, None),
        ("eval_2024_rewards/margins", SETS, False, None),
        ("eval_loss", SETS, False, "is not an evaluated metric; did you mean "),
        ("easy_mine", SETS, False, "is not an evaluated metric; "),
        ("easy_mine", SETS, True, None),
        (
            "mine",
            SETS,
            True,
            "is not an evaluated metric; for example evaluation.metric_for_best=easy_loss",
        ),
    ],
)
def test_metric_for_best_must_be_an_evaluated_metric(
    tmp_path: Path, best: str, sets: Any, has_more: bool, says: str | None
) -> None:
    data = {"data": {"eval": sets}} if sets else {}
    spec = tiny_spec(tmp_path, evaluation={"metric_for_best": best}, **data)
    if says is None:
        spec.evaluation.check_metrics(spec.data.eval_sets, EVALUATED, has_more)
        return
    with pytest.raises(UserError) as caught:
        spec.evaluation.check_metrics(spec.data.eval_sets, EVALUATED, has_more)
    assert caught.value.key == "evaluation.metric_for_best"
    assert says in str(caught.value)


def test_a_set_must_not_have_the_name_of_a_metric(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, data={"eval": {"entropy": "a.jsonl"}})
    with pytest.raises(UserError, match=r"data.eval = 'entropy': is the name of a metric; rename"):
        spec.evaluation.check_metrics(spec.data.eval_sets, EVALUATED)
