"""Bodies and servers for the shim's tests."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import httpx
import uvicorn
from commands import LACHESIS, python
from starlette.applications import Starlette
from warm import WarmProcess

from lachesis.service.http.connections import uvicorn_options
from lachesis.shim.http.delivery import Protocol
from lachesis.shim.main import listen
from lachesis.shim.settings import ShimSettings

TRAINER: dict[str, Any] = {
    "wandb_group": "group",
    "wandb_project": "project",
    "batch_size": 4,
    "max_token_len": 64,
    "checkpoint_dir": "/checkpoints",
    "save_checkpoint_interval": 10,
    "starting_step": 0,
    "num_steps": 100,
}
ENV: dict[str, Any] = {"max_token_length": 64, "desired_name": "sums", "weight": 1.0, "group_size": 2}
KEYS = (
    "tokens", "masks", "scores", "advantages", "ref_logprobs", "messages", "generation_params", "inference_logprobs",
    "group_overrides", "overrides", "images", "env_id", "distill_token_ids", "distill_logprobs",
)  # fmt: skip


def group(number: int, size: int = 2, *, length: int = 3, **more: Any) -> dict[str, Any]:
    """A group of `size` sequences of `length` tokens as an environment posts it; different for every `number`."""
    tokens = [[number, index, *range(length - 2)] for index in range(size)]
    masks = [[-100, *row[1:]] for row in tokens]
    return {"tokens": tokens, "masks": masks, "scores": [float(index) for index in range(size)], **more}


def number_of(group: dict[str, Any]) -> int:
    """The `number` a group was made with."""
    return int(group["tokens"][0][0])


def with_token(url: str, token: str, user: str = "x") -> str:
    """The URL that a client is given which can't set an Authorization header."""
    parts = urlsplit(url)
    return parts._replace(netloc=f"{user}:{token}@{parts.netloc}").geturl()


@contextlib.asynccontextmanager
async def serving(app: Starlette) -> AsyncIterator[str]:
    """The app behind a real socket, in this loop; yields its URL."""
    listener = listen(ShimSettings(port=0))
    server = uvicorn.Server(
        uvicorn.Config(app, **uvicorn_options(ShimSettings(), Protocol), log_config=None, timeout_graceful_shutdown=1)
    )
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.serve, [listener])
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True


@contextlib.contextmanager
def shim_process(log: Path, *arguments: str, inherit: tuple[int, ...] = ()) -> Iterator[WarmProcess]:
    """`lachesis shim` as its own process; killed at the end if it still runs."""
    with open(log, "ab") as output:
        process = python.start(
            *LACHESIS, "shim", *arguments, stdout=output, stderr=output, pass_fds=inherit, cwd=log.parent
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until_up(url: str, process: WarmProcess | subprocess.Popen[bytes], log: Path | None = None) -> None:
    """Return when the server at `url` answers; fail with its log when it has ended."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(url, timeout=1)
            return
        time.sleep(0.05)
    raise AssertionError(log.read_text() if log else f"nothing answers at {url}")
