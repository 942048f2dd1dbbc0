"""Whose word counts for where a caller is, and what becomes of an address in a name."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
import pytest
import uvicorn
from starlette.requests import Request
from trajectories import TRAINER

from lachesis.broker import Broker, ConfigurationError
from lachesis.broker.records.keys import check_name
from lachesis.service.http.connections import uvicorn_options
from lachesis.shim.app import build_app
from lachesis.shim.batch.http_trainers import consumer_of
from lachesis.shim.http.delivery import Protocol
from lachesis.shim.main import listen
from lachesis.shim.settings import ShimSettings

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def shim(broker: Broker, settings: ShimSettings) -> AsyncIterator[httpx.AsyncClient]:
    listener = listen(ShimSettings(port=0))
    options = uvicorn_options(settings, Protocol)
    server = uvicorn.Server(uvicorn.Config(build_app(broker, settings), **options, log_config=None))
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.serve, [listener])
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
            yield client
        server.should_exit = True


@pytest.mark.parametrize(
    ("believed", "said", "name"),
    [
        ("", "192.0.2.7", "http:127.0.0.1"),
        ("", "a b;{}*[red]", "http:127.0.0.1"),
        ("127.0.0.1", "192.0.2.7", "http:192.0.2.7"),
        ("192.0.2.0/24, 2001:db8::1", "192.0.2.7", "http:127.0.0.1"),
        ("127.0.0.1", "a b;{}*[red]", None),
    ],
)
async def test_a_forwarded_address(broker: Broker, believed: str, said: str, name: str | None) -> None:
    async with shim(broker, ShimSettings(forwarded_allow_ips=believed)) as client:
        answer = await client.post("/register", json=TRAINER, headers={"X-Forwarded-For": said})
        names = [field.decode() for field in await broker.redis.hkeys(broker.keys.trainers)]
        assert (answer.status_code, [each for each in names if each.startswith("http:")]) == (
            (200, [name]) if name else (400, [])
        )


@pytest.mark.parametrize(
    ("client", "name"),
    [
        (("10.0.0.1", 1), "http:10.0.0.1"),
        (("::1", 1), "http:0000-0000-0000-0000-0000-0000-0000-0001"),
        (("2001:db8::5", 1), "http:2001-0db8-0000-0000-0000-0000-0000-0005"),
        (("fe80::1%eth0", 1), "http:fe80-0000-0000-0000-0000-0000-0000-0001"),
        (None, "http:local"),
    ],
)
def test_the_name_of_a_trainer_without_one(client: Any, name: str) -> None:
    found = consumer_of(Request({"type": "http", "headers": [], "client": client}))
    assert found == name
    check_name("consumer", found.removeprefix("http:"))


def test_no_other_address_becomes_a_name() -> None:
    for host in ("a b", "x\ny", "{A}", "é", "x" * 65, ""):
        with pytest.raises(ConfigurationError):
            consumer_of(Request({"type": "http", "headers": [], "client": (host, 1)}))
