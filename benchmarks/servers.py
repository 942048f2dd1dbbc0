"""The two servers that benchmarks/shim.py compares, what it sends them, and how it measures them."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lachesis.service.ports import find_free

SEQUENCES, LENGTH, PROMPT = 8, 2048, 512  # of a group; tokens
VOCABULARY = 128_000
BATCH = 256  # sequences
TRAINER = {
    "wandb_group": "bench", "wandb_project": "bench", "batch_size": BATCH, "max_token_len": 4096, "checkpoint_dir": "/c",
    "save_checkpoint_interval": 1, "starting_step": 0, "num_steps": 1000,
}  # fmt: skip
ENV = {"max_token_length": 4096, "desired_name": "bench", "weight": 1.0, "group_size": SEQUENCES}


def group(number: int) -> bytes:
    """The JSON of one group as an environment posts it: ids spread as words are, one prompt, log-probs of a float32 model."""
    rng = np.random.default_rng(number)
    ids = np.random.default_rng(0).permutation(VOCABULARY)

    def words(count: int) -> list[int]:
        found: list[int] = ids[np.minimum(rng.zipf(1.2, count), VOCABULARY - 1)].tolist()
        return found

    prompt = words(PROMPT)
    tokens = [prompt + words(LENGTH - PROMPT) for _ in range(SEQUENCES)]
    log_probs = -rng.exponential(0.5, (SEQUENCES, LENGTH - PROMPT)).astype("f4")
    posted: dict[str, Any] = {
        "tokens": tokens,
        "masks": [[-100] * PROMPT + row[PROMPT:] for row in tokens],
        "scores": rng.integers(0, 2, SEQUENCES).astype(float).tolist(),
        "inference_logprobs": [[1.0] * PROMPT + row for row in log_probs.astype(float).tolist()],
        "env_id": 0,
    }
    absent = ("advantages", "ref_logprobs", "messages", "generation_params", "group_overrides", "overrides", "images")
    return json.dumps({**posted, **dict.fromkeys(absent)}).encode()


def numbered(body: bytes, number: int) -> bytes:
    """The same group as another post: with a key that servers ignore."""
    return body[:-1] + f', "number": {number}}}'.encode()


def small_groups(count: int) -> bytes:
    """A list of tiny groups, all different."""
    rows = [[[n, index, 1, 2] for index in range(SEQUENCES)] for n in range(count)]
    return json.dumps(
        [{"tokens": row, "masks": row, "scores": [0.0] * SEQUENCES, "env_id": 0} for row in rows]
    ).encode()


def cpu_ms(pid: int) -> float:
    """CPU time of a process, all its threads: Linux's clock of that process (clock_getcpuclockid)."""
    return time.clock_gettime_ns(~pid << 3 | 2) / 1e6


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def resident_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    raise LookupError(f"process {pid} has no VmRSS: it has ended")


class Server:
    """A running Trajectory API."""

    def __init__(self, pid: int, port: int) -> None:
        self.pid, self.port = pid, port
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def call(self, method: str, path: str, body: bytes | None = None, **headers: str) -> bytes:
        """The body of a 200 answer; SystemExit for any other. Header names are written with _ for -."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        for fresh in (False, True):
            try:
                self._connection.request(method, path, body, {"Content-Type": "application/json", **named})
                response = self._connection.getresponse()
                break
            except (BrokenPipeError, ConnectionResetError, http.client.RemoteDisconnected):
                self._connection.close()  # an idle connection was closed
                if fresh:
                    raise
        answer = response.read()
        if response.status != 200:
            sys.exit(f"{method} {path}: {response.status} {answer[:500]!r}")
        return answer

    def reset(self) -> None:
        """Forget everything, register trainer and environment anew."""
        self.call("GET", "/reset_data")
        self.call("POST", "/register", json.dumps(TRAINER).encode())
        self.call("GET", "/batch")
        self.call("POST", "/register-env", json.dumps(ENV).encode())


def upstream(folder: Path) -> Any:
    """atroposlib's own server, as its users run it."""
    command = [str(Path(sys.executable).with_name("run-api")), "--host", "127.0.0.1"]
    return _serving(command, folder / "upstream.log")


def lachesis(folder: Path, redis_url: str) -> Any:
    command = [sys.executable, "-m", "lachesis.cli.main", "shim", "--redis-url", redis_url]
    return _serving(command, folder / "lachesis.log")


@contextmanager
def _serving(command: list[str], log: Path) -> Iterator[Server]:
    port = find_free("127.0.0.1")
    with serving([*command, "--port", str(port)], port, log) as pid:
        server = Server(pid, port)
        server.call("POST", "/register", json.dumps(TRAINER).encode())
        server.reset()
        yield server


@contextmanager
def serving(command: list[str], port: int, log: Path) -> Iterator[int]:
    """Process id of a server, once it listens."""
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        else:
            sys.exit(f"{' '.join(command)} does not serve:\n{log.read_text()}")
        yield process.pid
    finally:
        process.kill()
        process.wait()
