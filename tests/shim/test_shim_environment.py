"""An unmodified atroposlib environment and a trainer of the Atropos API run a whole job, through a restart of the shim.

Once on the bare paths, which are open to everyone, and once in a run under `/runs/<run>` that demands tokens.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from tokenizers import Tokenizer, models
from trajectories import KEYS, TRAINER, number_of, shim_process, wait_until_up, with_token
from transformers import PreTrainedTokenizerFast

from lachesis.broker import EmbeddedRedis, connect_blocking
from lachesis.broker.audit import audit

STEPS, BATCH, SIZE, OFF_POLICY = 8, 8, 4, 2
PACK = BATCH // SIZE  # groups in a batch


@pytest.mark.parametrize("guarded", [False, True], ids=["open", "a run of its own, with tokens"])
def test_a_whole_job(shared_redis: EmbeddedRedis, run_name: str, tmp_path: Path, *, guarded: bool) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        listener.set_inheritable(True)
        fd, address = listener.fileno(), f"http://127.0.0.1:{listener.getsockname()[1]}"
        own, url, env_url = run_name, address, address
        if guarded:
            with connect_blocking(shared_redis.url, run_name) as blocking:
                create = blocking.broker.tokens.create
                tokens = [blocking.call(create, "trainer")[0], blocking.call(create, "environment")[0]]
            own = f"{run_name}-other"
            url, env_url = (f"{with_token(address, token)}/runs/{run_name}" for token in tokens)
        arguments = ("--redis-url", shared_redis.url, "--run", own, "--fd", str(fd))
        script = Path(__file__).with_name("canned_env.py")
        command = [sys.executable, script, env_url, tmp_path / "tokenizer", str(STEPS)]
        environment = subprocess.Popen(
            command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            with shim_process(tmp_path / "log", *arguments, inherit=(fd,)) as shim:
                wait_until_up(address, shim, tmp_path / "log")
                requests.post(
                    f"{url}/register", json={**TRAINER, "batch_size": BATCH, "max_token_len": 512}, timeout=10
                )
                first = train(url, environment, steps=STEPS // 2)
            with shim_process(tmp_path / "log", *arguments, inherit=(fd,)) as shim:
                rest = train(url, environment, steps=STEPS)
                out, errors = environment.communicate(timeout=30)
        finally:
            environment.kill()
            environment.wait()
    assert environment.returncode == 0, errors[-3000:]
    assert out.splitlines()[-1] == "sent by canned_0, id 0, checkpoints in /checkpoints"
    if guarded:
        assert tokens[1] not in out + errors
    if rest[:PACK] == first[-PACK:]:  # the shim was killed before it could note that this batch had arrived
        rest = rest[PACK:]
    trained = [*first, *rest]
    assert len(trained) == len(set(trained))
    assert len(trained) >= STEPS * PACK
    with connect_blocking(shared_redis.url, run_name) as blocking:
        report = blocking.call(audit, blocking.broker)
    assert report.findings == []
    assert report.trained >= len(trained) - PACK  # the last batch may not have been acknowledged


def train(url: str, environment: subprocess.Popen[str], steps: int) -> list[int]:
    """Ask for batches as atroposlib's example trainer does, until `steps` are done or the environment has ended."""
    numbers = []
    deadline = time.monotonic() + 60
    while environment.poll() is None:
        assert time.monotonic() < deadline
        status = requests.get(f"{url}/status", timeout=10).json()
        assert status["queue_size"] <= (OFF_POLICY + 1) * PACK
        batch = requests.get(f"{url}/batch", timeout=10).json()["batch"]
        if batch is None:
            time.sleep(0.05)
            continue
        assert sum(len(group["tokens"]) for group in batch) == BATCH
        assert all(set(group) == set(KEYS) and group["env_id"] == 0 for group in batch)
        numbers += [number_of(group) for group in batch]
        if status["current_step"] + 1 == steps and steps < STEPS:
            break
    return numbers
