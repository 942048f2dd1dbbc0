from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from trajectories import TRAINER, serving

from lachesis.broker import Broker
from lachesis.shim.app import build_app
from lachesis.shim.settings import ShimSettings


@pytest.fixture
async def client(broker: Broker) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a shim on the test's own run."""
    async with serving(build_app(broker, ShimSettings())) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture
async def registered(client: httpx.AsyncClient) -> httpx.AsyncClient:
    """The same, with a trainer of batch size 4 registered and started."""
    assert (await client.post("/register", json=TRAINER)).status_code == 200
    assert (await client.get("/batch")).json() == {"batch": None}
    return client
