"""Shapes of other trainers and rows without a shape are answered with what to do."""

from pathlib import Path

import pytest

from orchestrator.settings.errors import UserError
from support.row_shapes import NO, QUESTION, YES, Row, refusal
from support.tiny_parts import TEXT_ROW, pairs_of


@pytest.mark.parametrize(
    ("row", "what", "cure"),
    [
        (
            {"prompt": "What?", "completion": "It.", "label": True},
            "unpaired answers (KTO)",
            "a good and a bad completion",
        ),
        (
            {
                "input": {"messages": [QUESTION]},
                "preferred_output": [YES],
                "non_preferred_output": [NO],
            },
            "OpenAI",
            "input.messages",
        ),
        (
            {"history": "What?", "human_ref_A": "It.", "human_ref_B": "No.", "labels": 1},
            "SHP",
            "history as prompt",
        ),
        (
            {"prompt": "What?", "responses": ["a", "b"], "scores": [1, 2]},
            "several answers",
            "a worse one as rejected",
        ),
        (
            {"prompt": "What?", "response_0": "a", "response_1": "b", "better": 0},
            "several answers",
            "rejected",
        ),
        (
            {"instruction": "What?", "completions": [{"response": "a"}, {"response": "b"}]},
            "several answers",
            "rejected",
        ),
        (
            {"data": [TEXT_ROW, TEXT_ROW]},
            "one object that wraps rows under 'data'",
            "write only the list under 'data'",
        ),
        ({"question": ["a"], "answer": ["b"]}, "an object of columns", "one object per row"),
        ({"messages": [QUESTION, YES]}, "one answer, not a pair", "use pairs"),
        ({"prompt": "What?", "completion": "It."}, "one answer, not a pair", "use pairs"),
        (
            {"prompt": "a", "chosen_response": "b", "rejected_response": "c"},
            "has no column 'chosen'",
            "rename 'chosen_response' to 'chosen' and 'rejected_response' to 'rejected'",
        ),
        ({"a": "b"}, "its columns are 'a'", "rename its columns to prompt, chosen and rejected"),
        ({"prompt": "a", "rejected": "b"}, "its columns are 'prompt', 'rejected'", ""),
        (
            {f"column{number}": "x" * 99 for number in range(40)},
            "'column11', and 28 more",
            "rename its columns",
        ),
        (
            {"conversations": [QUESTION], "chosen": {"from": "gpt", "value": "a"}, "rejected": NO},
            "(ShareGPT)",
            "human: user",
        ),
    ],
)
def test_a_shape_of_another_trainer_is_named_with_what_to_do(
    row: Row, what: str, cure: str
) -> None:
    bad = refusal(row)
    assert what in bad.reason
    assert cure in bad.cure
    assert bool(cure) == bool(bad.cure)


def test_an_error_in_the_first_row_concerns_the_file_and_in_a_later_one_that_row(
    tmp_path: Path,
) -> None:
    odd = {"chosen_answer": "a", "rejected_answer": "b"}
    with pytest.raises(
        UserError,
        match=r"data\.train row 1 = .*; rename 'chosen_answer' to 'chosen' [^;]*'rejected'$",
    ):
        pairs_of(tmp_path, [odd, TEXT_ROW])
    with pytest.raises(
        UserError, match=r"row 2 = .*; rename .*, or fix that row of .*data\.on_bad_row=drop"
    ):
        pairs_of(tmp_path, [TEXT_ROW, odd])
    with pytest.raises(
        UserError,
        match=r"leaves no pair .*\(2 malformed rows\); fix them: row 1 has no column 'chosen'",
    ):
        pairs_of(tmp_path, [odd, odd], on_bad_row="drop")
