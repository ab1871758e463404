"""Choose the steps of a run to profile."""

from orchestrator.data.order import run_length
from orchestrator.settings.errors import UserError
from orchestrator.settings.run import RunSpec
from orchestrator.training.manifest import committed, step_of
from orchestrator.training.result import RunResult
from orchestrator.training.rundir import RunDir

Steps = tuple[int, ...]
"""First and last step, counted from 1; empty: the third to the fifth step of this process."""


def nothing_to_profile(done: RunResult, profile: Steps) -> UserError:
    """Return the error of profiling a finished run."""
    rule = f"the run has finished after step {done.step}, so no step is left to profile"
    return UserError("--profile", _as_typed(profile), rule, "choose another run.name")


def steps_to_profile(
    spec: RunSpec, per_epoch: int, run_dir: RunDir, profile: Steps
) -> tuple[int, int]:
    """Return the first and the last step to profile, for a run with so many pairs per epoch.

    Raises:
        UserError: the steps are not among the remaining ones.
    """
    last = run_length(per_epoch, spec.batch.global_batch_size, spec.training).steps
    saved = committed(run_dir.checkpoints)
    taken = step_of(saved[0]) if saved else 0
    if not profile:  # the first two warm up
        return min(taken + 3, last), min(taken + 5, last)
    if not taken < profile[0] <= profile[-1] <= last:
        rule = f"the remaining steps of this run are {taken + 1} to {last}"
        cure = f"for example --profile={taken + 1}:{last}"
        raise UserError("--profile", _as_typed(profile), rule, cure)
    return profile[0], profile[-1]


def _as_typed(profile: Steps) -> str | bool:
    return ":".join(map(str, profile)) or True
