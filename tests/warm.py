"""Python processes without the wait for their imports: each is forked from a process that has imported them already.

    python = WarmPython("lachesis.cli.commands.audit")
    done = python.run("-m", "lachesis.cli.main", "audit", "--json")     # as subprocess.run([sys.executable, …])
    process = python.start("-m", "lachesis.cli.main", "shim")           # as subprocess.Popen([sys.executable, …])

A command started so is a process of its own, with its own arguments, folder, environment, output, signals and exit
status, and it ends as the interpreter ends. Only its imports were made before, in a process that does nothing else. What a
test says about a start itself (what is imported, how long it takes) needs a real one.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import IO

MESSAGE_BYTES, MAX_FDS = 1 << 20, 16
PATIENCE_S = 60.0
IMPORTS_S = 600.0  # of heavy modules, on a busy machine


class WarmPython:
    """Forks processes that have imported `modules`. Its own process starts with the first of them."""

    def __init__(self, *modules: str, env: Mapping[str, str] = MappingProxyType({})) -> None:
        self._modules, self._env = modules, env  # what the modules read while they are imported
        self._socket: socket.socket | None = None

    def run(
        self,
        *arguments: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = PATIENCE_S,
    ) -> subprocess.CompletedProcess[str]:
        """Run `python arguments…` to its end, its output as text."""
        process = self.start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd, env=env)
        try:
            out, err = process.communicate(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(["python", *map(str, arguments)], process.wait(), out, err)

    def start(
        self,
        *arguments: str | Path,
        stdout: IO[bytes] | IO[str] | int = subprocess.DEVNULL,
        stderr: IO[bytes] | IO[str] | int = subprocess.DEVNULL,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> WarmProcess:
        """Start `python arguments…`: a script's path, -m and a module, or -c and code. Text comes through pipes."""
        request = {
            "arguments": list(map(str, arguments)),
            "cwd": str(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
            "fds": list(pass_fds),
        }
        mine, theirs = socket.socketpair()
        with theirs, open(os.devnull, "r+b") as null:
            pipes: list[IO[str] | None] = []
            given: list[int] = []
            for file in (stdout, stderr):
                if file == subprocess.PIPE:
                    end, inherited = os.pipe()
                    pipes.append(os.fdopen(end, encoding="utf-8"))
                    given.append(inherited)
                else:
                    pipes.append(None)
                    given.append(os.dup(null.fileno() if isinstance(file, int) else file.fileno()))
            message = json.dumps(request).encode()
            socket.send_fds(self._connection(), [message], [*given, theirs.fileno(), *pass_fds])
            for descriptor in given:
                os.close(descriptor)
        return WarmProcess(mine, *pipes)

    def _connection(self) -> socket.socket:
        if self._socket is None:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                command = [sys.executable, __file__, str(theirs.fileno()), *self._modules]
                process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env={**os.environ, **self._env}
                )
            atexit.register(process.wait)
            atexit.register(self._socket.close)  # first: then it ends
        return self._socket


class WarmProcess:
    """One process; of `subprocess.Popen` what tests use."""

    def __init__(self, watched: socket.socket, stdout: IO[str] | None, stderr: IO[str] | None) -> None:
        self._watched = watched
        self.stdout, self.stderr = stdout, stderr
        self.returncode: int | None = None
        self._texts: tuple[str, str] | None = None
        self.pid = int(self._line(IMPORTS_S))

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, negative for a signal. Raises `subprocess.TimeoutExpired`."""
        if self.returncode is None:
            self.returncode = int(self._line(timeout))
            self._watched.close()
        return self.returncode

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def __enter__(self) -> WarmProcess:
        return self

    def __exit__(self, *_: object) -> None:
        """Close its pipes and wait for its end."""
        for pipe in (self.stdout, self.stderr):
            if pipe:
                pipe.close()
        self.wait()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that came through the pipes until its end."""
        if self._texts is None:
            self._texts = self._read(timeout)
        return self._texts

    def _read(self, timeout: float | None) -> tuple[str, str]:
        with ThreadPoolExecutor(2) as readers:
            texts = [readers.submit(pipe.read) if pipe else None for pipe in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()  # else its pipes stay open
                raise
            out, err = (text.result() if text else "" for text in texts)
        for pipe in (self.stdout, self.stderr):
            if pipe:
                pipe.close()
        return out, err

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def _line(self, timeout: float | None) -> bytes:
        with selectors.DefaultSelector() as selector:
            selector.register(self._watched, selectors.EVENT_READ)
            if not selector.select(timeout):
                raise subprocess.TimeoutExpired("python", timeout or 0)
        line = b""
        while not line.endswith(b"\n"):
            if not (byte := self._watched.recv(1)):
                raise ChildProcessError(
                    "the process that others are forked from has died: can its modules be imported?"
                )
            line += byte
        return line


# -- the process that others are forked from ----------------------------------------------------------------------


def serve(connection: socket.socket) -> None:
    """Fork a process for each request until the other end is closed. Each has a parent that waits for it alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the tests
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, MAX_FDS)
        if not message:
            return
        if os.fork() == 0:
            connection.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            watcher = descriptors.pop(2)
            pid = os.fork()
            if pid == 0:
                os.close(watcher)
                become(json.loads(message), *descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            os.write(watcher, b"%d\n" % pid)
            _, status = os.waitpid(pid, 0)
            os.write(watcher, b"%d\n" % os.waitstatus_to_exitcode(status))
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def become(request: dict[str, object], stdout: int, stderr: int, *inherited: int) -> None:
    """Run what was asked for, and end this process as the interpreter would."""
    environment, arguments, numbers = request["env"], request["arguments"], request["fds"]
    assert isinstance(environment, dict)
    assert isinstance(arguments, list)
    assert isinstance(numbers, list)
    spare = [os.dup2(descriptor, 100 + index) for index, descriptor in enumerate((stdout, stderr, *inherited))]
    for descriptor, number in zip(spare, (1, 2, *numbers), strict=True):
        os.dup2(descriptor, number)
    for descriptor in {stdout, stderr, *inherited, *spare} - {1, 2, *numbers}:
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(str(request["cwd"]))
    sys.path[0] = ""
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.modules.pop(arguments[1], None)
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "-c", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = arguments
            sys.path[0] = str(Path(arguments[0]).parent)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
    raise SystemExit(0)


if __name__ == "__main__":
    requests = socket.socket(fileno=int(sys.argv[1]))
    for name in sys.argv[2:]:
        import_module(name)
    serve(requests)
