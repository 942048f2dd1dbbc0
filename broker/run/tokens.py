"""Bearer tokens of one run: who may do what over HTTP.

A token is 256 random bits and is told once, to who made it; Redis keeps its SHA-256, which needs no salt or stretching
because nobody can guess that many bits. A revoked token keeps its record: otherwise a run that lost its last token
would be open to everyone.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Sequence
from hashlib import sha256

import msgspec
from msgspec import structs

from lachesis.broker.errors import ConfigurationError, Conflict
from lachesis.broker.records.entries import read_json
from lachesis.broker.records.keys import check_name
from lachesis.broker.records.registrations import Role, TokenRecord
from lachesis.broker.run_view import RunView

PREFIX = "lachesis_"  # by which people, and scanners for leaked secrets, know it
LOST = TokenRecord("unreadable", "environment", "", created_at=0.0, revoked_at=0.0)


class Tokens:
    def __init__(self, view: RunView) -> None:
        self._view = view

    async def create(self, role: Role, name: str = "") -> tuple[str, TokenRecord]:
        """A new token and its record. Raises Conflict if the run has, or had, one of that name."""
        name = check_name("name", name or f"{role}-{secrets.token_hex(3)}")
        token = PREFIX + secrets.token_urlsafe(32)
        record = TokenRecord(name, role, digest(token.encode()), time.time())
        if not await self._view.scripts.set_fields_if_new(
            keys=[self._view.keys.tokens], args=[name, msgspec.json.encode(record)]
        ):
            kept = await self._find(name)
            if kept != record:  # else our own, resent after a lost reply
                raise Conflict(f"run {self._view.keys.run!r} has a token named {name!r} already: choose another --name")
        return token, record

    async def revoke(self, name: str) -> TokenRecord:
        """Make the token of that name useless. Raises ConfigurationError if there is none."""
        record = await self._find(name)
        if record is None:
            raise ConfigurationError(f"run {self._view.keys.run!r} has no token named {name!r}: `lachesis token list`")
        record = structs.replace(record, revoked_at=record.revoked_at or time.time())
        await self._view.scripts.set_fields(keys=[self._view.keys.tokens], args=[name, msgspec.json.encode(record)])
        return record

    async def all(self) -> list[TokenRecord]:
        """Every token ever made for this run, oldest first, revoked ones included.

        One that can't be read counts as revoked: the run does not become open to everyone.
        """
        [raw] = await self._view.multiplexed.call(("HVALS", self._view.keys.tokens))
        records = [read_json(TokenRecord, value) or LOST for value in raw]
        return sorted(records, key=lambda record: record.created_at)

    async def _find(self, name: str) -> TokenRecord | None:
        raw = await self._view.redis.hget(self._view.keys.tokens, name)
        return read_json(TokenRecord, raw)


def digest(token: bytes) -> str:
    """What is kept of a token."""
    return sha256(token).hexdigest()


def matching(token: bytes, records: Sequence[TokenRecord]) -> TokenRecord | None:
    """The valid record of this token. Compares with all of them, each in constant time."""
    wanted, found = digest(token), None
    for record in records:
        if hmac.compare_digest(wanted.encode(), record.sha256.encode()) and record.revoked_at is None:
            found = record
    return found
