"""Answer a few prompts at the end of a run with the model before and after training."""

import logging
from functools import partial
from typing import Any

import torch

from orchestrator.data.file_lock import Poll, no_poll
from orchestrator.data.pairs import Pairs
from orchestrator.data.sources import raw_rows
from orchestrator.models.policy import build_policy
from orchestrator.settings.errors import StopRequested, type_and_message
from orchestrator.settings.run import RunSpec
from orchestrator.training.prepare import PreparedRun
from orchestrator.training.rundir import RunDir

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 64  # length of a sample answer


def answered_samples(
    spec: RunSpec,
    run_dir: RunDir,
    prepared: PreparedRun,
    device: torch.device,
    poll: Poll = no_poll,
) -> list[dict[str, str]]:
    """Return the first evaluation prompts with the answers of the initial and of the exported
    model.

    On rank 0 only, and without collectives. The run has finished, so an error here is only a
    warning. poll: called for each token, to be able to stop.
    """
    if not spec.evaluation.samples:
        return []
    try:
        return _answered(spec, run_dir, prepared, device, poll)
    except StopRequested:
        raise
    # generation may fail in many ways, which do not affect the trained model
    except Exception as error:
        message = "evaluation.samples: no prompt was answered (%s)"
        logger.warning(message, type_and_message(error))
        return []


def _answered(
    spec: RunSpec, run_dir: RunDir, prepared: PreparedRun, device: torch.device, poll: Poll
) -> list[dict[str, str]]:
    from transformers import AutoModelForCausalLM

    name, pairs = next(iter(prepared.eval.items()))  # not empty: a rule of the settings
    prompts = [
        pairs[index]["prompt_ids"] for index in range(min(spec.evaluation.samples, len(pairs)))
    ]
    start = build_policy(spec, prepared.tokenizer, torch.float32)
    before = greedy_answers(start, prepared.tokenizer, prompts, device, poll)
    del start
    end = AutoModelForCausalLM.from_pretrained(run_dir.model)
    after = greedy_answers(end, prepared.tokenizer, prompts, device, poll)
    texts = _prompt_texts(spec, name, pairs, len(prompts))
    return [
        dict(zip(("prompt", "before", "after"), each, strict=True))
        for each in zip(texts, before, after, strict=True)
    ]


@torch.no_grad()
def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    device: torch.device,
    poll: Poll = no_poll,
) -> list[str]:
    """Return the greedy continuation of each prompt by a model, as text."""
    model = model.to(device).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            stopping_criteria=[partial(_never, poll)],
            pad_token_id=tokenizer.pad_token_id,
        )
        answers.append(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip())
    return answers


def _never(poll: Poll, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
    """Poll, and let the generation go on."""
    poll()
    return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def _prompt_texts(spec: RunSpec, name: str, pairs: Pairs, count: int) -> list[str]:
    """Return the text of the first prompts; for a conversation, its last message."""
    ids = [int(pair_id) for pair_id in pairs.pair_ids[:count]]
    rows = raw_rows(spec.data, "eval", ids, name)
    prompts = (rows[pair_id].row["prompt"] for pair_id in ids)
    return [prompt if isinstance(prompt, str) else str(prompt[-1]["content"]) for prompt in prompts]
