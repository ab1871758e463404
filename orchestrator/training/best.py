"""Keep the best step of a run by evaluation.metric_for_best."""

import difflib
import logging
import math

from orchestrator.settings.errors import UserError
from orchestrator.training.callbacks.handler import Callbacks
from orchestrator.training.context import RunContext
from orchestrator.training.manifest import committed, step_folder

logger = logging.getLogger(__name__)


def save_if_best(
    context: RunContext, callbacks: Callbacks, step: int, metrics: dict[str, float]
) -> None:
    """Request a save if the weights of this step are the best so far; never for step 0, as in
    transformers.

    Raises:
        UserError: the evaluation has no metric of the name in evaluation.metric_for_best.
    """
    spec, state = context.spec, callbacks.state
    name = spec.evaluation.reported_best
    if name is None:
        return
    if name not in metrics:
        near = difflib.get_close_matches(name, metrics, n=1) or list(metrics)
        cure = f"did you mean {near[0].removeprefix('eval_')}?"
        rule = "is not among the evaluated metrics"
        raise UserError("evaluation.metric_for_best", name, rule, cure)
    sign = 1 if spec.greater_is_better else -1
    best = -math.inf if state.best_metric is None else sign * state.best_metric
    if step and sign * metrics[name] > best:  # False for NaN
        state.best_metric, state.best_global_step = metrics[name], step
        callbacks.control.should_save = True


def restore_best(context: RunContext, callbacks: Callbacks) -> None:
    """Set best_model_checkpoint after `Callbacks.restore`; if that checkpoint is gone, the next
    evaluation becomes the best.
    """
    state, checkpoints = callbacks.state, context.run_dir.checkpoints
    if state.best_global_step is None or context.spec.evaluation.metric_for_best is None:
        return
    folder = step_folder(checkpoints, state.best_global_step)
    if folder in committed(checkpoints):
        state.best_model_checkpoint = str(folder)
        return
    if context.world.is_main:
        message = "the best checkpoint %s is missing; the next evaluation becomes the best"
        logger.warning(message, folder)
    state.best_metric = state.best_global_step = None
