"""Optimizers, schedules, callbacks and collators that cannot work are refused."""

from pathlib import Path

import pytest

from support.refusals import (
    Refusal,
    Run,
    UserInput,
    assert_refused_before_begin,
    case,
    command,
)

KEYS_COLLATOR = (
    "import torch\ndef collate(rows):\n    return {'ids': torch.zeros(2 * len(rows), 3)}\n"
)
NONE_COLLATOR = "def collate(rows):\n    return None\n"
MASK_COLLATOR = (
    "import torch\ndef collate(rows):\n    ids = torch.ones(2 * len(rows), 4, dtype=torch.long)\n"
    "    return {'input_ids': ids, 'attention_mask': ids[:, :3], 'completion_mask': ids}\n"
)
NOT_A_CALLBACK = "class Mine:\n    pass\n"


PARTS = [
    case(
        "collator-keys",
        "data.collator=mine:collate",
        "data.collator",
        "'mine:collate'",
        "returned {'ids': (4, 3)} for 2 pairs",
        "return tensors input_ids, attention_mask and completion_mask",
        files={"mine.py": KEYS_COLLATOR},
        late=True,
    ),
    case(
        "no-callback",
        "callbacks=[nowhere:Mine]",
        "callbacks",
        "'nowhere:Mine'",
        "No module named",
        "install it",
    ),
    case(
        "scheduler-kwarg",
        "scheduler.name=torch.optim.lr_scheduler.StepLR|scheduler.kwargs.step=3",
        "scheduler.kwargs",
        "{'step': 3}",
        "unexpected keyword argument 'step'",
        "its arguments are step_size, gamma",
    ),
    case(
        "schedule-without-kwarg",
        "scheduler.name=cosine_with_min_lr",
        "scheduler.kwargs",
        "{}",
        "One of min_lr or min_lr_rate should be set through the scheduler.kwargs",
        "its arguments are num_cycles, min_lr, min_lr_rate",
    ),
    case(
        "wsd-without-kwarg",
        "scheduler.name=wsd",
        "scheduler.kwargs",
        "{}",
        "missing 1 required positional argument: 'num_decay_steps'",
        "its arguments are num_decay_steps, num_stable_steps",
    ),
    case(
        "optimizer-not-there",
        "optimizer.name=nowhere:Mine|engine.shard_optimizer=false",
        "optimizer.name",
        "'nowhere:Mine'",
        "No module named",
        "install it",
    ),
    case(
        "optimizer-is-none",
        "optimizer.name=mine:Mine|engine.shard_optimizer=false",
        "optimizer.name",
        "'Mine'",
        "is not a torch optimizer",
        "return a torch.optim.Optimizer",
        files={"mine.py": "class Mine:\n    def __init__(self, params, lr):\n        pass\n"},
    ),
    case(
        "optimizer-of-matrices",
        "optimizer.name=torch.optim.Muon",
        "optimizer.name",
        "'torch.optim.Muon'",
        "works only on 2-D weights",
        "set model.lora, whose weights are all 2-D",
        late=True,
    ),
    case(
        "no-such-attribute",
        "callbacks=[json:Mine]",
        "callbacks",
        "'json:Mine'",
        "json has no Mine",
        "after the colon",
    ),
    case(
        "not-a-callback",
        "callbacks=[mine:Mine]",
        "callbacks",
        "'mine:Mine'",
        "is not a transformers.TrainerCallback",
        "derive the class",
        files={"mine.py": NOT_A_CALLBACK},
    ),
    case(
        "callback-kwargs",
        "callbacks=[{path: 'transformers:EarlyStoppingCallback', kwargs: {patience: 3}}]",
        "callbacks",
        "EarlyStoppingCallback",
        "unexpected keyword argument 'patience'",
        "write its arguments as {path, kwargs}",
    ),
    case(
        "early-stopping-without-metric",
        "callbacks=[transformers:EarlyStoppingCallback]",
        "evaluation.metric_for_best",
        "(not set)",
        "EarlyStoppingCallback needs it",
        "evaluation.metric_for_best=loss",
    ),
    case(
        "no-collator",
        "data.collator=nowhere:mine",
        "data.collator",
        "'nowhere:mine'",
        "No module",
        "install it",
    ),
    case(
        "collator-not-callable",
        "data.collator=math:pi",
        "data.collator",
        "'math:pi'",
        "cannot be called (",
        "use a function of rows",
    ),
    case(
        "collator-returns-none",
        "data.collator=mine:collate",
        "data.collator",
        "'mine:collate'",
        "returned NoneType for 2 pairs",
        "return tensors input_ids, attention_mask and completion_mask",
        files={"mine.py": NONE_COLLATOR},
        late=True,
    ),
    case(
        "collator-mask-shape",
        "data.collator=mine:collate",
        "data.collator",
        "'mine:collate'",
        "'input_ids': (4, 4), 'attention_mask': (4, 3)",
        "completion_mask of shape [2 * pairs, tokens]",
        files={"mine.py": MASK_COLLATOR},
        late=True,
    ),
    case(
        "optimizer-kwarg",
        "optimizer.kwargs.momentum=0.9",
        "optimizer.kwargs",
        "{'momentum': 0.9}",
        "unexpected keyword argument 'momentum'",
        "its arguments are betas, eps",
    ),
    case(
        "optimizer-without-decay",
        "optimizer.name=torch.optim.Rprop|optimizer.weight_decay=0.1",
        "optimizer.weight_decay",
        "0.1",
        "torch.optim.Rprop does not support it",
        "set it to 0",
    ),
    case(
        "scheduler-of-torch",
        "scheduler.name=torch.optim.lr_scheduler.StpLR",
        "scheduler.name",
        "StpLR",
        "has no such name",
        "did you mean torch.optim.lr_scheduler.StepLR?",
    ),
    case(
        "run-dir-is-a-file",
        "run.dir=train.jsonl",
        "run.dir",
        "train.jsonl/tiny",
        "cannot be created (Not a",
        "set run.dir",
    ),
    case(
        "metric-near",
        "evaluation.metric_for_best=losss",
        "evaluation.metric_for_best",
        "'losss'",
        "is not an evaluated metric",
        "did you mean loss?",
    ),
]


@pytest.mark.parametrize(("user_input", "refusal"), PARTS)
def test_parts_of_training_that_cannot_work_are_refused(
    user_input: UserInput, refusal: Refusal, tmp_path: Path, models: Path, run_here: Run
) -> None:
    code, _, stderr = run_here(*command(tmp_path, user_input, models))
    assert_refused_before_begin(tmp_path, user_input, code, stderr, refusal)
