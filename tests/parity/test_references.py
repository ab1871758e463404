"""Ten steps with each way to have a reference: the numbers of TRL where it has the same, and of our
other ways.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from orchestrator import create_reference_model
from orchestrator.settings.errors import UserError
from orchestrator.settings.load import make_spec
from orchestrator.settings.run import RunSpec
from orchestrator.training.rundir import RunDir
from support.reference_parity import (
    INT8_TOLERANCE,
    PAIRS,
    SHARED,
    STEPS,
    TOLERANCE,
    WEIGHTS_TOLERANCE,
    Home,
    assert_trls,
    beyond,
    exactly,
    ours,
    parameters,
    run,
    trained,
    weights,
)
from support.run_files import losses
from support.timeouts import scaled_timeout
from support.training_parity import worst
from support.trl_trainer import need_trl

need_trl()


# --- shared layers --------------------------------------------------------------------------------


def of_trl(policy: Any) -> Any:
    from trl.experimental.utils import create_reference_model as of_trl

    return of_trl(policy, num_shared_layers=SHARED)


def of_ours(policy: PreTrainedModel) -> PreTrainedModel:
    return create_reference_model(policy, num_shared_layers=SHARED)


def test_shared_layers_by_settings_and_by_function_equal_trl(home: Home) -> None:
    def sharing(count: int) -> RunSpec:
        return home.spec(
            f"shared_{count}", reference={"kind": "shared_layers", "num_shared_layers": count}
        )

    policy = home.loaded()
    trainer = home.trl(policy, ref_model=of_trl(policy))
    trls, actual = trained(trainer), ours(sharing(SHARED))

    exact = exactly(sharing(SHARED))
    assert_trls(actual, trls, exact)
    assert worst(weights(sharing(SHARED)), parameters(trainer.model)) < WEIGHTS_TOLERANCE
    assert ours(home.spec("function"), of_ours) == actual
    assert ours(home.spec("trls_function"), of_trl) == actual

    fewer = beyond(ours(sharing(SHARED - 1)), trls, TOLERANCE, slack=exact)
    assert fewer[0].startswith("step 1 grad_norm")


# --- 8 bits, as a Python user writes it -----------------------------------------------------------


def test_a_run_with_a_function_is_not_resumed_without_it(home: Home) -> None:
    """Whose reference would be the same: but what the function had frozen would train."""
    spec = home.spec("with_function")
    stop = {
        "path": "support.reference_parity:StopAfter",
        "kwargs": {"step": 2, "file": str(RunDir(spec.run_dir).stop)},
    }
    assert run(home.spec("with_function", callbacks=[stop]), of_ours).status == "stopped"
    with pytest.raises(
        UserError,
        match=r"is a run that was started with other models or another tokenizer: trainable.count",
    ):
        run(spec)


@pytest.mark.parametrize("outliers", [False, True])
def test_a_function_that_loads_in_8_bits_is_kind_int8_and_trls(home: Home, outliers: bool) -> None:
    """Inputs beyond 6 keep 16 bits, and with them their columns of all tokens that are fed
    together. Where there are such outliers only TRL's micro-batches have TRL's numbers; smaller
    ones are 2e-4 from its losses.
    """
    path, name = home.folder / f"outliers_{outliers}", f"int8_{outliers}"
    model = home.loaded()
    if outliers:
        for norm in [p for n, p in model.named_parameters() if n.endswith("layernorm.weight")]:
            norm.data[3] *= 5
    model.save_pretrained(path)
    home.tokenizer.save_pretrained(path)

    def load(policy: Any = None) -> Any:
        del policy
        return AutoModelForCausalLM.from_pretrained(
            path, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )

    def spec(name: str, **blocks: Any) -> RunSpec:
        layout = {"attention": "padded"} if outliers else {}
        return home.spec(
            name,
            model={"path": str(path), **layout},
            batch={"micro_batch_size": PAIRS if outliers else PAIRS // 2},
            **blocks,
        )

    actual = ours(spec(f"{name}_function"), load)
    trls = trained(
        home.trl(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), ref_model=load())
    )

    assert ours(spec(name, reference={"kind": "int8"})) == actual
    assert beyond(actual, trls, INT8_TOLERANCE) == []
    full = ours(spec(f"{name}_full"))
    assert abs(full[0]["loss"] - trls[0]["loss"]) > 2 * INT8_TOLERANCE  # so far are 8 bits from 32


# --- the same on Ray ------------------------------------------------------------------------------

USERS_MODULE = """
import os
from pathlib import Path
import torch
from orchestrator import create_reference_model

def lower_half_shared(policy):
    return create_reference_model(policy, 2)

def sgd(params):
    Path(__file__).with_name("nice").write_text(str(os.nice(0)))
    return torch.optim.SGD(params, lr=0.02)

def halved(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
"""
USERS_PROGRAM = """
import orchestrator, my_parts
orchestrator.train(
    orchestrator.load_spec("run.yaml"),
    ref_model=my_parts.lower_half_shared,
    optimizers=(my_parts.sgd, my_parts.halved),
)
"""
IN_SETTINGS = {
    "reference": {"kind": "shared_layers", "num_shared_layers": SHARED},
    "optimizer": {"name": "torch.optim.SGD", "lr": 0.02},
    "scheduler": {
        "name": "torch.optim.lr_scheduler.StepLR",
        "kwargs": {"step_size": 2, "gamma": 0.5},
    },
}


@pytest.mark.ray
def test_functions_of_the_users_own_module_reach_the_workers(
    home: Home, tmp_path: Path, shared_ray: dict[str, str]
) -> None:
    """Under an engine that shards what they are given."""
    (tmp_path / "my_parts.py").write_text(USERS_MODULE)
    # nowhere but in the folder that the user works in
    assert importlib.util.find_spec("my_parts") is None
    raw = home.raw("ray", cluster={"num_workers": 2}, engine={"kind": "fsdp"})
    (tmp_path / "run.yaml").write_text(json.dumps(raw))
    ended = subprocess.run(
        [sys.executable, "-c", USERS_PROGRAM],
        cwd=tmp_path,
        env={**os.environ, **shared_ray, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=scaled_timeout(240),
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    # by Ray's default a worker yields to everything else
    assert (tmp_path / "nice").read_text() == str(os.nice(0))

    settings = home.spec("in_settings", **IN_SETTINGS)
    ours(settings)
    on_ray = losses(make_spec(raw).run_dir)
    assert len(on_ray) == STEPS
    assert on_ray == pytest.approx(losses(settings.run_dir), abs=1e-5)
