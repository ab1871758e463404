"""The task of all systems: the same tiny model, the same pairs, the same length, and the parts of
a plain DPO loop for the systems that bring no trainer.
"""

import json
import os
import random
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

TASK = "SURVIVAL_TASK"  # environment: the folder that `write` has filled
STEPS, SAVE_EVERY, KEEP = 30, 5, 2
RANKS, PAIRS_PER_RANK, PAIRS = 2, 2, 64
LR, BETA = 1e-3, 0.1
RESTARTS = 3  # of every system, also of a shell loop
MODEL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
WORDS = ["red", "blue", "amber", "stone", "river", "cloud", "lamp", "chair", "garden", "bread"]


def collective_timeout_s() -> int:
    """Return the time-out of collectives, which every system is configured with."""
    return int(os.environ["SURVIVAL_TIMEOUT_S"])


def model_folder() -> Path:
    """Return the folder of the model and its tokenizer."""
    return Path(os.environ[TASK], "model")


def pairs_file() -> Path:
    """Return the file of pairs."""
    return Path(os.environ[TASK], "pairs.jsonl")


def write(folder: Path) -> None:
    """Write the model, its tokenizer (a token per byte) and the pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "<pad>", "<end>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<pad>"
    )
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=len(tokenizer), **MODEL)  # pyright: ignore
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    draw = random.Random(0)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 8)))

    rows = [
        {"prompt": f"Say {text()}:", "chosen": f" good {text()}", "rejected": f" bad {text()}"}
        for _ in range(PAIRS)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- a plain loop ---------------------------------------------------------------------------------


def load_model() -> nn.Module:
    """Return the model as it is before training."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)


def load_reference() -> nn.Module:
    """Return the frozen reference."""
    return load_model().eval().requires_grad_(False)


@cache
def sequences() -> list[tuple[list[int], list[int], list[int]]]:
    """Return the tokens of each pair: prompt, chosen, rejected."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    end = [tokenizer.eos_token_id]
    rows = [json.loads(line) for line in pairs_file().read_text().splitlines()]
    return [
        (
            tokenizer(row["prompt"])["input_ids"],
            tokenizer(row["chosen"])["input_ids"] + end,
            tokenizer(row["rejected"])["input_ids"] + end,
        )
        for row in rows
    ]


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the padded sequences of a step (counted from 1) on a rank, chosen before rejected,
    and the mask of their completion tokens.

    The order depends on the epoch alone, so a resumed loop continues with the next pair.
    """
    per_step = RANKS * PAIRS_PER_RANK
    epoch, first = divmod((step - 1) * per_step, PAIRS)
    order = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(epoch)).tolist()
    own = order[first + rank * PAIRS_PER_RANK :][:PAIRS_PER_RANK]
    pairs = [sequences()[index] for index in own]
    rows = [(pair[0], pair[side]) for side in (1, 2) for pair in pairs]
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    completions = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(rows):
        whole = prompt + completion
        ids[row, : len(whole)] = torch.tensor(whole)
        completions[row, len(prompt) : len(whole)] = True
    return ids, completions


def dpo_loss(
    policy: nn.Module, reference: nn.Module, ids: torch.Tensor, completions: torch.Tensor
) -> torch.Tensor:
    """Return the mean DPO loss of a batch; padding stands after the last token, so a causal model
    needs no mask.
    """

    def logps(model: nn.Module) -> torch.Tensor:
        logits = model(ids).logits[:, :-1]
        each = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (each * completions[:, 1:]).sum(-1)

    with torch.no_grad():
        before = logps(reference)
    chosen, rejected = (logps(policy) - before).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def save_weights(model: nn.Module, work: Path) -> None:
    """Write the final weights, as a user would at the end of a loop."""
    model.save_pretrained(work / "final")  # pyright: ignore[reportCallIssue]
