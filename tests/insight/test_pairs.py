"""The pair ledger's findings, on numbers that can be checked by hand."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from orchestrator import cli
from orchestrator.data.sources import RawRow
from orchestrator.insight.pairs import (
    accuracies,
    analyse,
    as_json,
    as_lines,
    by_length,
    disagreement,
    histories,
    mislabelled,
    never_learned,
    rank_correlation,
)
from orchestrator.settings.load import save_spec
from orchestrator.training.checkpoint_writer import RankState, Saver
from orchestrator.training.ledger import SCHEMA, Ledger
from orchestrator.training.rundir import RunDir
from support.tiny_parts import ALONE
from support.tiny_settings import random_rows, tiny_spec, write_jsonl


def ledger(*visits: dict[str, Any]) -> pa.Table:
    """Rows, of which only what matters is said; completions of one token."""
    plain = {field.name: 1 if field.name.endswith("tokens") else 0 for field in SCHEMA}
    return pa.Table.from_pylist([{**plain, **visit} for visit in visits], schema=SCHEMA)


def visit(pair: int, step: int, margin: float, **more: Any) -> dict[str, Any]:
    return {"pair_id": pair, "step": step, "epoch": step // 10, "margin": margin, **more}


THREE = ledger(
    *[visit(5, 12, -1.0), visit(5, 2, 0.5), visit(5, 22, -4.0)],
    *[visit(9, 3, 0.0), visit(9, 13, 2.0)],
    visit(7, 4, 0.0),
)


def test_the_history_of_a_pair_is_in_the_order_of_steps() -> None:
    actual = histories(THREE)
    assert actual.pair_id.tolist() == [5, 7, 9]
    assert actual.visits.tolist() == [3, 1, 2]
    assert actual.first_margin.tolist() == [0.5, 0.0, 0.0]
    assert actual.margin.tolist() == [-4.0, 0.0, 2.0]
    assert actual.trend[[0, 2]].tolist() == [-2.25, 2.0]
    assert actual.trend[1] != actual.trend[1]  # one visit has none


def test_a_pair_whose_last_margin_is_not_above_0_was_never_learned() -> None:
    actual = histories(THREE)
    assert actual.pair_id[never_learned(actual)].tolist() == [5, 7]


def test_accuracies_are_of_visits_by_epoch() -> None:
    assert accuracies(THREE) == {0: pytest.approx(1 / 3), 1: 0.5, 2: 0.0}


def preferring(
    pair: int, ref: tuple[float, float], policy: tuple[float, float], tokens: tuple[int, int]
) -> Any:
    """One visit: log-probs of chosen and rejected, and how long these are."""
    names = ("ref_chosen_logps", "ref_rejected_logps", "chosen_logps", "rejected_logps")
    numbers = dict(zip(names, (*ref, *policy), strict=True))
    return visit(pair, 1, 1.0, **numbers, chosen_tokens=tokens[0], rejected_tokens=tokens[1])


def test_a_pair_looks_mislabelled_when_both_models_say_so_by_token() -> None:
    actual = histories(
        ledger(
            preferring(1, (-8, -4), (-6, -5), (2, 2)),  # by 2 and 0.5 a token
            preferring(2, (-8, -4), (-4, -5), (2, 2)),  # the policy has learned better
            preferring(3, (-4, -8), (-6, -5), (2, 2)),  # the reference knew better
            # longer, and the rest of it as likely as can be
            preferring(4, (-9, -3), (-9, -3), (9, 1)),
            # shorter, yet less likely a token: by 2 and 2
            preferring(5, (-3, -6), (-3, -6), (1, 6)),
            # a collator may leave nothing of a completion
            preferring(6, (-1, -1), (-1, -1), (0, 1)),
        )
    )
    assert disagreement(actual).tolist() == [0.5, -0.5, -2.0, -2.0, 2.0, 0.0]
    assert actual.pair_id[mislabelled(actual)].tolist() == [5, 1]


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 1000], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),  # 1 - 6 * 4 / (5 * 24)
        ([1, 1, 2], [1, 2, 3], 0.75**0.5),  # ranks 1.5 1.5 3
        ([3, 3], [1, 2], None),
    ],
)
def test_the_rank_correlation_is_spearmans(
    left: list[float], right: list[float], expected: float | None
) -> None:
    actual = rank_correlation(pa.array(left).to_numpy(), pa.array(right).to_numpy())
    assert actual == pytest.approx(expected)


def of_lengths(*differences: int) -> pa.Table:
    """A pair for each, whose margin is a tenth of it."""
    return ledger(
        *[
            visit(pair, 1, longer / 10, chosen_tokens=10 + longer, rejected_tokens=10)
            for pair, longer in enumerate(differences)
        ]
    )


def test_lengths_are_halved_on_either_side_of_0() -> None:
    actual = by_length(histories(of_lengths(-8, -4, -2, -2, 0, 0, 0, 1, 9)))
    assert [(each.least, each.most, each.pairs, each.learned) for each in actual] == [
        (-8, -4, 2, 0.0),
        (-2, -2, 2, 0.0),
        (0, 0, 3, 0.0),
        (1, 1, 1, 1.0),
        (9, 9, 1, 1.0),
    ]
    assert [each.margin for each in actual] == pytest.approx([-0.6, -0.2, 0.0, 0.1, 0.9])
    assert [(each.least, each.most) for each in by_length(histories(of_lengths(3, 5)))] == [
        (3, 3),
        (5, 5),
    ]


# --- what a user reads ----------------------------------------------------------------------------


def test_report_lines_name_the_findings() -> None:
    actual = analyse(22, THREE)
    assert actual.first_ids(1) == [5]
    texts = {5: RawRow("a.jsonl", 5, {"prompt": "Say\nit", "chosen": "x" * 300, "rejected": "ü"})}
    output = list(as_lines(actual, 5, texts))
    assert output[:3] == [
        "6 visits of 3 pairs up to step 22",
        "learned 1 (33.3%): margin above 0 at the last visit",
        "rewards/accuracies by epoch: 0.333, 0.500, 0.000",
    ]
    at = output.index("\nnever learned: 2 pairs, the lowest margin first")
    assert output[at - 1] == "\nrows are from a.jsonl"
    assert output[at + 1 : at + 6] == [
        "row 5: margin -4.000 after 3 visits, +0.500 at first, -2.250 per visit",
        "  prompt    Say\\nit",
        f"  chosen    {'x' * 55} ... {'x' * 55}",
        "  rejected  ü",
        "pair 7: margin +0.000 at its only visit",
    ]
    assert len(output) == at + 6


def test_conversations_are_shown_by_their_text() -> None:
    actual = analyse(
        1, ledger(preferring(1, (-8, -4), (-6, -5), (2, 2)), preferring(2, (0, 0), (0, 0), (9, 2)))
    )
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello."}]
    calls = [{"type": "function"}]
    row = {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": "Hi."}],
        "rejected": [{"role": "assistant", "tool_calls": calls}],
    }
    output = list(as_lines(actual, 1, {1: RawRow("a", 1, row), 2: RawRow("b", 4, row)}))
    assert (
        "each pair was seen once, before its own update: its margin comes from updates on other "
        "pairs" in output
    )
    assert output[-4:] == [
        "row 1 of a: reference by 2.000, policy by 0.500; margin +1.000 at its only visit",
        "  prompt    system: Be kind. | user: Hello.",
        "  chosen    Hi.",
        '  rejected  [{"type": "function"}]',
    ]


def test_as_json_it_has_no_nan_and_whole_texts() -> None:
    row = {"prompt": "p", "chosen": "c" * 300, "rejected": "r"}
    actual = json.loads(
        json.dumps(as_json(analyse(22, THREE), 2, {7: RawRow("a.jsonl", 6, row)}), allow_nan=False)
    )
    assert actual["accuracies"] == {"0": pytest.approx(1 / 3), "1": 0.5, "2": 0.0}
    assert actual["never_learned"]["pairs"] == 2
    unlearned, single = actual["never_learned"]["lowest"]
    assert (unlearned["pair_id"], unlearned["trend"], "row" in unlearned) == (5, -2.25, False)
    assert single["trend"] is None
    assert (single["source"], single["row"], single["chosen"]) == ("a.jsonl", 6, "c" * 300)
    assert actual["mislabelled"] == {"pairs": 0, "strongest": []}
    assert actual["length"] == {
        "rank_correlation": None,
        "bins": [by_length(histories(THREE))[0]._asdict()],
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 6 pairs that has saved once."""
    spec = tiny_spec(
        tmp_path, data={"train": str(write_jsonl(tmp_path / "pairs.jsonl", random_rows(6)))}
    )
    directory = RunDir(tmp_path / "run")
    directory.path.mkdir()
    save_spec(spec, directory.config)
    visits = ledger(*[visit(pair, 1, pair - 2.5, chosen_tokens=pair) for pair in range(1, 7)])
    Saver(directory.checkpoints, ALONE, 2, 60, Ledger(directory.pairs)).save(
        1, [], {}, RankState(seen=visits)
    )
    return directory.path


def test_the_command_shows_pairs_with_their_text(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pairs", str(run_dir), "--top", "1"]) == cli.DONE
    shown = capsys.readouterr().out
    assert "6 visits of 6 pairs up to step 1" in shown
    assert "margin +1.000" in shown.partition("rank correlation")[2].splitlines()[0]
    assert (
        f"row 1: margin -1.500 at its only visit\n  prompt    {random_rows(6)[0]['prompt']}\n"
        in shown
    )
    assert "row 2" not in shown

    assert cli.main(["pairs", str(run_dir), "--json"]) == cli.DONE
    assert [
        pair["row"] for pair in json.loads(capsys.readouterr().out)["never_learned"]["lowest"]
    ] == [1, 2]


def test_without_its_data_a_run_still_has_numbers(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir.parent / "pairs.jsonl").unlink()
    assert cli.main(["pairs", str(run_dir)]) == cli.DONE
    shown = capsys.readouterr()
    assert "pair 1: margin -1.500" in shown.out
    assert "texts are not available: data.train = " in shown.err


def test_a_run_without_ledger_rows_is_refused(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Saver(run_dir / "checkpoints", ALONE, 2, 60).save(2, [], {})
    assert cli.main(["pairs", str(run_dir)]) == cli.WRONG
    assert (
        "has no record of its pairs up to step 2; continue training with training.pair_ledger=true"
        in capsys.readouterr().err
    )


def test_the_command_loads_no_torch(run_dir: Path) -> None:
    code = (
        "import sys; from orchestrator import cli; cli.main(['pairs', sys.argv[1]]); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_dir)], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("False\n")
