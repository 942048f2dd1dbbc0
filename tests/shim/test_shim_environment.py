"""Unmodified atroposlib environments and a trainer of the Atropos API run whole jobs, while shims die and come again."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from canned_env import KINDS, LENGTH, TURNS
from ports import free_port
from requests.adapters import HTTPAdapter
from tokenizers import Tokenizer, models
from trajectories import KEYS, TRAINER, number_of, shim_process, wait_until_up, with_token
from transformers import PreTrainedTokenizerFast
from urllib3.util import Retry
from warm import WarmProcess, WarmPython

from lachesis.broker import EmbeddedRedis, connect_blocking
from lachesis.broker.audit import audit

pytestmark = pytest.mark.slow

OFFLINE = {"HF_HUB_OFFLINE": "1"}
atropos = WarmPython("atroposlib.envs.base", "transformers.models.auto.tokenization_auto", env=OFFLINE)
STEPS, BATCH, SIZE, OFF_POLICY = 8, 8, 4, 2
WORKERS = 4  # rollouts of an environment at a time


@contextlib.contextmanager
def environment(kind: str, url: str, folder: Path) -> Iterator[WarmProcess]:
    """An environment's process; killed at the end if it still runs."""
    words = Tokenizer(models.WordLevel({"a": 0, **{str(number): number for number in range(1, 2000)}}, "a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "tokenizer")
    command = (Path(__file__).with_name("canned_env.py"), kind, url, folder / "tokenizer", str(STEPS))
    with open(folder / "env.log", "w") as errors:
        process = atropos.start(*command, env=os.environ | OFFLINE, stdout=subprocess.PIPE, stderr=errors)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def register(url: str) -> None:
    config = {**TRAINER, "batch_size": BATCH, "max_token_len": LENGTH + TURNS * 140}
    requests.post(f"{url}/register", json=config, timeout=10).raise_for_status()


def train(
    kind: str, url: str, env: WarmProcess, *, until: int, at: Callable[[int], None] = lambda _: None
) -> list[list[int]]:
    """Ask for batches as atroposlib's example trainer does, until so many steps are done or the environment has ended.

    `at` is called with each step. Returns the numbers of the groups of each batch.
    """
    trainer = requests.Session()  # asks again when a connection breaks, as that trainer does
    trainer.mount("http://", HTTPAdapter(max_retries=Retry(total=5, backoff_factor=0.2)))
    ahead = WORKERS * (TURNS if kind == "turns" else 1)  # groups that may be under way when an environment pauses
    batches = []
    deadline = time.monotonic() + 120
    while env.poll() is None:
        assert time.monotonic() < deadline
        status = trainer.get(f"{url}/status", timeout=10).json()
        assert status["queue_size"] <= OFF_POLICY * BATCH // SIZE + ahead
        batch = trainer.get(f"{url}/batch", timeout=10).json()["batch"]
        if batch is None:
            time.sleep(0.05)
            continue
        assert sum(len(group["tokens"]) for group in batch) == BATCH
        for group in batch:
            check(kind, group)
        batches.append([number_of(group) for group in batch])
        at(status["current_step"] + 1)
        if status["current_step"] + 1 == until and until < STEPS:
            break
    return batches


def check(kind: str, group: dict[str, Any]) -> None:
    """The group is as the environment made it."""
    assert set(group) == set(KEYS)
    assert group["env_id"] == 0
    for tokens, mask in zip(group["tokens"], group["masks"], strict=True):
        trained = [index for index, label in enumerate(mask) if label != -100]
        assert [mask[index] for index in trained] == [tokens[index] for index in trained]
        assert 0 not in trained
    if kind == "sampled":
        for row, mask in zip(group["inference_logprobs"], group["masks"], strict=True):
            assert len(row) == LENGTH + 1
            assert [value == 1.0 for value in row] == [label == -100 for label in mask]
            assert all(-1.0 <= value <= 0.0 for value in row[1:])
    elif kind == "turns":
        turn = number_of(group) % TURNS
        assert [row.count(-100) for row in group["masks"]] == [2 + 60 * (turn + 1)] * SIZE
        assert group["messages"][3] == [
            {"role": "user", "content": f"deal {turn}", "reward": None}, {"role": "assistant", "content": [3]}
        ]  # fmt: skip
        assert group["overrides"] == [{"set_advantage_to_zero": index == 0} for index in range(SIZE)]
        assert group["group_overrides"] == {"group_size": SIZE}
        assert group["inference_logprobs"] is None


def ended_well(
    kind: str, env: WarmProcess, folder: Path, batches: list[list[int]], kills: int, redis_url: str, run: str
) -> str:
    """The environment ended by itself and lost no group; no group was in two batches. Returns all that it said.

    A shim that is killed just after it sent a batch can't say that it did: that batch comes again.
    """
    out, _ = env.communicate(timeout=30)
    errors = (folder / "env.log").read_text()
    assert env.returncode == 0, errors[-3000:]
    assert "Failed to send" not in errors, errors[-3000:]
    assert out.splitlines()[-1] == f"sent by {kind}_0, id 0, checkpoints in /checkpoints"
    different = [batch for batch, before in zip(batches, [None, *batches], strict=False) if batch != before]
    assert len(batches) - len(different) <= kills
    trained = [number for batch in different for number in batch]
    assert len(trained) == len(set(trained))
    assert len(trained) >= STEPS * BATCH // SIZE
    with connect_blocking(redis_url, run) as blocking:
        report = blocking.call(audit, blocking.broker)
    assert report.findings == []
    assert report.trained >= len(trained) - BATCH // SIZE  # the last batch may not have been acknowledged
    return out + errors


@pytest.mark.parametrize(
    ("kind", "guarded"),
    [*((kind, False) for kind in KINDS), ("canned", True)],
    ids=[*KINDS, "canned, in a run of its own, with tokens"],
)
def test_a_whole_job_through_a_restart_behind_one_socket(
    shared_redis: EmbeddedRedis, run_name: str, tmp_path: Path, kind: str, *, guarded: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        listener.set_inheritable(True)
        fd, address = listener.fileno(), f"http://127.0.0.1:{listener.getsockname()[1]}"
        own, url, env_url, secret = run_name, address, address, "no token at all"
        if guarded:
            with connect_blocking(shared_redis.url, run_name) as blocking:
                create = blocking.broker.tokens.create
                tokens = [blocking.call(create, "trainer")[0], blocking.call(create, "environment")[0]]
            own, secret = f"{run_name}-other", tokens[1]
            url, env_url = (f"{with_token(address, token)}/runs/{run_name}" for token in tokens)
        arguments = ("--redis-url", shared_redis.url, "--run", own, "--fd", str(fd))
        with environment(kind, env_url, tmp_path) as env:
            with shim_process(tmp_path / "log", *arguments, inherit=(fd,)) as shim:  # and SIGKILL at the end of this
                wait_until_up(address, shim, tmp_path / "log")
                register(url)
                batches = train(kind, url, env, until=STEPS // 2)
            with shim_process(tmp_path / "log", *arguments, inherit=(fd,)):
                batches += train(kind, url, env, until=STEPS)
                assert secret not in ended_well(kind, env, tmp_path, batches, 1, shared_redis.url, run_name)


@pytest.mark.parametrize("kind", ["sampled", "turns"])
def test_a_whole_job_while_replicas_that_share_an_address_are_killed(
    shared_redis: EmbeddedRedis, run_name: str, tmp_path: Path, kind: str
) -> None:
    port = free_port()
    url, log = f"http://127.0.0.1:{port}", tmp_path / "log"
    arguments = ("--redis-url", shared_redis.url, "--run", run_name, "--port", str(port), "--reuse-port")
    with contextlib.ExitStack() as stack, environment(kind, url, tmp_path) as env:
        replicas = [stack.enter_context(shim_process(log, *arguments)) for _ in range(2)]
        while log.read_text().count("listening") < 2:
            assert [replica.poll() for replica in replicas] == [None, None], log.read_text()
            time.sleep(0.05)

        def kill_one(step: int) -> None:
            if step in (2, 4, 6):
                dead = replicas.pop(0)
                dead.kill()
                dead.wait()
                replicas.append(stack.enter_context(shim_process(log, *arguments)))
                while log.read_text().count("listening") < 2 + step // 2:  # the other one alone serves meanwhile
                    assert requests.get(f"{url}/healthz", timeout=10).ok
                    time.sleep(0.05)

        register(url)
        batches = train(kind, url, env, until=STEPS, at=kill_one)
        ended_well(kind, env, tmp_path, batches, 3, shared_redis.url, run_name)
    assert log.read_text().count("listening") == 5
