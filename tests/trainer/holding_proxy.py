"""A way to Redis that can fall silent: what either side sends then waits, as it does where packets are lost and sent again."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType

import anyio.from_thread


class HoldingProxy:
    """`with HoldingProxy(socket) as proxy:` relays `proxy.url` to the server behind a Unix socket, unless it is `cut`."""

    def __init__(self, socket: str) -> None:
        self._socket, self._open, self.url = socket, asyncio.Event(), ""
        self._open.set()

    def __enter__(self) -> HoldingProxy:
        self._portal_manager = anyio.from_thread.start_blocking_portal("asyncio")
        self._portal = self._portal_manager.__enter__()
        self._server = self._portal.call(asyncio.start_server, self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._portal.call(self._server.close)
        self._portal_manager.__exit__(kind, error, trace)

    def cut(self) -> None:
        self._portal.call(self._open.clear)

    def heal(self) -> None:
        self._portal.call(self._open.set)

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):  # cancelled when the portal ends
            server, to_server = await asyncio.open_unix_connection(self._socket)
            await asyncio.gather(self._pass_on(client, to_server), self._pass_on(server, to_client))

    async def _pass_on(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while piece := await source.read(1 << 20):
            await self._open.wait()
            target.write(piece)
            await target.drain()
        target.close()
