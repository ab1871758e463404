"""The sample preference pairs are what their script writes, and only the instruction tells chosen
from rejected.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SAMPLE = Path(__file__).parents[2] / "configs" / "sample"
MARKER = "indeed"


def read_texts(name: str) -> list[tuple[str, str, str]]:
    """(prompt, chosen, rejected) of each pair; every message list must hold the one message of its
    role.
    """
    texts = []
    for line in (SAMPLE / name).read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        assert {
            key: [message["role"] for message in messages] for key, messages in pair.items()
        } == {
            "prompt": ["user"],
            "chosen": ["assistant"],
            "rejected": ["assistant"],
        }
        texts.append(
            (
                pair["prompt"][0]["content"],
                pair["chosen"][0]["content"],
                pair["rejected"][0]["content"],
            )
        )
    return texts


TRAIN = read_texts("train.jsonl")
EVAL = read_texts("eval.jsonl")


def tokens(answer: str) -> list[str]:
    # Letter case is kept: it is one of the things an answer could give itself away by.
    return re.findall(r"\w+|[^\w\s]", answer)


def answer_features(answers: list[str], vocabulary: dict[str, int]) -> np.ndarray:
    """Counts of the known words, then the length in characters and in words."""
    features = np.zeros((len(answers), len(vocabulary) + 2))
    for row, answer in zip(features, answers, strict=True):
        for token in tokens(answer):
            if token in vocabulary:
                row[vocabulary[token]] += 1
        row[-2:] = len(answer), len(tokens(answer))
    return features


def answer_only_accuracy(train: list[tuple[str, str]], held_out: list[tuple[str, str]]) -> float:
    """Logistic regression on answers alone: how often it scores a held-out chosen above its
    rejected, ties as half.
    """
    answers = [answer for pair in train for answer in pair]
    vocabulary = {
        token: index
        for index, token in enumerate(sorted({t for answer in answers for t in tokens(answer)}))
    }
    features = answer_features(answers, vocabulary)
    is_chosen = np.tile([1.0, 0.0], len(train))
    mean, spread = features.mean(axis=0), features.std(axis=0)
    spread[spread == 0] = 1.0
    inputs = (features - mean) / spread
    weights = np.zeros(inputs.shape[1])
    for _ in range(300):
        probability = 1 / (1 + np.exp(-inputs @ weights))
        weights -= 0.1 * (inputs.T @ (probability - is_chosen) / len(inputs) + 1e-3 * weights)

    def scores(side: int) -> np.ndarray:
        return (
            (answer_features([pair[side] for pair in held_out], vocabulary) - mean)
            / spread
            @ weights
        )

    gap = scores(0) - scores(1)
    # Rounding is no verdict: sums of the same numbers in another order must count as a tie.
    return float(np.mean(np.where(np.abs(gap) < 1e-9, 0.5, gap > 0)))


def test_committed_files_are_what_the_script_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, SAMPLE / "make_pairs.py", tmp_path], check=True)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (SAMPLE / name).read_bytes(), name


def test_the_sample_has_the_documented_sizes() -> None:
    assert len(TRAIN) >= 512
    assert len(EVAL) >= 128
    for prompt, chosen, rejected in TRAIN + EVAL:
        assert len(prompt.split()) <= 25
        assert max(len(chosen.split()), len(rejected.split())) <= 12


def test_prompts_are_unique() -> None:
    prompts = [prompt for prompt, _, _ in TRAIN + EVAL]
    assert len(set(prompts)) == len(prompts)


def test_nothing_held_out_is_seen_in_training() -> None:
    assert {prompt for prompt, _, _ in TRAIN}.isdisjoint(prompt for prompt, _, _ in EVAL)
    assert {answer for pair in TRAIN for answer in pair[1:]}.isdisjoint(
        answer for pair in EVAL for answer in pair[1:]
    )


def test_every_held_out_word_is_known_from_training() -> None:
    known = {token for pair in TRAIN for text in pair for token in tokens(text)}
    assert {token for pair in EVAL for text in pair for token in tokens(text)} <= known


@pytest.mark.parametrize("pairs", [TRAIN, EVAL], ids=["train", "eval"])
def test_every_pair_has_its_mirror(pairs: list[tuple[str, str, str]]) -> None:
    ordered = sorted((chosen, rejected) for _, chosen, rejected in pairs)
    assert ordered == sorted((rejected, chosen) for _, chosen, rejected in pairs)
    assert all(chosen != rejected for chosen, rejected in ordered)


def test_answers_alone_do_not_tell_which_is_chosen() -> None:
    accuracy = answer_only_accuracy([pair[1:] for pair in TRAIN], [pair[1:] for pair in EVAL])
    assert accuracy < 0.6


def test_the_answer_classifier_finds_a_planted_word() -> None:
    def planted(pairs: list[tuple[str, str, str]]) -> list[tuple[str, str]]:
        return [(f"{chosen} {MARKER}", rejected) for _, chosen, rejected in pairs]

    assert answer_only_accuracy(planted(TRAIN), planted(EVAL)) > 0.9
