"""atroposlib's own server and the shim, both started for real, and called alike."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from ports import free_port
from trajectories import TRAINER, shim_process, wait_until_up

BATCH = 8


class Both:
    """Calls both servers and demands the same status code and JSON of them."""

    def __init__(self, upstream: str, shim: str) -> None:
        each_its_own = httpx.Limits(max_keepalive_connections=0)  # upstream closes a connection after a 500
        self.upstream = httpx.Client(base_url=upstream, timeout=30, limits=each_its_own)
        self.shim = httpx.Client(base_url=shim, timeout=30)

    def each(self, method: str, path: str, **how: Any) -> tuple[httpx.Response, httpx.Response]:
        return self.upstream.request(method, path, **how), self.shim.request(method, path, **how)

    def same(self, method: str, path: str, **how: Any) -> Any:
        theirs, ours = self.each(method, path, **how)
        assert ours.status_code == theirs.status_code, (path, theirs.text, ours.text)
        assert ours.headers["content-type"] == theirs.headers["content-type"], path
        if "json" not in theirs.headers["content-type"]:
            assert ours.text == theirs.text
            return ours.text
        assert exactly(ours.json()) == exactly(theirs.json()), path
        return ours.json()

    def get(self, path: str, **how: Any) -> Any:
        return self.same("GET", path, **how)

    def post(self, path: str, body: object) -> Any:
        return self.same("POST", path, json=body)

    def register(self, **settings: Any) -> None:
        for answer in self.each("POST", "/register", json={**TRAINER, "batch_size": BATCH, **settings}):
            assert list(answer.json()) == ["uuid"]
            assert isinstance(answer.json()["uuid"], int)

    def batch(self) -> list[dict[str, Any]] | None:
        """Both servers' next batch; the order of groups within one is not part of the contract."""
        theirs, ours = (answer.json()["batch"] for answer in self.each("GET", "/batch"))
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert sorted(map(exactly, ours)) == sorted(map(exactly, theirs))
        return ours


def words(answer: httpx.Response, name: str) -> list[str] | None:
    """What a header lists, in order; `Vary` has none, and upstream's names `Origin` beside the rest."""
    value: str | None = answer.headers.get(name)
    if value is None:
        return None
    found = [word.strip() for word in value.split(",")]
    return sorted(set(found) - {"Origin"}) or None if name == "vary" else found


def exactly(value: object) -> str:
    """JSON in one spelling: equal where Python's == would also take 1, 1.0 and true for equal."""
    return json.dumps(value, sort_keys=True)


@contextlib.contextmanager
def side_by_side(redis_url: str, run: str, log: Path) -> Iterator[Both]:
    """Both servers, new and empty; gone at the end."""
    ports = free_port(), free_port()
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    run_api = Path(sys.executable).parent / "run-api"
    command = [str(run_api), "--host", "127.0.0.1", "--port", str(ports[0])]
    upstream = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with shim_process(log, "--redis-url", redis_url, "--run", run, "--port", str(ports[1])) as shim:
            wait_until_up(urls[0], upstream)
            wait_until_up(urls[1], shim, log)
            yield Both(*urls)
    finally:
        upstream.kill()
        upstream.wait()
