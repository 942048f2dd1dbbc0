"""Between a client and a server on Unix sockets: passes everything on, until it swallows a reply and hangs up.

The server has then done what it was told, and its client can't know.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path


class LossyProxy:
    """Drops the `rate`-th part of the server's replies, each together with its connection."""

    def __init__(self, server: Path, rate: float, rng: random.Random) -> None:
        self.dropped = 0
        self._server, self._rate, self._rng = server, rate, rng

    @contextlib.asynccontextmanager
    async def listening(self, path: Path) -> AsyncIterator[str]:
        """Yields the URL that clients connect to."""
        server = await asyncio.start_unix_server(self._serve, path)
        try:
            yield f"unix://{path}"
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):  # cancelled when the loop ends
            from_server, to_server = await asyncio.open_unix_connection(self._server)
            requests = asyncio.create_task(_pass_on(reader, to_server))
            try:
                while piece := await from_server.read(1 << 20):
                    if self._rng.random() < self._rate:
                        self.dropped += 1
                        break
                    if writer.is_closing():  # its client has given up
                        break
                    writer.write(piece)
                    await writer.drain()
            finally:
                requests.cancel()
                to_server.close()
        writer.close()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await reader.read(1 << 20):
            writer.write(piece)
            await writer.drain()
    writer.close()
