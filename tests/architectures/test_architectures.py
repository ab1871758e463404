"""Every causal LM of transformers that builds tiny starts at ln 2, takes the steps of plain torch
and exports what it trained, or is refused in one line. The slow tests print the table.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from support.architecture_check import Row, checked
from support.architecture_sweep import swept

# One of each kind: packed; a router; values by layer; attention in chunks; a state space; a vision
# tower; noise that no setting switches off; a bias of the attention's scores; an encoder.
SAMPLE = [
    "llama",
    "mixtral",
    "gemma4_text",
    "llama4_text",
    "mamba",
    "gemma3",
    "phimoe",
    "inkling_text",
]
REFUSED = ["bert"]


@pytest.mark.parametrize("model_type", SAMPLE + REFUSED)
def test_a_type_of_each_kind_trains_right_or_is_refused(model_type: str, tmp_path: Path) -> None:
    row = checked(model_type, tmp_path)
    assert row.is_right, row
    assert bool(row.refusal) is (model_type in REFUSED), row


@pytest.fixture(scope="module")
def table() -> Iterator[list[Row]]:
    rows: list[Row] = []
    yield rows
    print("", Row.HEADER, *[row.line for row in rows], sep="\n")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_every_type_trains_right_or_is_refused(model_type: str, table: list[Row]) -> None:
    row = swept(model_type)
    table.append(row)
    assert row.is_right, row
