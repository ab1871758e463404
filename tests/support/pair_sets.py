"""Several training sets with good and bad rows."""

from pathlib import Path
from typing import Any

from orchestrator.data.pair_cache import tokenized_pairs
from orchestrator.data.pairs import Pairs
from orchestrator.settings.data import DataSpec
from support.tiny_parts import TEXT_ROW, data_spec, tokenizer
from support.tiny_settings import random_rows, write_jsonl

GOOD, TIE, MALFORMED = TEXT_ROW, {**TEXT_ROW, "chosen": " no"}, {"prompt": "no answers"}


SETS = [
    [TIE, GOOD, GOOD, TIE],
    random_rows(3, conversational=True),
    [MALFORMED, *random_rows(4, seed=1)],
]


def several(folder: Path, contents: list[list[Any]], **settings: Any) -> tuple[DataSpec, Pairs]:
    """The pairs of a JSONL file for each list of rows, of weights 1, 2, 3, ..."""
    paths = [
        write_jsonl(folder / f"{number}.jsonl", content) for number, content in enumerate(contents)
    ]
    sets = [{"path": str(path), "weight": weight} for weight, path in enumerate(paths, 1)]
    data = data_spec(train=sets, **settings)
    return data, tokenized_pairs(data, "train", tokenizer(), folder / "cache")
