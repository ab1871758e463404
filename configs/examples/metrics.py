"""Add custom evaluation metrics: a function with the arguments of TRL's."""

import sys

from orchestrator import debug, load_spec, train


def compute_metrics(eval_preds):
    # [sequences, tokens, vocabulary] and [sequences, tokens], -100 behind a shorter batch
    logits, labels = eval_preds
    guesses, tokens = logits[:, :-1].argmax(-1), labels[:, 1:]
    return {"guessed_tokens": float((guesses == tokens)[tokens != -100].mean())}


if __name__ == "__main__":  # metrics.yaml imports the function
    run = debug if "--debug" in sys.argv else train
    overrides = [word for word in sys.argv if "=" in word]
    spec = load_spec(
        "configs/examples/base.yaml",
        ["run.name=metrics-python", "evaluation.logits=true", *overrides],
    )
    run(spec, compute_metrics=compute_metrics)
