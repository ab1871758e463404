"""The identity of a reference covers its weights and config."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from orchestrator.models.identity import identity_of
from orchestrator.models.reference import Reference
from orchestrator.settings.run import RunSpec
from support.references import LORA, built
from support.thread_ranks import on_ranks
from support.tiny_parts import (
    ALONE,
    tiny_model,
)


def test_the_identity_covers_weights_and_config_on_any_number_of_ranks() -> None:
    def identity(model: PreTrainedModel, world: Any = ALONE) -> dict[str, Any]:
        return identity_of(Reference(model).tensors(), model.config, world)

    one, same, other = tiny_model(), tiny_model(packed=True), tiny_model()
    with torch.no_grad():
        next(other.parameters())[3, 5] += 1e-6
    scaled = tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    one.config._name_or_path = "elsewhere"
    expected = identity(one)
    assert identity(same) == expected
    assert identity(other) != expected
    assert identity(scaled) != expected
    assert identity(scaled)["weights"] == expected["weights"]
    for ranks in (2, 3):
        assert on_ranks(ranks, lambda world: identity(one, world)) == [expected] * ranks


@pytest.mark.parametrize("model", [{}, {"tied_head": "freeze"}], ids=["untied", "tied"])
def test_references_with_equal_weights_have_equal_identities(
    spec_of: Callable[..., RunSpec], model: dict[str, Any]
) -> None:
    def weights(spec: RunSpec) -> str:
        _, reference = built(spec)
        return identity_of(reference.tensors(), reference.model.config, ALONE)["weights"]

    expected = weights(spec_of())
    assert weights(spec_of(kind="precomputed")) == expected
    assert weights(spec_of(LORA)) == expected
    assert weights(spec_of(LORA, kind="adapter_off")) == expected
    assert weights(spec_of(LORA, kind="precomputed")) == expected
    assert weights(spec_of(model, kind="shared_layers", num_shared_layers=2)) == expected
    assert weights(spec_of(kind="int8")) != expected
    assert weights(spec_of(dtype="bf16")) != expected
