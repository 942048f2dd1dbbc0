"""A web page in a developer's browser, against the shim and the front door on that machine.

The headers are those that Chromium 156 sent from a page of http://evil.example, by every way that a page has.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import anyio.to_thread
import httpx
import pytest
import requests
import yaml
from doors import Upstream, answers, door
from trajectories import ENV, TRAINER, group, serving

from lachesis.broker import Broker, ConfigurationError
from lachesis.cli.options import parse
from lachesis.inference.settings import FrontDoorSettings
from lachesis.service.http.settings import CallerSettings
from lachesis.shim.app import build_app
from lachesis.shim.settings import ShimSettings

pytestmark = pytest.mark.anyio

EVIL = "http://evil.example:4000"
BROWSER = {
    "User-Agent": "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/156.0.0.0 Safari/537.36"
}
PAGES = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"}
IMAGES = {"Accept": "image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8"}
ANY = {"Accept": "*/*"}


def sec(site: str, mode: str, dest: str) -> dict[str, str]:
    return {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": dest}


POSTED = {**ANY, **BROWSER, "Origin": EVIL, "Content-Type": "text/plain;charset=UTF-8"}
POSTS = {
    "fetch without a preflight": {**POSTED, **sec("cross-site", "no-cors", "empty"), "Referer": f"{EVIL}/"},
    "a beacon from another port": {**POSTED, **sec("same-site", "no-cors", "empty"), "Origin": "http://localhost:3000"},
    "a form": {**POSTED, **PAGES, **sec("cross-site", "navigate", "iframe"), "Content-Type": "text/plain"},
    "a form of a sandboxed frame": {**POSTED, **PAGES, **sec("cross-site", "navigate", "document"), "Origin": "null"},
    "a browser without Sec-Fetch": POSTED,
    "one without Origin either": {**BROWSER, **PAGES, "Content-Type": "application/x-www-form-urlencoded"},
    "after DNS rebinding": {**POSTED, **sec("same-origin", "cors", "empty"), "Host": "evil.example:4000"},
}
GETS = {
    "fetch without CORS or referrer": {**ANY, **BROWSER, **sec("cross-site", "no-cors", "empty")},
    "fetch with CORS": {**ANY, **BROWSER, **sec("cross-site", "cors", "empty"), "Origin": EVIL},
    "an image": {**IMAGES, **BROWSER, **sec("cross-site", "no-cors", "image")},
    "a frame": {**PAGES, **BROWSER, **sec("cross-site", "navigate", "iframe"), "Referer": f"{EVIL}/"},
    "a link": {**PAGES, **BROWSER, **sec("cross-site", "navigate", "document")},
    "a page on another port": {**IMAGES, **BROWSER, **sec("same-site", "no-cors", "image")},
    "a redirect from an address that was typed": {**PAGES, **BROWSER, **sec("none", "navigate", "document")},
    "fetch to plain HTTP in the local network": {**ANY, **BROWSER},
    "an image there": {**IMAGES, "Referer": f"{EVIL}/"},
    "a link there": PAGES,
    "after DNS rebinding": {**ANY, **BROWSER, "Host": "evil.example"},
}
HOSTS = (
    "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example.", "evil",
    "localhost:8000@evil.example", "evil.example:80:80", "[::1].evil.example", "[evil.example]", "evil.example/",
    "localhost evil.example", "LOCALHOST.EVIL.EXAMPLE", "evil.localhost.example", "0x7f.1", "127.1.evil",
)  # fmt: skip


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    text: str


def send(url: str, method: str, path: str, headers: dict[str, str], body: Any = None) -> Answer:
    """Exactly these headers, less Content-Length and, where none is given, a Host."""
    parts = urlsplit(url)
    assert parts.hostname
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    connection.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
    content = b"" if body is None else json.dumps(body).encode()
    for name, value in {**headers, "Content-Length": str(len(content))}.items():
        connection.putheader(name, value)
    connection.endheaders(content)
    answer = connection.getresponse()
    told = {name.lower(): value for name, value in answer.getheaders()}
    return Answer(answer.status, told, answer.read().decode())


async def sent(url: str, method: str, path: str, headers: dict[str, str], body: Any = None) -> Answer:
    return await anyio.to_thread.run_sync(send, url, method, path, headers, body)


@pytest.fixture(params=["open", "closed"])
async def shim(broker: Broker, request: pytest.FixtureRequest) -> AsyncIterator[tuple[str, dict[str, str]]]:
    """Its URL, and what a browser would send along that remembers a token."""
    remembered = {}
    if request.param == "closed":
        token, _ = await broker.tokens.create("admin")
        remembered = {"Authorization": f"Bearer {token}"}
    async with serving(build_app(broker, ShimSettings())) as url:
        registered = await sent(url, "POST", "/register", remembered, TRAINER)
        assert registered.status == 200
        assert (await sent(url, "POST", "/scored_data", remembered, group(1, 4))).text == '{"status":"received"}'
        yield url, remembered


async def test_no_page_changes_anything(shim: tuple[str, dict[str, str]], broker: Broker) -> None:
    url, remembered = shim
    for path, body in (
        ("/scored_data", group(2)), ("/scored_data_list", [group(3)]), ("/register", {**TRAINER, "batch_size": 2}),
        ("/register-env", ENV), ("/disconnect-env", {"env_id": 0}), (f"/runs/{broker.keys.run}/scored_data", group(4)),
    ):  # fmt: skip
        for way, headers in POSTS.items():
            answer = await sent(url, "POST", path, {**headers, **remembered}, body)
            assert answer.status == (421 if "rebinding" in way else 403), (path, way, answer.text)
            assert "access-control-allow-origin" not in answer.headers
    for path in ("/batch", "/reset_data", f"/runs/{broker.keys.run}/batch", "/trainers/t/batch"):
        for way, headers in GETS.items():
            answer = await sent(url, "GET", path, {**headers, **remembered})
            assert answer.status == (421 if "rebinding" in way else 403), (path, way, answer.text)
    status = await broker.queue.status()
    assert (status.accepted, status.groups, status.formed) == (1, 1, 0)
    assert await broker.registry.envs() == []


async def test_no_page_reads_anything(shim: tuple[str, dict[str, str]]) -> None:
    """What has no trace of its page a browser keeps from it, since no answer says that any origin may read it."""
    url, remembered = shim
    for path in ("/status", "/latest_example", "/info", "/healthz", "/runs", "/", "/openapi.json"):
        for headers in GETS.values():
            answer = await sent(url, "GET", path, {**headers, **remembered})
            assert "access-control-allow-origin" not in answer.headers
            tells = headers.get("Sec-Fetch-Site", "none") != "none" or "Origin" in headers or "Host" in headers
            assert answer.status in ((403, 421) if tells else (200,)), (path, headers, answer.text)
        preflight = {"Origin": EVIL, "Access-Control-Request-Method": "POST"}
        assert (await sent(url, "OPTIONS", path, {**preflight, **sec("cross-site", "cors", "empty")})).status == 403


async def test_only_our_own_names_are_answered(broker: Broker) -> None:
    async with serving(build_app(broker, ShimSettings(host="gpu-1", allowed_host=["shim,*.lab.example"]))) as url:
        for host in HOSTS:
            answer = await sent(url, "GET", "/status", {"Host": host})
            assert answer.status in (400, 421), (host, answer.text)
        assert "--allowed-host" in (await sent(url, "GET", "/status", {"Host": "evil.example"})).text
        for host in (
            "localhost", "LocalHost:8000", "localhost.", "app.localhost:1", "127.0.0.1", "10.1.2.3:8000", "[::1]:8000", "[fe80::1%25eth0]",
            "shim:8000", "a.lab.example", "b.a.lab.example:80", "gpu-1", socket.gethostname(), "",
        ):  # fmt: skip
            assert (await sent(url, "GET", "/status", {"Host": host})).status == 200, host
        assert (await sent(url, "GET", "/status", {"Host": "lab.example"})).status == 421
    async with serving(build_app(broker, ShimSettings(allowed_host="*"))) as url:
        assert (await sent(url, "GET", "/status", {"Host": "evil.example"})).status == 200


async def test_pages_of_an_allowed_origin_may_call(broker: Broker) -> None:
    dashboard = "https://dashboard.example"
    async with serving(build_app(broker, ShimSettings(allow_origin=[f"{dashboard},{EVIL}"]))) as url:
        page = {**BROWSER, **sec("cross-site", "cors", "empty"), "Origin": dashboard}
        answer = await sent(url, "POST", "/scored_data", page, group(1))
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, dashboard)
        assert "access-control-allow-credentials" not in answer.headers  # what it sends, it says itself
        asks = {**page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        preflight = await sent(url, "OPTIONS", "/scored_data", asks)
        assert (preflight.status, preflight.headers["access-control-allow-origin"]) == (200, dashboard)
        for other in ("https://dashboard.example.evil.example", "http://dashboard.example", "null", f"{dashboard}:444"):
            assert (await sent(url, "GET", "/status", {**page, "Origin": other})).status == 403, other
        image = {**BROWSER, **IMAGES, **sec("cross-site", "no-cors", "image"), "Referer": f"{dashboard}/"}
        assert (await sent(url, "GET", "/reset_data", image)).status == 403  # whose it is can't be seen
        # our own pages, and whoever types an address
        own = {**BROWSER, **sec("same-origin", "cors", "empty")}
        assert (await sent(url, "GET", "/batch", own)).status == 200
        assert (await sent(url, "POST", "/scored_data", {**BROWSER, "Origin": url}, group(2))).status == 200
        assert (await sent(url, "GET", "/status", GETS["a redirect from an address that was typed"])).status == 200


async def test_the_front_door_is_as_closed(broker: Broker) -> None:
    body = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 2}}
    async with Upstream(broker, "s", answers).running() as server, door(broker) as client:
        url = str(client._base_url)
        for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
            for way, headers in POSTS.items():
                answer = await sent(url, "POST", path, headers, body)
                assert answer.status == (421 if "rebinding" in way else 403), (path, way)
                assert json.loads(answer.text)["error"]["code"] == answer.status
                assert "access-control-allow-origin" not in answer.headers
        assert server.bodies == []
        assert (await sent(url, "GET", "/v1/models", GETS["fetch with CORS"])).status == 403
        assert (await sent(url, "POST", "/generate", {}, body)).status == 200
    async with Upstream(broker, "s", answers).running(), door(broker, allow_origin=EVIL) as client:
        answer = await sent(str(client._base_url), "POST", "/generate", POSTS["fetch without a preflight"], body)
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, EVIL)


async def test_programs_are_not_taken_for_browsers(broker: Broker) -> None:
    """The libraries of unmodified environments and trainers, curl, and Node, which calls its requests fetch."""
    async with serving(build_app(broker, ShimSettings())) as url:
        for base in (url, url.replace("127.0.0.1", "localhost"), f"{url}/runs/{broker.keys.run}"):
            call = anyio.to_thread.run_sync
            assert (await call(partial(requests.post, f"{base}/register", json=TRAINER))).status_code == 200
            assert (await call(requests.get, f"{base}/batch")).status_code == 200
            async with aiohttp.ClientSession() as session:
                async with session.post(f"{base}/register-env", json=ENV) as answer:
                    assert answer.status == 200
                async with session.get(f"{base}/status-env", json={"env_id": 0}) as answer:
                    assert answer.status == 200
                async with session.post(f"{base}/scored_data", json=group(1)) as answer:
                    assert answer.status == 200
            async with httpx.AsyncClient() as client:
                assert (await client.post(f"{base}/scored_data", json=group(2))).status_code == 200
            assert (await call(requests.get, f"{base}/reset_data")).status_code == 200
        node = {"User-Agent": "node", "Accept": "*/*", "Accept-Language": "*", "Sec-Fetch-Mode": "cors"}
        assert (await sent(url, "POST", "/scored_data", node, group(3))).status == 200
        assert (await sent(url, "GET", "/batch", node)).status == 200
        assert (await sent(url, "GET", "/reset_data", {"User-Agent": "curl/8.5.0", **ANY})).status == 200
        reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
        writer.write(b"GET /batch HTTP/1.0\r\n\r\n")  # no header at all
        assert b" 200 " in await reader.readline()
        writer.close()


def test_origins_and_hosts_are_checked_when_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given = parse(
        ShimSettings, "shim", ["--allow-origin", "http://A.example,https://b:8443", "--allow-origin", "app://c"]
    )
    assert given.allow_origin == ["http://a.example", "https://b:8443", "app://c"]
    monkeypatch.setenv("LACHESIS_ALLOWED_HOST", "shim, *.lab.example")
    assert parse(FrontDoorSettings, "front-door", []).allowed_host == ["shim", "*.lab.example"]
    for option, values in {
        "--allow-origin": ("*", "null", "dashboard", "http://a/", "http://a/page", "http://*.a", "http://u@a"),
        "--allowed-host": ("http://a", "a:80", "a/", "*a", "a.*", "a b"),
    }.items():
        for value in values:
            with pytest.raises(ConfigurationError, match=option):
                parse(ShimSettings, "shim", [option, value])


def test_compose_serves_its_own_services() -> None:
    services = yaml.safe_load((Path(__file__).parents[2] / "compose.yaml").read_text())["services"]
    kinds: dict[str, type[CallerSettings]] = {"shim": ShimSettings, "front-door": FrontDoorSettings}
    for name, kind in kinds.items():
        command, *options = services[name]["command"].split()
        settings = parse(kind, command, options)
        assert name in settings.allowed_host
        assert settings.open_runs
