"""A Ray cluster of several nodes on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def ray_cluster(nodes: int) -> Iterator[str]:
    """Its address; every node has one CPU."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")  # else it writes a token into the home folder
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("GLOO_SOCKET_IFNAME", "lo")
        from ray.cluster_utils import Cluster

        small = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=small)
        try:
            for _ in range(nodes - 1):
                cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
            yield cluster.address
        finally:
            cluster.shutdown()
