"""TensorBoard and MLflow by name, with their real packages: one run, each step once, also after a
kill.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from orchestrator.settings.errors import UserError
from orchestrator.settings.trackers import TRACKERS
from orchestrator.training.callbacks import trackers
from orchestrator.training.callbacks.build import check_callbacks
from orchestrator.training.callbacks.trackers import tracker
from support.debug_runs import finish_debug, run_debug
from support.run_files import losses
from support.run_hooks import dies_saving
from support.tiny_settings import tiny_spec, write_settings

KILLED, SAVED, STEPS = 4, 2, 6


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose weights are cut, so that callbacks get no model, killed after steps that it takes
    again.
    """
    for package in ("tensorboard", "mlflow"):
        pytest.importorskip(package)
    settings = write_settings(
        tmp_path_factory.mktemp("trackers"),
        training={"max_steps": STEPS},
        checkpoint={"every_steps": SAVED},
        engine={"kind": "fsdp"},
        callbacks=["tensorboard", "mlflow"],
    )
    killed = run_debug(settings, hook=partial(dies_saving, "begun", 0, KILLED))
    assert killed.codes == [-9], killed.log
    output = finish_debug(settings)
    assert "is dropped" not in killed.log + output
    assert f"resumed after step {SAVED}" in output
    return settings.parent / "runs" / "tiny"


def test_tensorboard_shows_each_step_once(run_dir: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    actual = EventAccumulator(str(run_dir / "logs" / "tensorboard"))
    actual.Reload()
    scalars = {event.step: event.value for event in actual.Scalars("train/loss")}
    assert len(actual.Scalars("train/loss")) == len(scalars)
    assert scalars == pytest.approx(losses(run_dir))
    assert [event.step for event in actual.Scalars("eval/loss")] == [0, STEPS]


def test_mlflow_has_one_run_across_a_kill(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient((run_dir / "mlflow" / "runs").as_uri())
    [run] = client.search_runs(
        [experiment.experiment_id for experiment in client.search_experiments()]
    )
    assert (run.info.run_name, run.info.status) == ("tiny", "FINISHED")
    assert run.data.params["learning_rate"] == "0.001"
    history: dict[int, set[float]] = {}
    for point in client.get_metric_history(run.info.run_id, "loss"):
        history.setdefault(point.step, set()).add(point.value)
    # steps that were taken again are there twice, with the same number
    assert history == {step: {value} for step, value in losses(run_dir).items()}


def test_tracker_names_are_those_of_transformers() -> None:
    assert TRACKERS.keys() == INTEGRATION_TO_CALLBACK.keys() - {"wandb"}


def test_a_tracker_without_its_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    for name, package in TRACKERS.items():
        if package is not None:
            with pytest.raises(
                UserError,
                match=f"callbacks = '{name}': .* is not installed; pip install {package}$",
            ):
                tracker(name)
    with pytest.raises(UserError, match="pip install tensorboard"):
        check_callbacks(tiny_spec(tmp_path, callbacks=["tensorboard"]))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tensorbord", "is not a known tracker; did you mean tensorboard"),
        ("wandb", "has its own settings block; .* set wandb.mode=auto"),
        ("something", "is not of the form module:attr"),
    ],
)
def test_an_unknown_tracker_name_is_refused(tmp_path: Path, name: str, words: Any) -> None:
    with pytest.raises(UserError, match=words):
        tiny_spec(tmp_path, callbacks=[name])
