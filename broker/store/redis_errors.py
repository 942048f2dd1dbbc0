"""What Redis's errors mean, read in one place: which pass by themselves, and which need another connection or a person.

A living server that refuses a command for the moment is no failure of the caller: posts wait, as they do for room, and
other calls are made again for a while (connection.py). What is none of these is a mistake of ours, and stays an error.
"""

from __future__ import annotations

import re
from enum import Enum

from redis import exceptions


class Trouble(Enum):
    """Kinds of trouble with Redis; the value is what `/healthz` calls it."""

    LOST = "no redis"  # no connection, or no reply
    DEMOTED = "redis demoted"  # no master (any more): another connection may lead to the one that is
    UNREADY = "redis unready"  # refuses for now, and knows why
    FULL = "redis full"  # of memory: what frees some is let through
    FORBIDDEN = "redis forbids"  # until a person changes its users


# by the first word of an error reply
_CODES = {
    "BUSY": (Trouble.UNREADY, "a slow script keeps it busy"),
    "LOADING": (Trouble.UNREADY, "it is loading its data"),
    "NOREPLICAS": (Trouble.UNREADY, "fewer replicas follow it than min-replicas-to-write asks for"),
    "MISCONF": (Trouble.UNREADY, "it can't write its files: is its disk full?"),
    "CLUSTERDOWN": (Trouble.UNREADY, "its cluster is down"),
    "TRYAGAIN": (Trouble.UNREADY, "its cluster is moving keys"),
    "ASK": (Trouble.UNREADY, "its cluster is moving keys"),
    "READONLY": (Trouble.DEMOTED, "it is a replica"),
    "MASTERDOWN": (Trouble.DEMOTED, "it is a replica that has lost its master"),
    "UNBLOCKED": (Trouble.DEMOTED, "it has become a replica"),
    "MOVED": (Trouble.DEMOTED, "another node of its cluster serves this run"),
    "OOM": (Trouble.FULL, "its memory is full"),
    "NOPERM": (Trouble.FORBIDDEN, "its user may not do this (docs/security.md lists what each role needs)"),
    "NOAUTH": (Trouble.FORBIDDEN, "it wants a password"),
    "WRONGPASS": (Trouble.FORBIDDEN, "it doesn't know this user and password"),
}

# redis-py takes the first word away where it has a class for it
_CLASSES: dict[type[Exception], str] = {
    exceptions.BusyLoadingError: "LOADING",
    exceptions.MasterDownError: "MASTERDOWN",
    exceptions.ClusterDownError: "CLUSTERDOWN",
    exceptions.TryAgainError: "TRYAGAIN",
    exceptions.MovedError: "MOVED",
    exceptions.AskError: "ASK",
    exceptions.ReadOnlyError: "READONLY",
    exceptions.OutOfMemoryError: "OOM",
    exceptions.NoPermissionError: "NOPERM",
    exceptions.AuthenticationError: "WRONGPASS",
}
_IN_SCRIPT = re.compile(r"ACL failure in script|The user executing the script can't")  # in the place of NOPERM
_IN_PIPELINE = re.compile(r"Command # \d+ .* of pipeline caused error: [(\"']*", re.DOTALL)


def trouble(error: BaseException | None) -> Trouble | None:
    """Which kind of trouble an error of redis-py or of its socket tells of; None if it is of no such kind."""
    if code := _code(error):
        return _CODES[code][0]
    if isinstance(error, exceptions.ConnectionError | exceptions.TimeoutError):
        return trouble(error.__cause__) or Trouble.LOST  # a refused handshake is reported as a lost connection
    return Trouble.LOST if isinstance(error, OSError) else None


def describe(error: BaseException) -> str:
    """What is wrong with Redis, in one line."""
    said = " ".join(str(error).split()).removesuffix(".") or type(error).__name__
    if code := _code(error) or _code(error.__cause__):
        kind, why = _CODES[code]
        does = {Trouble.FULL: "is full", Trouble.DEMOTED: "is not the master"}.get(kind, "refuses commands")
        return f"Redis {does}: {why} ({said})"
    if trouble(error) is Trouble.LOST:
        return f"Redis does not answer: {said}"
    return f"Redis reports an error: {said}"


def _code(error: BaseException | None) -> str:
    """The word by which the server begins the reply, if it is one of those known here."""
    if not isinstance(error, exceptions.RedisError):
        return ""
    for kind, code in _CLASSES.items():
        if isinstance(error, kind):
            return code
    said = _IN_PIPELINE.sub("", str(error))
    first = said.partition(" ")[0]
    return first if first in _CODES else "NOPERM" if _IN_SCRIPT.match(said.removeprefix("ERR ")) else ""
