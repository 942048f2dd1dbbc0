"""Every error Lachesis raises on purpose: one root, each also the built-in error a caller would expect.

The message of each says what is wrong and what to do next; a command prints it as one line.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class LachesisError(Exception):
    """Root of all errors that Lachesis raises on purpose."""


class ConfigurationError(LachesisError, ValueError):
    """A setting is missing, malformed or impossible in combination with another."""


class RedisUnreachable(LachesisError, ConnectionError):
    """No Redis answers at the given URL."""


class RedisUnsuitable(LachesisError, RuntimeError):
    """The server is too old, or may evict data."""


class ArchiveUnreadable(LachesisError, ValueError):
    """A segment of an archive is damaged, or of another format."""


class Unreadable(LachesisError, ValueError):
    """A record in Redis lacks what this version needs of it: another version wrote it, or somebody by hand."""


class LeaseLost(LachesisError, RuntimeError):
    """The batch is no longer ours to commit: its lease lapsed or another writer took the policy over."""


class Moved(LachesisError, RuntimeError):
    """The replicas of a policy are in another epoch: one came or went, or this one was evicted. Meet again."""


class Diverged(LachesisError, RuntimeError):
    """Replicas of a policy disagree about the step they trained together."""


class NotFound(LachesisError, LookupError):
    """There is nothing of that name."""


class Conflict(LachesisError, RuntimeError):
    """Something else of the same name is alive; what it is and how to get past it stands in the message."""


class LimitReached(LachesisError, RuntimeError):
    """There are as many of these as there may be: what makes room stands in the message."""


class WeightsRefused(LachesisError, ValueError):
    """A published version does not match its manifest, or its manifest does not match the event."""


class CheckpointRefused(LachesisError, ValueError):
    """A checkpoint is not what a trainer of this policy saved."""


class StorageError(LachesisError, OSError):
    """Weights or a checkpoint can't be written: no room, no right, no such place."""


class InvalidGroup(LachesisError, ValueError):
    """A scored group that can't be trained. Names the field, the offending value and the rule."""

    def __init__(self, field: str, value: object, rule: str) -> None:
        self.field, self.value, self.rule = field, value, rule
        super().__init__(f"{field} = {value!r}: {rule}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message that refuses `name`: "; did you mean 'X'?", or nothing where no known name is like it."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]!r}?" if close else ""
