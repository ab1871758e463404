"""Every loss of ours, in value, gradient and metrics: against an fp64 computation of its own and
against live TRL.

Both trainers take one step of each row of the table, all pairs in one micro-batch, and numbers are
those of state.log_history. `python tests/parity/test_losses.py` prints the table.
"""

import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from orchestrator.dpo.losses import BATCH_LOSSES, LOSSES, PairTerms
from orchestrator.settings.loss import OF_SCORES, DpoSpec, LossType
from support.loss_cases import (
    BETA,
    EXACT,
    EXACT_EXPERTS,
    FP32,
    GRADIENT_FP32,
    LOGGED,
    LR,
    MPO,
    NOT_TRLS,
    NOT_WEIGHTED_BY_TRL,
    ROWS,
    STEPS,
    TABLE,
    TRL_GRADIENT_IS_NEAR,
    TRL_IS_NEAR,
    Case,
    Kind,
    dpo_spec,
    in_trl,
    is_trls,
    make_case,
    named,
    plain,
)
from support.loss_parity import (
    Distances,
    Start,
    Table,
    exactly,
    our_steps,
    printed,
    table_of,
    their_steps,
    their_trainer,
)
from support.tiny_settings import tiny_spec
from support.trl_trainer import need_trl

need_trl()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("losses"))


@pytest.fixture(scope="module")
def table(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Table:
    return table_of(tmp_path_factory.mktemp("experts"), case)


# --- the tests ------------------------------------------------------------------------------------


def test_parity_rows_cover_the_cases_that_matter(case: Case) -> None:
    assert {name for dpo in TABLE["plain"] for name in in_trl(dpo)} == {*LOSSES, *BATCH_LOSSES}
    # its first tokens are counted and not scored
    assert any(not row["prompt_ids"] for row in case.rows)
    assert len({len(row["chosen_ids"]) for row in case.rows}) > 2
    chosen, rejected = (case.logps - case.ref_logps).chunk(2)
    assert {bool(margin > 0) for margin in chosen - rejected} == {True, False}
    assert 1 < float((chosen - rejected).abs().max()) < 30
    assert exactly(case, plain("sigmoid")).metrics.keys() == {*LOGGED}


def test_the_table_is_of_settings_that_are_allowed(case: Case) -> None:
    for kind, dpo in ROWS:
        data = {"margin_column": "margin"} if kind == "margin" else {}
        assert (
            tiny_spec(case.folder, dpo=dpo.model_dump(exclude_defaults=True), data=data).dpo == dpo
        )


@pytest.mark.parametrize(("kind", "dpo"), ROWS, ids=[named(*row) for row in ROWS])
def test_value_gradient_and_metrics(table: Table, kind: Kind, dpo: DpoSpec) -> None:
    ours64, trl, ours32 = table[named(kind, dpo)]
    assert max(ours64) < (EXACT_EXPERTS if kind == "experts" else EXACT)
    assert (trl is not None) == is_trls(kind, dpo)
    far = trl or Distances(0.0, 0.0, 0.0)
    assert far.loss < TRL_IS_NEAR
    assert far.gradient < TRL_GRADIENT_IS_NEAR
    assert far.metric < TRL_IS_NEAR
    # no farther from TRL than TRL is from the truth
    assert ours32.loss <= FP32 + far.loss
    assert ours32.gradient <= GRADIENT_FP32 + far.gradient
    assert ours32.metric <= FP32 + far.metric


def test_the_table_can_be_read(table: Table) -> None:
    print(printed(table))
    assert len(printed(table).splitlines()) == len(table) + 2


@pytest.mark.parametrize("name", NOT_WEIGHTED_BY_TRL)
def test_trl_raises_where_the_table_says_so(case: Case, name: LossType) -> None:
    trainer = their_trainer(case, loss_type=[name], use_weighting=True)
    inputs = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    with pytest.raises(
        RuntimeError, match=r"modified by an inplace operation|single memory location"
    ):
        trainer.compute_loss(trainer.model, inputs).backward()


@pytest.mark.parametrize(
    "name", [name for name in get_args(LossType) if name not in (*OF_SCORES, *NOT_TRLS)]
)
def test_trl_refuses_an_f_divergence_where_our_settings_do(case: Case, name: LossType) -> None:
    with pytest.raises(ValueError, match="is only supported for the following loss types"):
        their_trainer(case, loss_type=name, f_divergence_type="js_divergence")


def test_trl_takes_an_f_divergence_where_our_settings_do(case: Case) -> None:
    taken = [name for name in OF_SCORES if name not in NOT_TRLS]
    their_trainer(case, loss_type=taken, f_divergence_type="js_divergence", label_smoothing=0.1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_is_that_of_trls_cpo_trainer(case: Case, smoothing: float) -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    dpo = dpo_spec("simpo", beta=2.0, simpo_gamma=1.2, label_smoothing=smoothing)
    settings = {
        "beta": 2.0,
        "simpo_gamma": 1.2,
        "label_smoothing": smoothing,
        "loss_type": "simpo",
        "alpha": 0.0,
    }
    trainer: Any = SimpleNamespace(**settings, accelerator=SimpleNamespace(device="cpu"))
    expected, *_ = CPOTrainer.cpo_loss(trainer, *(case.logps / case.tokens).chunk(2))
    actual = LOSSES["simpo"](PairTerms.split(case.logps, case.ref_logps, case.tokens), dpo)
    assert torch.allclose(actual, expected, rtol=1e-12)


def test_the_odds_ratio_of_orpo_is_that_of_trls_orpo_trainer(case: Case) -> None:
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    trainer: Any = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"))
    chosen, rejected = (case.logps / case.tokens).chunk(2)
    expected, *_ = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    actual = LOSSES["orpo"](PairTerms.split(case.logps, case.ref_logps, case.tokens), plain("orpo"))
    assert torch.allclose(actual + chosen, -expected.double(), rtol=1e-5)


# --- three steps ----------------------------------------------------------------------------------

TRAINED = [
    dpo_spec("ipo", beta=0.1),
    dpo_spec(**MPO, beta=0.1),
    dpo_spec("sigmoid", beta=0.1, ld_alpha=0.4, use_weighting=True),
]
STEPS_TAKEN = [dpo for dpo in TRAINED for _ in range(STEPS)]


def test_three_steps_are_trls(case: Case) -> None:
    """From the reference, which is where TRL begins."""
    start = Start("reference", LR, restart=STEPS)
    trl, exact = (
        their_steps(case, STEPS_TAKEN, start),
        our_steps(case, STEPS_TAKEN, "fp64", start=start),
    )
    for i in range(0, len(trl), STEPS):
        assert trl[i + STEPS - 1].metrics["loss"] < 0.95 * trl[i].metrics["loss"]
    for attention in ("auto", "padded"):
        actual = our_steps(case, STEPS_TAKEN, "fp32", start=start, attention=attention)
        for step, sides in enumerate(zip(actual, trl, exact, strict=True)):
            for name in (*LOGGED, "learning_rate"):
                ours, theirs, true = (side.metrics[name] for side in sides)
                where = (named("plain", STEPS_TAKEN[step]), step % STEPS, name, attention)
                # no farther from TRL than TRL is from the truth
                assert abs(ours - theirs) <= FP32 * max(1.0, abs(true)) + abs(theirs - true), where
                assert abs(theirs - true) <= TRL_IS_NEAR * max(1.0, abs(true)), where


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        with redirect_stdout(sys.stderr):  # what runs say of themselves
            losses_table = table_of(Path(other), make_case(Path(folder)))
        print(printed(losses_table))
