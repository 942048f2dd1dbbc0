"""Every Redis key Lachesis uses. The hash tag `{run}` keeps one run in one cluster slot."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lachesis.broker.errors import ConfigurationError

RUNS = "lachesis:runs"  # the one key that belongs to no run
ARCHIVE = "archive"  # the consumer group of the archiver; no policy may have this name

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_name(kind: str, name: str) -> str:
    """Return `name` if it can be part of a key, else raise ConfigurationError."""
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{kind} = {name!r}: use 1 to 64 letters, digits, '_', '-' or '.', starting with a letter or digit"
        )
    return name


@dataclass(frozen=True)
class Keys:
    """Names of one run's keys; types and contents are listed in docs/keys.md."""

    run: str = "default"

    def __post_init__(self) -> None:
        check_name("run", self.run)

    def _key(self, *parts: str) -> str:
        return ":".join((f"lachesis:{{{self.run}}}", *parts))

    # the life of a group
    @property
    def groups(self) -> str:
        return self._key("groups")

    @property
    def batches(self) -> str:
        return self._key("batches")

    @property
    def dead(self) -> str:
        """Accepted groups that could not be trained."""
        return self._key("dead")

    @property
    def refused(self) -> str:
        """Posts that were not accepted."""
        return self._key("refused")

    @property
    def skipped(self) -> str:
        """Steps that a policy gave up."""
        return self._key("skipped")

    def blob(self, gid: str) -> str:
        return self._key("blob", gid)

    def seen(self, gid: str) -> str:
        return self._key("seen", gid)

    @property
    def trained(self) -> str:
        """Groups that were trained and are still kept, and in which step."""
        return self._key("trained")

    @property
    def lineage(self) -> str:
        return self._key("lineage")

    @property
    def old_lineage(self) -> str:
        return self._key("lineage", "old")

    # a policy
    def weights(self, policy: str) -> str:
        return self._key("weights", policy)

    def ledger(self, policy: str) -> str:
        return self._key("ledger", policy)

    def checkpoints(self, policy: str) -> str:
        """Digests of the manifests of the policy's checkpoints."""
        return self._key("checkpoints", policy)

    def writer(self, policy: str) -> str:
        """The lock of the one process that may write a policy's ledger and weights."""
        return self._key("writer", policy)

    def replicas(self, policy: str) -> str:
        """Which generation and epoch a policy's replicas are in, the step that is open, votes."""
        return self._key("replicas", policy)

    def members(self, policy: str) -> str:
        return self._key("members", policy)

    def beats(self, policy: str) -> str:
        return self._key("beats", policy)

    def meeting(self, policy: str) -> str:
        return self._key("meeting", policy)

    def work(self, policy: str) -> str:
        """The groups of the open step."""
        return self._key("work", policy)

    # parties
    def once(self, nonce: str) -> str:
        return self._key("once", nonce)

    @property
    def state(self) -> str:
        return self._key("state")

    @property
    def settings(self) -> str:
        """What the whole run goes by; a reset leaves it."""
        return self._key("settings")

    @property
    def envs(self) -> str:
        return self._key("envs")

    @property
    def heard(self) -> str:
        """When each environment called last."""
        return self._key("heard")

    @property
    def trainers(self) -> str:
        return self._key("trainers")

    @property
    def served(self) -> str:
        """Until when each version was served, of late."""
        return self._key("served")

    @property
    def tokens(self) -> str:
        return self._key("tokens")

    @property
    def pools(self) -> str:
        return self._key("pools")

    # a pool
    def rule(self, pool: str) -> str:
        """What the pool's servers serve."""
        return self._key("rule", pool)

    def updating(self, pool: str) -> str:
        """Which of the pool's servers update now."""
        return self._key("updating", pool)

    # logs
    @property
    def control(self) -> str:
        return self._key("control")

    @property
    def metrics(self) -> str:
        return self._key("metrics")
