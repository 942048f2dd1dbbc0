"""What do hostile posts and connections cost the others? `python benchmarks/hostile.py`.

Each bomb of tests/attack/bombs.py, and some at the edge of what is taken, is posted to a running shim while others ask
for a status, and post groups of their own, all the time. Then 1,100 connections that send nothing, and 200 that send a
byte at a time, stay beside them. Prints bytes sent, bytes inside, what was answered and after how long, the longest that
others waited, and what memory the shim and its workers took at most beyond what they had; writes
benchmarks/results/hostile.json. Ends with 1 where others waited longer than 100 ms, or a body took more than ten times
what is inside it (and more than the 64 MiB that any body may take).
"""

from __future__ import annotations

import gzip
import http.client
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import zstandard
from report import report
from rich.console import Console
from rich.table import Table
from servers import TRAINER, resident_kib, serving

from lachesis.broker import EmbeddedRedis
from lachesis.service.ports import find_free

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / "attack")]
from bombs import BOMBS, GZIP, MIB, PACKED, WHOLE, Bomb, filled  # noqa: E402

WAIT_MS = 100.0  # that others may wait
TIMES = 10  # a body's size in memory
ANY_BODY_MIB = 64  # that a body of any size may take
IDLE, SLOW = 1100, 200  # connections
CONNECTED_S = 25.0
console = Console(width=150)

LARGE_AND_FINE = {
    "a megabyte of numbers": Bomb("/scored_data", lambda: filled(b'{"masks":[[1]],"scores":[1],"tokens":[[', b"1", b"]]}", MIB - 100), GZIP, 422, ""),
    "ten megabytes of numbers": Bomb("/scored_data", lambda: filled(b'{"masks":[[1]],"scores":[1],"tokens":[[', b"1", b"]]}", 10 * MIB), GZIP, 422, ""),
    "just below the lists that are read apart": Bomb("/scored_data", lambda: filled(WHOLE + b',"images":[', b"[]", b"]}", 57_000), GZIP, 200, ""),
    "a megabyte of one text": Bomb("/scored_data", lambda: gzip.compress(WHOLE + b',"images":["' + b"x" * (MIB - 100) + b'"]}'), GZIP, 200, ""),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One attack: what was sent, how it was answered, and what others saw of it meanwhile."""

    attack: str
    sent: int
    inside: int
    answer: str
    took_s: float
    status_waited_ms: float
    post_waited_ms: float
    memory_mib: float | None = None

    def missed(self) -> list[str]:
        found = []
        if max(self.status_waited_ms, self.post_waited_ms) > WAIT_MS:
            found.append(f"{self.attack}: others waited longer than {WAIT_MS:g} ms")
        if self.memory_mib is not None and self.memory_mib > max(TIMES * self.inside / MIB, ANY_BODY_MIB):
            found.append(f"{self.attack}: more than {TIMES} times its size in memory")
        return found


class Others:
    """Two clients that never stop: one asks for a status, one posts groups. The longest wait of each since `forget`."""

    def __init__(self, port: int) -> None:
        self._port, self._over = port, threading.Event()
        self._posted = 0
        self.longest = [0.0, 0.0]
        self._threads = [threading.Thread(target=self._call, args=(who,)) for who in (0, 1)]
        for thread in self._threads:
            thread.start()

    def forget(self) -> None:
        self.longest = [0.0, 0.0]

    def _call(self, who: int) -> None:
        client = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        while not self._over.wait(0.01):
            began = time.perf_counter()
            if who == 0:
                client.request("GET", "/runs/others/status")
            else:
                self._posted += 1
                body = {"tokens": [[self._posted, 1, 2]], "masks": [[1, 1, 2]], "scores": [1.0]}
                client.request("POST", "/runs/others/scored_data", json.dumps(body))
            answer = client.getresponse()
            answer.read()
            if answer.status != 200:
                raise RuntimeError(f"others were answered {answer.status}")
            self.longest[who] = max(self.longest[who], (time.perf_counter() - began) * 1e3)

    def close(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def inside(bomb: Bomb, body: bytes) -> int:
    """Bytes once decompressed."""
    if bomb.headers is GZIP:
        unzip, count = zlib.decompressobj(31), 0
        while body:
            count += len(unzip.decompress(body, MIB))
            body = unzip.unconsumed_tail
        return count
    return len(zstandard.decompress(body)) if bomb.headers is PACKED else len(body)


def family(pid: int) -> list[int]:
    """The process and its workers."""
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


class Peak:
    """The most memory that a shim and its workers have together, looked at every few ms."""

    def __init__(self, pid: int) -> None:
        self._pid, self._over = pid, threading.Event()
        self.most = self.first = self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _now(self) -> int:
        found = 0
        for pid in family(self._pid):
            try:
                found += resident_kib(pid)
            except (OSError, LookupError):
                continue  # it has ended
        return found

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.most = max(self.most, self._now())

    def mib(self) -> float:
        self._over.set()
        self._thread.join()
        return (self.most - self.first) / 1024


def post(port: int, path: str, body: bytes, headers: dict[str, str]) -> str:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=240)
    client.request("POST", path, body, headers)
    answer = client.getresponse()
    answer.read()
    client.close()
    return str(answer.status)


def fresh_reader(port: int, pid: int) -> None:
    """Have a reader that has read nothing but a small group: what others left in its memory hides what a body takes."""
    for reader in family(pid)[1:]:
        os.kill(reader, signal.SIGKILL)
    post(port, "/scored_data", WHOLE + b" " * 2 * MIB + b"}", {})


def attack(name: str, bomb: Bomb, port: int, pid: int, others: Others) -> Row:
    body = bomb.body()
    size = inside(bomb, body)
    fresh_reader(port, pid)
    time.sleep(0.5)
    others.forget()
    peak, began = Peak(pid), time.perf_counter()
    answer = post(port, bomb.path, body, bomb.headers)
    took = time.perf_counter() - began
    time.sleep(0.2)  # others who were held by it are answered
    status_waited, post_waited = others.longest
    return Row(name, len(body), size, answer, took, status_waited, post_waited, peak.mib())


def is_closed(sock: socket.socket) -> bool:
    """Whether the other side has closed it, whatever it sent before."""
    try:
        while sock.recv(1 << 16, socket.MSG_DONTWAIT):
            continue
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def connections(name: str, count: int, first: bytes, later: bytes, port: int, others: Others) -> Row:
    """So many connections that send `first` at once and `later` every second."""
    others.forget()
    began, sent, ended = time.perf_counter(), 0, 0
    with ExitStack() as held:
        socks = [held.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(count)]
        for sock in socks:
            sock.sendall(first)
            sent += len(first)
        while time.perf_counter() - began < CONNECTED_S:
            time.sleep(1)
            for sock in list(socks):
                if is_closed(sock):
                    socks.remove(sock)
                    ended += 1
                elif later:
                    with suppress(OSError):  # it is closed now, which the next look tells
                        sent += sock.send(later)
        took = time.perf_counter() - began
    return Row(name, sent, sent, f"{ended} closed meanwhile", took, *others.longest)


def main() -> int:
    attacks: dict[str, Callable[[], Row]] = {}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, port = Path(name), find_free("127.0.0.1")
        redis = stack.enter_context(EmbeddedRedis(folder / "redis"))
        command = [sys.executable, "-m", "lachesis.cli.main", "shim", "--redis-url", redis.url, "--port", str(port)]
        command += ["--max-body-bytes", str(128 * MIB)]
        pid = stack.enter_context(serving(command, port, folder / "log"))
        for run in ("default", "others"):
            post(port, f"/runs/{run}/register", json.dumps(TRAINER).encode(), {})
        others = Others(port)
        stack.callback(others.close)
        time.sleep(2)
        attacks |= {"nothing": lambda: connections("nothing, for comparison", 0, b"", b"", port, others)}
        for title, bomb in {**LARGE_AND_FINE, **BOMBS}.items():
            attacks[title] = lambda title=title, bomb=bomb: attack(title, bomb, port, pid, others)  # type: ignore[misc]
        half = b"POST /scored_data HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
        attacks["idle"] = lambda: connections(f"{IDLE} idle connections", IDLE, b"", b"", port, others)
        attacks["slow"] = lambda: connections(f"{SLOW} slow bodies", SLOW, half, b" ", port, others)
        for measure in attacks.values():
            rows.append(measure())
            console.print(
                f"  {rows[-1].attack}: others waited {max(rows[-1].status_waited_ms, rows[-1].post_waited_ms):.0f} ms"
            )
    console.print(table(rows))
    return report("hostile", rows, [line for row in rows for line in row.missed()], console, quick=False)


def table(rows: list[Row]) -> Table:
    titles = (
        "attack",
        "sent, bytes",
        "inside",
        "answer",
        "after, s",
        "a status waited, ms",
        "a post waited, ms",
        "memory, MiB",
    )
    shown = Table(*titles)
    for row in rows:
        memory = "" if row.memory_mib is None else f"{row.memory_mib:.0f}"
        waited = (f"{row.status_waited_ms:.0f}", f"{row.post_waited_ms:.0f}")
        shown.add_row(row.attack, f"{row.sent:,}", f"{row.inside:,}", row.answer, f"{row.took_s:.2f}", *waited, memory)
    return shown


if __name__ == "__main__":
    sys.exit(main())
