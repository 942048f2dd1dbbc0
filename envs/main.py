"""The process of one environment: waits for the shim, then runs Atropos' own rollout loop until told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from lachesis.broker.errors import ConfigurationError
from lachesis.broker.store.connection import hide_password
from lachesis.broker.weights.model_files import SERVED_TOKENIZER_FILES
from lachesis.envs.registry import entry
from lachesis.envs.settings import EnvSettings, split_token
from lachesis.envs.task import Task
from lachesis.service.http.urls import check_url
from lachesis.service.logs import configure_logging

SHIM_RETRY_S = 0.3
TO_SHIM_S = 5.0  # one attempt; a listening socket whose server is still starting lets it wait


def run(settings: EnvSettings) -> int:
    """Make rollouts until the run has enough, or until SIGTERM or SIGINT; returns 0.

    Raises ConfigurationError at once for an address that is none, and a model or problems that can't be had.
    """
    found = entry(settings.name)
    check_url("--shim-url", settings.shim_url)
    check_url("--front-door-url", settings.front_door_url)
    folder = _check_folder(settings.model)
    task = found.task(settings.data or None)
    log = configure_logging("env")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("WANDB_MODE", "disabled")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that it does without torch
    for number in (signal.SIGTERM, signal.SIGINT):  # until the event loop has its own way to stop
        signal.signal(number, _leave)
    # transformers imports torch wherever it finds it, which takes longer than all the rest; tokenizers do without
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    _check_tokenizer(folder, settings.name, task)
    env_class = found.env_class()  # takes seconds, while the shim may be starting
    for name in ("atroposlib", "httpx", "openai", "root"):  # atroposlib logs every request at DEBUG
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in list(logging.Logger.manager.loggerDict):
        if name.startswith("atroposlib"):
            logging.getLogger(name).setLevel(logging.WARNING)
    return asyncio.run(_serve(settings, env_class, log))


def _check_folder(model: str) -> str:
    if not model:
        raise ConfigurationError("which tokenizer? Give --model FOLDER, or the name of a model on the Hugging Face hub")
    folder = Path(model)
    if folder.is_dir() and not any((folder / name).is_file() for name in SERVED_TOKENIZER_FILES):
        raise ConfigurationError(
            f"--model = {model!r}: holds no tokenizer (none of {', '.join(SERVED_TOKENIZER_FILES)})"
        )
    if not folder.is_dir() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise ConfigurationError(f"--model = {model!r}: no such folder")
    return model


def _check_tokenizer(model: str, env: str, task: Task) -> None:
    """Raise ConfigurationError unless the environment will find the tokenizer that it needs."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # whatever keeps transformers from reading or fetching it
        said = " ".join(str(error).split())[:200]
        raise ConfigurationError(f"--model = {model!r}: its tokenizer can't be had: {said}") from error
    if task.chat and not tokenizer.chat_template:
        raise ConfigurationError(f"--model = {model!r}: its tokenizer has no chat template, which {env}'s prompts need")


def _leave(*_: object) -> None:
    raise SystemExit(0)


async def _serve(settings: EnvSettings, env_class: Any, log: Any) -> int:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    rollouts = asyncio.create_task(_rollouts(settings, env_class, log))
    stopped = asyncio.create_task(stopping.wait())
    await asyncio.wait({rollouts, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if rollouts.done():
        rollouts.result()
    log.info("stopped" if stopping.is_set() else "finished")
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    return 0


async def _rollouts(settings: EnvSettings, env_class: Any, log: Any) -> None:
    await _wait_for_shim(settings.shim_url.rstrip("/"), log)
    env = make_env(settings, env_class)
    shim = hide_password(settings.shim_url)
    log.info("making rollouts", env=settings.name, shim=shim, front_door=hide_password(settings.front_door_url))
    await env.env_manager()


async def _wait_for_shim(url: str, log: Any) -> None:
    told, began = False, time.monotonic()
    async with httpx.AsyncClient(timeout=TO_SHIM_S) as client:
        while True:
            try:
                answer = await client.get(f"{url}/")
                if answer.is_success:
                    return
                reason = f"{answer.status_code}: {answer.text[:500]}"
            except httpx.HTTPError as error:
                reason = str(error) or type(error).__name__
            if not told and time.monotonic() - began > 2.0:
                log.info("waiting for the shim", url=hide_password(url), reason=reason)
                told = True
            await asyncio.sleep(SHIM_RETRY_S)


def make_env(settings: EnvSettings, env_class: Any) -> Any:
    """The Atropos environment these settings describe."""
    config, (server,) = env_class.config_init()
    chosen = {
        "group_size": settings.group_size,
        "max_batches_offpolicy": settings.max_batches_offpolicy,
        "max_num_workers": settings.max_workers,
        "steps_per_eval": settings.steps_per_eval,
        "max_new_tokens": settings.max_new_tokens,
        "data": settings.data,
    }
    config = config.model_copy(
        update={
            "tokenizer_name": settings.model,
            "rollout_server_url": settings.shim_url.rstrip("/"),
            "seed": settings.seed,
            **{name: value for name, value in chosen.items() if value},  # what is not said is the recipe's
        }
    )
    workers = config.max_num_workers
    front_door, token = split_token(settings.front_door_url.rstrip("/"))
    server = server.model_copy(
        update={
            "model_name": settings.model,
            "base_url": f"{front_door}/v1",
            "api_key": token or server.api_key,
            "num_max_requests_at_once": 4 * workers,
            "num_requests_for_eval": workers,
        }
    )
    return env_class(config, [server])
