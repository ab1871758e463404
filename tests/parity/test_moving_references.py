"""References that sync with the policy equal TRL's, also after a resume."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
)

from orchestrator.settings.run import RunSpec
from orchestrator.training.rundir import RunDir
from support.reference_parity import (
    SHARED,
    TOLERANCE,
    TRL_TOLERANCE,
    WEIGHTS_TOLERANCE,
    Home,
    beyond,
    exactly,
    model_of,
    ours,
    parameters,
    run,
    trained,
    weights,
)
from support.training_parity import worst
from support.trl_trainer import need_trl

need_trl()


@pytest.mark.parametrize(
    ("every", "alpha", "other"), [(2, 0.6, False), (3, 0.25, False), (3, 0.9, True)]
)
def test_reference_sync_equals_trl(home: Home, every: int, alpha: float, other: bool) -> None:
    path = home.folder / "other"
    model_of(home.tokenizer, seed=6).save_pretrained(path)
    reference = {"sync_every": every, "path": str(path) if other else None}
    trainer = home.trl(
        home.loaded(),
        ref_model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        if other
        else None,
        sync_ref_model=True,
        ref_model_sync_steps=every,
        ref_model_mixup_alpha=alpha,
    )
    trls = trained(trainer)

    def with_alpha(alpha: float) -> RunSpec:
        return home.spec(f"sync_{every}_{alpha}", reference={**reference, "sync_alpha": alpha})

    actual = ours(with_alpha(alpha))
    exact = exactly(with_alpha(alpha))
    assert beyond(trls, exact, TRL_TOLERANCE) == []
    assert beyond(actual, trls, TOLERANCE, slack=exact) == []
    moved = {f"reference.{name}": value for name, value in parameters(trainer.ref_model).items()}
    assert worst(weights(with_alpha(alpha)), parameters(trainer.model) | moved) < WEIGHTS_TOLERANCE

    # a reference that moves by a thousandth more is seen from the step on that follows its first
    # move
    wrong = beyond(ours(with_alpha(alpha * 1.001)), trls, TOLERANCE, slack=exact)
    assert min(int(line.split()[1]) for line in wrong) == every + 1


@pytest.mark.parametrize(
    "sharing", [{}, {"kind": "shared_layers", "num_shared_layers": SHARED}], ids=["copy", "shared"]
)
@pytest.mark.parametrize("every", [2, 3])
def test_a_run_whose_reference_moves_is_resumed_to_the_last_bit(
    home: Home, every: int, sharing: dict[str, Any]
) -> None:
    kind = sharing.get("kind", "copy")
    reference = {**sharing, "sync_every": every}
    undisturbed = home.spec(f"undisturbed_{kind}_{every}", reference=reference)
    resumed = home.spec(f"resumed_{kind}_{every}", reference=reference)
    expected = ours(undisturbed)
    stop = {
        "path": "support.reference_parity:StopAfter",
        "kwargs": {"step": 5, "file": str(RunDir(resumed.run_dir).stop)},
    }
    ended = run(home.spec(resumed.run.name, reference=reference, callbacks=[stop]))
    assert (ended.status, ended.step) == ("stopped", 5)

    assert ours(resumed) == expected
    actual, whole = weights(resumed), weights(undisturbed)
    assert any(name.startswith("reference.") for name in whole)
    assert actual.keys() == whole.keys()
    assert all(torch.equal(actual[name], value) for name, value in whole.items())
