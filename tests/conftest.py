"""Every test runs without a hub and without a W&B account; the project needs neither. With `-n`,
which tests share a worker, and in what order they are dealt out. A test's time-out grows with the
machine's load, and skipped tests are listed by reason at the end.
"""

import gc
import os
from collections import Counter
from collections.abc import Generator, Iterator

import pytest

from support.shared_ray import started_ray
from support.timeouts import scaled_timeout

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # of every process that a test starts; several run at once
os.environ["WANDB_ERROR_REPORTING"] = "false"
os.environ.pop("RAY_ADDRESS", None)
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # tests are about the CPU unless marked gpu

RAY = "ray"


@pytest.fixture(scope="session")
def shared_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a command that joins the one Ray of this session instead of starting its own.

    For tests of one node that leave Ray as it is.
    """
    with started_ray(tmp_path_factory.mktemp("ray") / "head.log") as env:
        yield env


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under `--dist loadgroup`, tests of a group run one after another on one worker: all that
    start Ray; else those that a mark of their own puts together; else those of a module that share
    a fixture of it. Any other test goes to whatever worker is free; these come last, so that no
    worker is left alone with a long group.
    """
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group(RAY))
        elif item.get_closest_marker("xdist_group") is None and shares_a_fixture(item):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    if hasattr(config, "workerinput"):  # only what xdist deals out; a module's groups stay together
        items.sort(key=lambda item: 0 if group_of(item) == RAY else 1 if group_of(item) else 2)


def pytest_collection_finish() -> None:
    """Keep what is imported out of the garbage collector: a run that ends collects, which took half
    of a tiny run.
    """
    gc.collect()
    gc.freeze()


def shares_a_fixture(item: pytest.Item) -> bool:
    """Return whether the test uses a fixture that is built once for its module."""
    by_name = item._fixtureinfo.name2fixturedefs.values()
    return any(fixture.scope == "module" for fixtures in by_name for fixture in fixtures)


def group_of(item: pytest.Item) -> str | None:
    """The name of its group."""
    mark = item.get_closest_marker("xdist_group")
    return mark and mark.args[0]


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before pytest-timeout reads the mark
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    """Scale the time-out of the test by the load of the moment, unless --timeout sets it."""
    if item.config.getoption("timeout") is None:
        mark = item.get_closest_marker("timeout")
        seconds = mark.args[0] if mark else float(item.config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(scaled_timeout(seconds)), append=False)
    return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the reasons for which tests were skipped, with the number of tests."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[-1]).removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.section("skipped tests by reason")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count} x {reason}")
