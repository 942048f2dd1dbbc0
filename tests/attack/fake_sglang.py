"""Takes the place of the Python that has SGLang: serves the routes by which an agent rules a server, and no model.

`POST /generate` answers with the version; a prompt with the token DEADLY ends it with SIGKILL, as a bug in SGLang does.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

if __name__ != "__main__":  # it starts faster without
    import anyio

    from lachesis.broker import Broker
    from lachesis.inference.agent.agent import Agent
    from lachesis.inference.settings import AgentSettings
    from lachesis.service.logs import configure_logging

DEADLY = 66


def program(folder: Path) -> Path:
    """An executable that starts it, for --sglang-python."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fake-python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} "$@"\n')
    path.chmod(0o755)
    return path


def serves(pid: int) -> bool:
    """Whether the process is such a server."""
    return __file__.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()


@asynccontextmanager
async def agent(broker: Broker, folder: Path, server: str, **more: Any) -> AsyncIterator[asyncio.Task[None]]:
    """A whole agent in the test's process, whose SGLang is this file in one of its own."""
    settings = AgentSettings(
        server=server, run=broker.keys.run, state_dir=folder, sglang_python=str(program(folder)), device="cpu", **more
    )
    scope = anyio.CancelScope()

    async def run() -> None:
        with scope:
            await Agent(settings, broker, configure_logging("inference")).run()

    running = asyncio.create_task(run())
    try:
        yield running
    finally:
        scope.cancel()
        await running


def main() -> None:
    options = [*sys.argv[1:], *json.loads(sys.stdin.readline() or "[]")]
    told = dict(itertools.pairwise(options))
    info: dict[str, Any] = {"model_path": told.get("--model-path"), "weight_version": told.get("--weight-version")}

    async def respond(request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else {}
        if request.path == "/update_weights_from_disk":
            info.update(model_path=body["model_path"], weight_version=body["weight_version"])
        if request.path == "/generate":
            await asyncio.sleep(0.2)
            if DEADLY in body.get("input_ids", ()):
                print("deadly", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            tokens = [[-0.5, 7, None]]
            meta = {
                "finish_reason": {"type": "stop"},
                "output_token_logprobs": tokens,
                "weight_version": info["weight_version"],
            }
            return web.json_response({"text": "a", "output_ids": [7], "meta_info": meta})
        return web.json_response({**info, "success": True, "per_engine_checksum": "c"})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", respond)
    web.run_app(app, host=told["--host"], port=int(told["--port"]), print=None)


if __name__ == "__main__":
    main()
