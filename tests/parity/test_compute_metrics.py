"""With evaluation.logits a user's compute_metrics is handed what TRL's DPOTrainer hands it, whole
or in batches.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.run.local.debug import debug
from support.run_files import metric_lines
from support.tiny_parts import tiny_model, tokenizer
from support.tiny_settings import random_rows, tiny_spec, write_jsonl
from support.trl_trainer import need_trl, trl_trainer

need_trl()

# pairs of a batch, and of the set; tokens, which some of the sequences have more of
BATCH, PAIRS, MAX_LENGTH = (3, 7, 40)
TRAIN, EVAL = random_rows(8, longest=4), random_rows(PAIRS, seed=1, longest=4)
Handed = list[tuple[np.ndarray, np.ndarray, bool | None]]


def keeping(handed: Handed) -> Any:
    """The seed's compute_metrics, which unpacks two."""

    def compute(eval_preds: Any, compute_result: bool | None = None) -> dict[str, float]:
        logits, labels = eval_preds
        handed.append((np.asarray(logits), np.asarray(labels), compute_result))
        return {"custom_metric": 0.5}

    return compute


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    tiny_model(seed=3, tie_word_embeddings=False).save_pretrained(root / "model")
    tokenizer().save_pretrained(root / "model")
    write_jsonl(root / "train.jsonl", TRAIN)
    write_jsonl(root / "eval.jsonl", EVAL)
    return root


@pytest.mark.parametrize("batched", [False, True], ids=["whole", "in batches"])
def test_logits_and_labels_are_those_of_trl(folder: Path, batched: bool) -> None:
    theirs: Handed = []
    settings = {
        "per_device_eval_batch_size": BATCH,
        "batch_eval_metrics": batched,
        "max_length": MAX_LENGTH,
    }
    trainer = trl_trainer(
        str(folder / "model"), tokenizer(), TRAIN, output_dir=str(folder / "trl"), **settings
    )
    trainer.compute_metrics = keeping(theirs)
    with pytest.warns(FutureWarning, match="return_outputs"):
        expected = trainer.evaluate(trainer.train_dataset.from_list(EVAL))

    ours: Handed = []
    spec = tiny_spec(
        folder,
        run={"name": "batched" if batched else "whole"},
        model={"init": None, "path": str(folder / "model")},
        data={"max_length": MAX_LENGTH},
        training={"max_steps": 1},
        evaluation={"logits": True, "batch_size": BATCH, "batch_eval_metrics": batched},
    )
    result = debug(spec, compute_metrics=keeping(ours))
    assert result.status == "finished"
    assert len(theirs) == (3 if batched else 1)
    assert len(ours) == 2 * len(theirs)  # before training, and after it
    lost = sum(len(labels) for _, labels, _ in ours[: len(theirs)]) - sum(
        len(labels) for _, labels, _ in theirs
    )
    # TRL cuts a last batch that is not full to as many rows as it has pairs
    assert lost in (0, PAIRS % BATCH)
    for (logits, labels, is_last), actual in zip(theirs, ours, strict=False):
        assert (labels.dtype, logits.dtype, is_last) == (
            actual[1].dtype,
            actual[0].dtype,
            actual[2],
        )
        np.testing.assert_array_equal(labels, actual[1][: len(labels)])
        np.testing.assert_allclose(logits, actual[0][: len(labels)], rtol=1e-4, atol=1e-5)
    before = next(line for line in metric_lines(spec.run_dir) if line["step"] == 0)
    assert before["eval_custom_metric"] == expected["eval_custom_metric"] == 0.5
