"""A Slurm of two nodes for each module of tests."""

from collections.abc import Iterator

import pytest

from support.cluster_nodes import Nodes
from support.slurm_cluster import Slurm, why_no_slurm


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if why := why_no_slurm():
        pytest.skip(why)
    with Nodes(tmp_path_factory.mktemp("nodes")) as nodes, Slurm(nodes) as started:
        yield started
