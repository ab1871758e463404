"""Every setting is described and frozen, says whether it may change on resume, and is read as users
write it.
"""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.settings.base import Block
from orchestrator.settings.errors import SettingsError, UserError
from orchestrator.settings.run import RunSpec, changed_on_resume
from support.tiny_settings import TINY_MODEL, refused, tiny_spec

MAY_CHANGE_ON_RESUME = {
    "run.dir",
    "model.attention",
    "data.num_proc",
    "data.cache_dir",
    "batch.micro_batch_size",
    "batch.max_tokens_per_microbatch",
    "training.gradient_checkpointing",
    "training.logging_steps",
    "training.on_non_finite",
    "training.pair_ledger",
    "training.token_metrics",
    "engine.kind",
    "engine.zero_stage",
    "engine.deepspeed_config",
    "engine.shard_optimizer",
    "engine.offload",
    "engine.reshard_after_forward",
    "engine.bucket_size",
    "engine.overlap_comm",
    "reference.cache",
    "reference.sharded",
    "reference.offload",
    "callbacks",
    "evaluation.every_steps",
    "evaluation.every_epoch",
    "evaluation.at_start",
    "evaluation.compute_metrics",
    "evaluation.logits",
    "evaluation.batch_eval_metrics",
    "evaluation.batch_size",
    "evaluation.samples",
    "evaluation.early_stopping",
    "checkpoint.every",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "checkpoint.export",
    "checkpoint.async_save",
    "cluster.num_workers",
    "cluster.resources",
    "cluster.placement",
    "cluster.storage_path",
    "cluster.max_failures",
    "cluster.mtbf_hours",
    "cluster.auth",
    "cluster.collective_timeout_s",
    "cluster.hang_timeout_s",
    "cluster.network_interface",
    "cluster.replacement_wait_s",
    "cluster.preflight",
    "slurm.workers_per_node",
    "slurm.time",
    "slurm.signal_s",
    "slurm.partition",
    "slurm.account",
    "slurm.qos",
    "slurm.args",
    "wandb.project",
    "wandb.group",
    "wandb.mode",
    "wandb.key_file",
}


def leaves(block: Block, prefix: str = "") -> Iterator[tuple[str, Block]]:
    """(dotted key, the block it is in) of every setting."""
    for name in type(block).model_fields:
        value = getattr(block, name)
        if isinstance(value, Block):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", block


def with_other_value(spec: RunSpec, key: str) -> RunSpec:
    """The same settings with one of them replaced by something that it certainly was not."""
    *blocks, name = key.split(".")
    chain: list[Any] = [spec]
    for block in blocks:
        chain.append(getattr(chain[-1], block))
    changed = chain.pop().model_copy(update={name: "something else"})
    for block, parent in zip(reversed(blocks), reversed(chain), strict=True):
        changed = parent.model_copy(update={block: changed})
    return changed


@pytest.mark.parametrize("block", Block.__subclasses__(), ids=lambda block: block.__name__)
def test_every_setting_is_described(block: type[Block]) -> None:
    assert block.__doc__
    assert {
        name for name, field in block.model_fields.items() if not (field.description or "").strip()
    } == set()


def test_every_setting_is_frozen(tmp_path: Path) -> None:
    settings = list(leaves(tiny_spec(tmp_path)))
    assert len(settings) > 50
    for key, block in settings:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(block, key.rpartition(".")[2], None)


def test_which_settings_may_change_on_resume(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path)
    refused = {key: changed_on_resume(spec, with_other_value(spec, key)) for key, _ in leaves(spec)}
    assert {key for key, changes in refused.items() if not changes} == MAY_CHANGE_ON_RESUME
    for key, changes in refused.items():
        assert [change[0] for change in changes] in ([], [key])
        assert all(new == "something else" for _, _, new in changes)


@pytest.mark.parametrize("form", ["file", "folder", "text"])
def test_a_chat_template_is_kept_as_its_text(tmp_path: Path, form: str) -> None:
    text = "{% for m in messages %}${{ m.content }}\n{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(text)
    values = {"file": str(tmp_path / "chat_template.jinja"), "folder": str(tmp_path), "text": text}[
        form
    ]
    assert tiny_spec(tmp_path, data={"chat_template": values}).data.chat_template == text


def test_changes_are_named_with_both_values(tmp_path: Path) -> None:
    before = tiny_spec(tmp_path)
    after = tiny_spec(
        tmp_path, dpo={"beta": 0.5}, run={"seed": 8}, checkpoint={"keep": 5}, wandb={"group": "g"}
    )
    assert changed_on_resume(before, after) == [("run.seed", 7, 8), ("dpo.beta", 0.1, 0.5)]
    assert changed_on_resume(before, before) == []
    listed = tiny_spec(tmp_path, data={"train": [{"path": before.data.train[0].path}]})
    assert changed_on_resume(before, listed) == []
    heavier = tiny_spec(tmp_path, data={"train": [{"path": "/a.jsonl", "weight": 2}, "/b.jsonl"]})
    assert changed_on_resume(before, heavier) == [
        (
            "data.train",
            [before.data.train[0].path],
            [{"path": "/a.jsonl", "weight": 2.0}, "/b.jsonl"],
        )
    ]


def test_a_block_that_was_not_there_is_a_change(tmp_path: Path) -> None:
    before, after = (
        tiny_spec(tmp_path),
        tiny_spec(tmp_path, model={"init": None, "path": "some/model"}),
    )
    assert [key for key, *_ in changed_on_resume(before, after)] == ["model.path", "model.init"]


def test_the_zero_stage_defaults_follow_the_settings(tmp_path: Path) -> None:
    def stage(**engine: Any) -> int:
        return tiny_spec(tmp_path, engine={"kind": "deepspeed", **engine}).engine.stage

    assert [stage(), stage(zero_stage=1), stage(deepspeed_config={})] == [2, 1, 2]
    assert stage(deepspeed_config={"zero_optimization": {"stage": 3}}) == 3
    assert stage(deepspeed_config={"zero_optimization": {"stage": "auto"}}, zero_stage=3) == 3


@pytest.mark.parametrize(
    ("dpo", "losses"),
    [
        ({}, [("sigmoid", 1)]),
        ({"loss_type": "exo_pair", "label_smoothing": 1e-3}, [("exo_pair", 1)]),
        ({"loss_type": ["sigmoid", "sft"]}, [("sigmoid", 1), ("sft", 1)]),
        (
            {"loss_type": ["sigmoid", "exo_pair"], "label_smoothing": 0.1},
            [("sigmoid", 1), ("exo_pair", 1)],
        ),
        ({"loss_type": ["robust", "sft"], "loss_weights": [0.5, 2]}, [("robust", 0.5), ("sft", 2)]),
        ({"loss_type": "hinge", "loss_weights": [2]}, [("hinge", 2)]),
        # a user's own may read any of them
        (
            {"loss_type": "mine:loss", "label_smoothing": 0.1, "discopop_tau": 1, "simpo_gamma": 1},
            [("mine:loss", 1)],
        ),
        (
            {
                "loss_type": ["mine:loss", "ipo"],
                "f_divergence_type": "forward_kl",
                "loss_weights": [2, 1],
            },
            [("mine:loss", 2), ("ipo", 1)],
        ),
    ],
)
def test_losses_and_their_weights(
    tmp_path: Path, dpo: dict[str, Any], losses: list[tuple[str, float]]
) -> None:
    spec = tiny_spec(tmp_path, dpo=dpo).dpo
    assert list(zip(spec.loss_types, spec.weights, strict=True)) == losses


def test_a_loss_in_a_list_of_one_resumes_a_run_that_named_it(tmp_path: Path) -> None:
    named, listed = (tiny_spec(tmp_path, dpo={"loss_type": value}) for value in ("ipo", ["ipo"]))
    assert changed_on_resume(named, listed) == []
    several = tiny_spec(tmp_path, dpo={"loss_type": ["ipo", "sft"], "loss_weights": [1, 0.5]})
    assert [key for key, *_ in changed_on_resume(named, several)] == [
        "dpo.loss_type",
        "dpo.loss_weights",
    ]


@pytest.mark.parametrize(
    ("value", "fewest", "most"), [(3, 3, 3), ([1, 4], 1, 4), ([2, 2], 2, 2), ("2", 2, 2)]
)
def test_workers_are_a_number_or_a_range(
    tmp_path: Path, value: Any, fewest: int, most: int
) -> None:
    cluster = tiny_spec(tmp_path, cluster={"num_workers": value}).cluster
    assert (cluster.min_workers, cluster.max_workers) == (fewest, most)


def test_a_warm_up_can_be_a_part_of_all_steps(tmp_path: Path) -> None:
    scheduler = tiny_spec(tmp_path, scheduler={"warmup_ratio": 0.1}).scheduler
    # as transformers rounds
    assert [scheduler.warmup(steps) for steps in (1, 10, 11, 200)] == [1, 1, 2, 20]
    assert tiny_spec(tmp_path, scheduler={"warmup_steps": 5}).scheduler.warmup(200) == 5


@pytest.mark.parametrize(
    ("metric", "set_", "expected"),
    [
        ("loss", None, False),
        ("eval_loss", None, False),
        ("rewards/accuracies", None, True),
        ("loss", True, True),
    ],
)
def test_direction_of_the_best_metric(
    tmp_path: Path, metric: str, set_: bool | None, expected: bool
) -> None:
    spec = tiny_spec(tmp_path, evaluation={"metric_for_best": metric, "greater_is_better": set_})
    assert spec.greater_is_better is expected


def test_errors_cross_process_borders(tmp_path: Path) -> None:
    one = UserError("key", {"a": 1}, "rule", "cure")
    many = refused(tmp_path, optimizer={"lr": 0}, batch={"global_batch_size": 0})
    assert isinstance(many, SettingsError)
    for error in (one, many):
        back = pickle.loads(pickle.dumps(error))
        assert type(back) is type(error)
        assert str(back) == str(error)


def test_a_long_value_is_shortened() -> None:
    assert len(str(UserError("key", "x" * 5000, "rule", "cure"))) < 200


def test_tiny_settings_are_valid_settings(tmp_path: Path) -> None:
    init = tiny_spec(tmp_path).model.init
    assert init is not None
    assert init.config == TINY_MODEL


@pytest.mark.parametrize(
    ("value", "time", "seconds"),
    [
        (86400, "24:00:00", 86400),  # how YAML reads 24:00:00
        ("24:00:00", "24:00:00", 86400),
        ("30:00", "30:00", 1800),
        ("1-12", "1-12", 129600),
        ("1-12:30", "1-12:30", 131400),
        ("2-00:00:01", "2-00:00:01", 172801),
        (None, None, None),
    ],
)
def test_slurm_times_are_parsed_to_seconds(
    tmp_path: Path, value: Any, time: str | None, seconds: int | None
) -> None:
    slurm = tiny_spec(tmp_path, slurm={"time": value}).slurm
    assert (slurm.time, slurm.time_s) == (time, seconds)


def test_evaluation_sets_have_names(tmp_path: Path) -> None:
    sets = {"easy": "a.jsonl", 2024: "b.jsonl"}  # as YAML reads a bare number
    assert list(tiny_spec(tmp_path, data={"eval": sets}).data.eval_sets) == ["easy", "2024"]
    assert list(tiny_spec(tmp_path).data.eval_sets) == [""]
