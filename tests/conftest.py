"""Every test runs without a hub and without a W&B account; the project needs neither. With `-n`, which tests share a
worker, and in what order they are dealt out."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # of every process that a test starts; several run at once
os.environ["WANDB_ERROR_REPORTING"] = "false"
os.environ.pop("RAY_ADDRESS", None)
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # tests are about the CPU unless marked gpu

RAY = "ray"


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under `--dist loadgroup`, tests of a group run one after another on one worker: all that start Ray; else those
    that a mark of their own puts together; else those of a module that share a fixture of it. Any other test goes to
    whatever worker is free; these come last, so that no worker is left alone with a long group."""
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group(RAY))
        elif item.get_closest_marker("xdist_group") is None and shares_a_fixture(item):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    if hasattr(config, "workerinput"):  # only what xdist deals out; a module's groups stay together
        items.sort(key=lambda item: 0 if group_of(item) == RAY else 1 if group_of(item) else 2)


def shares_a_fixture(item: pytest.Item) -> bool:
    """Whether a fixture that the test asks for is made once for its module."""
    made = item._fixtureinfo.name2fixturedefs.values()  # pyright: ignore[reportAttributeAccessIssue]
    return any(fixture.scope == "module" for fixtures in made for fixture in fixtures)


def group_of(item: pytest.Item) -> str | None:
    """The name of its group."""
    mark = item.get_closest_marker("xdist_group")
    return mark and mark.args[0]
