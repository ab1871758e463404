"""Weights that a model lacks, does not use, or that are not finite are refused by name."""

from typing import Any

import pytest
import torch

from orchestrator.models.weight_checks import WeightDifferences, check_complete, check_finite
from orchestrator.settings.errors import UserError

KEY, MODEL = "model.path", "a Qwen2ForCausalLM"


def refusal(differences: WeightDifferences) -> str:
    with pytest.raises(UserError) as caught:
        check_complete(KEY, "/model", differences, MODEL)
    return str(caught.value)


def test_equal_names_and_shapes_pass() -> None:
    shapes = {"a.weight": (2, 3), "b.bias": (2,)}
    differences = WeightDifferences.between(shapes, dict(shapes))
    assert differences == WeightDifferences([], [], [])
    check_complete(KEY, "/model", differences, MODEL)


def test_missing_weights_are_counted_and_the_first_named() -> None:
    line = refusal(WeightDifferences([f"layers.{n}.weight" for n in range(5)], [], []))
    assert "5 weights (layers.0.weight, layers.1.weight, layers.2.weight, ...) are missing" in line
    assert "use a complete checkpoint of a Qwen2ForCausalLM" in line


def test_a_callers_fix_replaces_the_default_one() -> None:
    for differences in (WeightDifferences(["a"], [], []), WeightDifferences([], ["a"], [])):
        with pytest.raises(UserError, match="; train it again") as caught:
            check_complete(KEY, "/model", differences, MODEL, fix="train it again")
        assert "checkpoint" not in str(caught.value)


def test_one_missing_weight_is_named_alone() -> None:
    assert "weight lm_head.weight is missing from its files" in refusal(
        WeightDifferences(["lm_head.weight"], [], [])
    )


@pytest.mark.parametrize("head", ["score.weight", "v_head.summary.weight", "classifier.dense.bias"])
def test_the_head_of_another_task_is_named_as_such(head: str) -> None:
    for missing in ([], ["lm_head.weight"]):  # tied embeddings lack nothing
        line = refusal(WeightDifferences(missing, [head], []))
        assert head in line
        assert "reward, value or classification model" in line


def test_weights_that_are_not_used_are_refused() -> None:
    line = refusal(WeightDifferences([], ["model.layers.2.mlp.up_proj.weight"], []))
    assert "does not use: weight model.layers.2.mlp.up_proj.weight; correct its config" in line


@pytest.mark.parametrize(
    ("name", "wrapper"),
    [
        ("_orig_mod.model.norm.weight", "torch.compile"),
        ("model.layers.0._orig_mod.mlp.up_proj.weight", "torch.compile"),
        ("module.model.norm.weight", "DistributedDataParallel"),
        ("module._orig_mod.model.norm.weight", "torch.compile"),
        ("_fsdp_wrapped_module.model.norm.weight", "FSDP"),
        (
            "model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight",
            "activation checkpointing",
        ),
        ("base_model.model.model.norm.weight", "peft"),
    ],
)
def test_the_prefix_of_a_wrapper_is_named(name: str, wrapper: str) -> None:
    line = refusal(WeightDifferences(["model.norm.weight"], [name], []))
    assert wrapper in line
    assert "save the model without the wrapper, or remove" in line
    assert "weight model.norm.weight is missing" in line


def test_a_name_that_only_ends_like_a_wrapper_is_not_one() -> None:
    line = refusal(WeightDifferences(["model.norm.weight"], ["model.submodule.norm.weight"], []))
    assert "DistributedDataParallel" not in line


def test_other_shapes_are_refused() -> None:
    line = refusal(WeightDifferences.between({"a": (2, 3), "b": (1,)}, {"a": (2, 4), "b": (2,)}))
    assert (
        "a has shape (2, 3) in its files, but a Qwen2ForCausalLM needs (2, 4) (and 1 more)" in line
    )


def test_heads_for_further_tokens_and_old_buffers_need_not_be_used() -> None:
    unused = {
        "mtp.layers.0.mlp.up_proj.weight",
        "model.mtp_layers.0.norm.weight",
        "model.rotary_emb.inv_freq",
    }
    info: dict[str, Any] = {
        "missing_keys": set(),
        "unexpected_keys": unused,
        "mismatched_keys": set(),
    }
    assert WeightDifferences.from_loading_info(info) == WeightDifferences([], [], [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "inf"), (-float("inf"), "inf")]
)
def test_a_value_that_is_not_finite_is_named(dtype: torch.dtype, value: float, kind: str) -> None:
    tensor = torch.full((65, 33), torch.finfo(dtype).max, dtype=dtype)  # whose sum overflows
    check_finite(KEY, "/model", [("whole", tensor)])
    tensor[64, 32] = value
    with pytest.raises(
        UserError,
        match=rf"bad holds {kind}: 1 of its 2145 values are not finite in {str(dtype)[6:]}",
    ):
        check_finite(KEY, "/model", [("whole", torch.ones(3)), ("bad", tensor)])


def test_integers_and_empty_tensors_are_finite() -> None:
    check_finite(
        KEY, "/model", [("codes", torch.ones(3, dtype=torch.int8)), ("none", torch.ones(0))]
    )
