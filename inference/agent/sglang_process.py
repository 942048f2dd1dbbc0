"""One SGLang server: its process, and the calls that control it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import anyio

from lachesis.broker.errors import LachesisError
from lachesis.broker.store.child_process import die_with_parent

READY_POLL_S = 0.1
PAUSE_S = 60.0  # bound on pausing and continuing, which take milliseconds
LOG_BYTES = 16 << 20  # a longer log is put aside when the server starts


class ServerFailed(LachesisError, RuntimeError):
    """The server died, or answered an update in a way that leaves in doubt which weights it has."""


class _Refused(ServerFailed):
    """An answer other than 200."""

    def __init__(self, path: str, status: int, text: str) -> None:
        self.status = status
        super().__init__(f"SGLang answered {path} with {status}: {text}")


class SGLangServer:
    """`async with SGLangServer(…) as server:` starts the process; leaving ends it and all its children.

    SGLang saves nothing at its end, and on SIGTERM takes seconds to do what SIGKILL does at once; so, when no request
    runs any more, it gets SIGKILL.
    """

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], url: str, log: Path) -> None:
        self._argv, self._environment, self.url, self.log = argv, environment, url, log
        self._process: asyncio.subprocess.Process | None = None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> SGLangServer:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.old"))
        with open(self.log, "ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=dict(self._environment),
                preexec_fn=die_with_parent,
                start_new_session=True,  # its own process group: Ctrl-C spares it, and it can be killed as a whole
            )
        self._session = aiohttp.ClientSession(self.url, connector=aiohttp.TCPConnector(limit=0, force_close=True))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self._http.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            await self.process.wait()

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process is not None, "the server has not been started"
        return self._process

    @property
    def _http(self) -> aiohttp.ClientSession:
        assert self._session is not None, "the server has not been started"
        return self._session

    async def ended(self) -> str:
        """Wait for the process to end; returns how it did."""
        code = await self.process.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def last_lines(self, count: int = 10) -> list[str]:
        """The end of its log."""
        with open(self.log, "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 16_384))
            lines = log.read().decode(errors="replace").splitlines()
        return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines if line.strip()][-count:]

    async def start_model(self, options: Sequence[str], timeout_s: float) -> None:
        """Name the model to the waiting launcher and return when it is served. Raises ServerFailed after `timeout_s`."""
        stdin = self.process.stdin
        assert stdin is not None
        with contextlib.suppress(ConnectionError):  # it died; whoever waits for `ended` knows
            stdin.write(json.dumps(list(options)).encode() + b"\n")
            await stdin.drain()
            stdin.close()
        try:
            with anyio.fail_after(timeout_s):
                while not await self._is_ready():  # noqa: ASYNC110  it tells nobody when it is
                    await anyio.sleep(READY_POLL_S)
        except TimeoutError:
            raise ServerFailed(f"SGLang was not ready after {timeout_s:g} s; its log is {self.log}") from None

    async def _is_ready(self) -> bool:
        try:
            async with self._http.get("/ready", timeout=aiohttp.ClientTimeout(5)) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def pause(self, mode: str) -> None:
        """Hold all requests, which will be continued with the next weights.

        Running ones go back to the queue (`retract`: their cache is made anew) or stand still (`in_place`: it is kept).
        """
        await self._call("POST", "/pause_generation", {"mode": mode}, PAUSE_S)

    async def resume(self) -> None:
        await self._call("POST", "/continue_generation", {}, PAUSE_S)

    async def load(self, folder: Path, version: int, *, flush_cache: bool) -> None:
        """Replace the weights of a paused server. Raises ServerFailed unless it then says that it has this version.

        While requests stand still in place the cache can't be flushed. The caller bounds the time.
        """
        body = {"model_path": str(folder), "weight_version": str(version), "flush_cache": flush_cache}
        answer = await self._call("POST", "/update_weights_from_disk", body, None)
        if not answer.get("success"):
            raise ServerFailed(f"SGLang did not load version {version}: {answer.get('message')}")
        info = await self._call("GET", "/model_info", None, PAUSE_S)
        if (info.get("weight_version"), info.get("model_path")) != (str(version), str(folder)):
            raise ServerFailed(
                f"SGLang was given version {version} from {folder} and says that it has "
                f"{info.get('weight_version')} from {info.get('model_path')}"
            )

    async def checksum(self) -> str:
        """A hash of all weights as they are served, equal where the weights are equal; "" where SGLang has none.

        Its time is the device's to read the weights once.
        """
        try:
            answer = await self._call("POST", "/weights_checker", {"action": "checksum"}, None)
        except _Refused as refused:
            if refused.status == 404:  # older than SGLang 0.5.19
                return ""
            raise
        return str(answer["per_engine_checksum"])

    async def is_idle(self) -> bool:
        """Whether no request runs or waits; empties the cache if so.

        Only `/flush_cache` asks the scheduler itself. `/v1/loads` answers from a snapshot in which a request is missing
        while it is prefilled and for its first 15 tokens.
        """
        try:
            async with self._http.post("/flush_cache") as answer:
                if answer.status not in (200, 400):
                    raise _Refused("/flush_cache", answer.status, (await answer.text())[:300])
                return answer.status == 200
        except aiohttp.ClientError as error:
            raise ServerFailed(f"SGLang did not answer /flush_cache: {error}") from None

    async def _call(
        self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float | None
    ) -> dict[str, Any]:
        try:
            timeout = aiohttp.ClientTimeout(timeout_s)
            async with self._http.request(method, path, json=body, timeout=timeout) as answer:
                if answer.status != 200:
                    raise _Refused(path, answer.status, (await answer.text())[:300])
                content: dict[str, Any] = await answer.json()
                return content
        except TimeoutError:
            raise ServerFailed(f"SGLang did not answer {path} within {timeout_s} s") from None
        except aiohttp.ClientError as error:
            raise ServerFailed(f"SGLang did not answer {path}: {error}") from None
