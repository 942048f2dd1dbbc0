"""A network of the test's own: Redis and each replica in a namespace, around a router that can lose what passes it.

A cut loses packets, in both directions and without a word; nobody's connection is closed. Needs the right to make
network namespaces (`forbidden` says why not where it is missing), and iproute2.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

from lachesis.broker.store.embedded import find_server

CLONE_NEWNET = 0x40000000
PORT = 6379


def forbidden() -> str:
    """Why there can be no namespaces here; empty where there can."""
    if shutil.which("ip") is None:
        return "there is no iproute2"
    name = f"lachesis-{os.getpid()}-try"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        subprocess.run(["ip", "netns", "del", name], check=True)
    return done.stderr.strip()


def enter(name: str) -> None:
    """Move this process, before it has threads, and what it starts, to a namespace."""
    descriptor = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"can't enter network namespace {name}")
    finally:
        os.close(descriptor)


class Network:
    """`with Network("redis", "r0", …) as network:`; each name has an address of its own."""

    def __init__(self, *names: str) -> None:
        self._prefix = f"lachesis-{os.getpid()}"
        self._at = {name: number for number, name in enumerate(names, 1)}
        self._cut: set[tuple[str, str]] = set()

    def space(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def address(self, name: str) -> str:
        return f"10.213.{self._at[name]}.2"

    def __enter__(self) -> Network:
        _ip("netns", "add", self.space("router"))
        self._in("router", "sysctl", "-qw", "net.ipv4.ip_forward=1")
        for name, number in self._at.items():
            space, router = self.space(name), self.space("router")
            _ip("netns", "add", space)
            _ip("-n", router, "link", "add", f"to{number}", "type", "veth", "peer", "name", "up0", "netns", space)
            _ip("-n", router, "address", "add", f"10.213.{number}.1/24", "dev", f"to{number}")
            _ip("-n", router, "link", "set", f"to{number}", "up")
            _ip("-n", space, "address", "add", f"{self.address(name)}/24", "dev", "up0")
            _ip("-n", space, "link", "set", "up0", "up")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "route", "add", "default", "via", f"10.213.{number}.1")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in ("router", *self._at):
            subprocess.run(["ip", "netns", "del", self.space(name)], check=False)

    def cut(self, one: str, other: str) -> None:
        """The router loses what these send each other."""
        for source, target in ((one, other), (other, one)):
            self._cut.add((source, target))
            self._rule("add", source, target)

    def heal(self) -> None:
        for source, target in self._cut:
            self._rule("del", source, target)
        self._cut.clear()

    def server(self, folder: Path) -> str:
        """A Redis program that runs in the namespace `redis`."""
        script = folder / "redis-in-namespace"
        script.write_text(f'#!/bin/sh\nexec ip netns exec {self.space("redis")} {find_server()} "$@"\n')
        script.chmod(0o700)
        return str(script)

    def _rule(self, verb: str, source: str, target: str) -> None:
        pair = ("from", self.address(source), "to", self.address(target))
        _ip("-n", self.space("router"), "rule", verb, *pair, "blackhole")

    def _in(self, name: str, *command: str) -> None:
        _ip("netns", "exec", self.space(name), *command)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
