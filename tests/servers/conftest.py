"""Every test of this room runs on every server that this machine can have, instead of the embedded one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

for _room in (
    "broker",
    "broker/queue",
    "broker/weights",
    "cli",
    "shim",
):  # their tests are run here once more, and their kits used
    sys.path.append(str(Path(__file__).parents[1] / _room))

from redis_servers import FITTING, binary


@pytest.fixture(scope="session", params=FITTING)
def server_binary(request: pytest.FixtureRequest) -> str:
    return binary(request.param)
