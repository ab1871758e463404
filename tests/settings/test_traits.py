"""Facts about kinds: each name of the settings has a row, so no other folder tests names."""

from typing import Any, get_args

import pytest

from orchestrator.settings.engine import ENGINE_TRAITS, EngineKind, EngineSpec
from orchestrator.settings.loss import LOSS_TRAITS, USERS_LOSS, DpoSpec, LossType
from orchestrator.settings.precision import PRECISION_TRAITS, Precision
from orchestrator.settings.reference import REFERENCE_TRAITS, ReferenceKind


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (LossType, LOSS_TRAITS),
        (EngineKind, ENGINE_TRAITS),
        (ReferenceKind, REFERENCE_TRAITS),
        (Precision, PRECISION_TRAITS),
    ],
)
def test_every_name_has_traits(names: Any, table: dict[str, Any]) -> None:
    assert tuple(table) == get_args(names)


SHARED = {
    "loss_type",
    "loss_weights",
    "beta",
    "label_smoothing",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "ld_alpha",
    "use_weighting",
    "router_aux_loss_coef",
}
"""Settings of the block dpo that several losses use; every other one belongs to a loss."""


def test_every_setting_of_a_loss_has_an_owner() -> None:
    assert DpoSpec.model_fields.keys() == SHARED | set(USERS_LOSS.own_settings)


def test_settings_of_one_kind_are_settings_of_its_block() -> None:
    owned = [name for traits in ENGINE_TRAITS.values() for name in traits.own_settings]
    assert set(owned) <= EngineSpec.model_fields.keys()
    assert len(owned) == len(set(owned))
    assert set(USERS_LOSS.own_settings) <= DpoSpec.model_fields.keys()


def test_a_users_loss_may_use_every_setting() -> None:
    [traits] = DpoSpec(loss_type="my_losses:mine").traits
    assert traits is USERS_LOSS
    assert not traits.needs_whole_batch
