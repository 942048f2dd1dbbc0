"""A TCP proxy before a Redis that can lose one reply: the server has executed the command, its client can't know."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class ReplyDropper:
    """`lose(word)` cuts a connection when the next command that contains `word` is answered, before the answer is out."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self._word = b""
        self.lost = 0
        self.url = ""

    def lose(self, word: str) -> None:
        self._word = word.encode()

    async def relay(self, requests: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        """One connection, for as long as it lasts."""
        try:
            replies, server = await asyncio.open_unix_connection(self._socket)
        except OSError:  # the server is down
            client.transport.abort()
            return
        doomed = False

        async def answer() -> None:
            with contextlib.suppress(ConnectionError):
                while data := await replies.read(1 << 16):
                    if doomed:
                        self.lost += 1
                        break
                    client.write(data)
                    await client.drain()
            client.transport.abort()

        answers = asyncio.create_task(answer())
        with contextlib.suppress(ConnectionError):  # cut, by us or by the client
            while data := await requests.read(1 << 20):
                if self._word and self._word in data:
                    self._word, doomed = b"", True
                server.write(data)
                await server.drain()
        server.close()
        await answers


@contextlib.asynccontextmanager
async def dropping_replies(socket: str) -> AsyncIterator[ReplyDropper]:
    """A proxy before the server behind that Unix socket."""
    dropper = ReplyDropper(socket)
    server = await asyncio.start_server(dropper.relay, "127.0.0.1", 0)
    dropper.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    yield dropper
    server.close()
