"""`lachesis dead list | show | requeue | purge`: what could not be trained, and what is to become of it."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field
from pydantic_settings import CliPositionalArg
from rich.table import Table

from lachesis.broker.client import Broker
from lachesis.broker.errors import ConfigurationError, InvalidGroup, NotFound, did_you_mean
from lachesis.broker.queue.admission import REFUSED, admit_stored
from lachesis.broker.records.blobs import from_blob
from lachesis.broker.records.groups import Group
from lachesis.broker.records.packing import is_packed, to_scored
from lachesis.broker.retention.dead_letters import REASONS, Letter
from lachesis.cli.actions import dispatch, with_broker
from lachesis.cli.options import parse
from lachesis.cli.terminal import console, say, say_json
from lachesis.service.settings import RedisSettings

EXPLAINED = "\n".join(f"  {reason:<11}  {what}" for reason, what in REASONS.items())
USAGE = f"""\
usage: lachesis dead list [--reason REASON] [--json]
       lachesis dead show ID [--tokens] [--json]
       lachesis dead requeue ID… | --all [--reason REASON] [--older-than 3d]
       lachesis dead purge ID… | --all [--reason REASON] [--older-than 3d]

Dead letters are groups that could not be trained. Reasons:
{EXPLAINED}
requeue puts them back at the end of the queue, refused posts if they are valid now; purge gives them up for good.
Every action takes --redis-url and --run; `lachesis dead list --help` explains them. docs/guarantees.md says more."""

SHOWN_BODY = 500  # characters of a refused post
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
WHO = "lachesis dead"


class ListSettings(RedisSettings):
    """Show the dead letters of a run, oldest first."""

    reason: str = Field("", description=f"only those with this reason: {', '.join(REASONS)}")
    json_output: bool = Field(False, alias="json", description="print one JSON array")


class ShowSettings(RedisSettings):
    """Show one dead letter: why it is one, and what it holds."""

    id: CliPositionalArg[str] = Field(description="its id, as `lachesis dead list` shows it")
    tokens: bool = Field(False, description="print every token id, or the whole of a refused post")
    json_output: bool = Field(
        False, alias="json", description="print one JSON object, the group as it was posted in it"
    )


class Selection(RedisSettings):
    """Which dead letters: those with the given ids, or all that match."""

    ids: CliPositionalArg[list[str]] = Field([], description="ids, as `lachesis dead list` shows them")
    all: bool = Field(False, description="all of them, or with the options below all that match")
    reason: str = Field("", description=f"with --all: only those with this reason: {', '.join(REASONS)}")
    older_than: str = Field("", description="with --all: only those that died longer ago than e.g. 90s, 15m, 12h, 3d")


class RequeueSettings(Selection):
    """Put dead letters back at the end of the queue; refused posts if they are valid now. Exit code 1 if one stays."""

    policy: str = Field("main", description="the policy whose versions a refused post is stamped with")


class PurgeSettings(Selection):
    """Give dead letters up, for good: their data is freed, and the audit counts them as given up."""


def main(arguments: Sequence[str]) -> int:
    return dispatch(ACTIONS, USAGE, arguments)


def list_(arguments: Sequence[str]) -> int:
    settings = parse(ListSettings, "dead list", arguments)

    async def run(broker: Broker) -> int:
        letters = _of_reason(await broker.dead.all(), settings.reason)
        if settings.json_output:
            say_json(list(map(_plain, letters)))
        elif letters:
            _table(letters)
        else:
            say(f"run {settings.run!r} has no dead letters{' with that reason' if settings.reason else ''}")
        return 0

    return with_broker(settings, run)


def show(arguments: Sequence[str]) -> int:
    settings = parse(ShowSettings, "dead show", arguments)

    async def run(broker: Broker) -> int:
        (letter,) = await broker.dead.find([settings.id])
        body, group, why_not = await _content(broker, letter)
        if settings.json_output:
            kept = {"not_shown": why_not} if why_not else _kept(body, group)
            cut = {"whole_bytes": letter.cut_from} if letter.cut_from else {}
            say_json({**_plain(letter), **kept, **cut})
            return 0
        for name, value in _plain(letter).items():
            say(f"{name:<10}  {value}")
        if why_not:
            say(f"not shown   {why_not}")
            return 0
        say(*(_summary(group, letter.sequence, settings.tokens) if group else _excerpt(body, settings.tokens)))
        if letter.cut_from:
            say(f"kept        the first {len(body):,} of its {letter.cut_from:,} bytes")
        return 0

    return with_broker(settings, run)


def requeue(arguments: Sequence[str]) -> int:
    settings = parse(RequeueSettings, "dead requeue", arguments)

    async def run(broker: Broker) -> int:
        stayed = 0
        chosen = await _chosen(broker, settings)
        for letter in chosen if settings.ids else [letter for letter in chosen if not letter.sequence]:
            why = await _requeue(broker, letter, settings.policy)
            stayed += bool(why)
            say(f"{letter.entry.gid}: {f'not requeued: {why}' if why else 'requeued'}")
        return 1 if stayed else 0

    return with_broker(settings, run)


def purge(arguments: Sequence[str]) -> int:
    settings = parse(PurgeSettings, "dead purge", arguments)

    async def run(broker: Broker) -> int:
        letters = await _chosen(broker, settings)
        purged = [letter for letter in letters if await broker.dead.purge(letter, who=WHO)]
        counts = Counter(_kind(letter) for letter in purged)
        say(f"purged {' and '.join(f'{count} {what}' for what, count in sorted(counts.items())) or 'nothing'}")
        return 0

    return with_broker(settings, run)


ACTIONS: dict[str, Callable[[Sequence[str]], int]] = {"list": list_, "show": show, "requeue": requeue, "purge": purge}


def _kind(letter: Letter) -> str:
    return "accepted groups" if letter.accepted else "sequences" if letter.sequence else "refused posts"


async def _chosen(broker: Broker, settings: Selection) -> list[Letter]:
    if bool(settings.ids) == settings.all:
        raise ConfigurationError("which ones? Give their ids, or --all (not both)")
    if settings.ids and (settings.reason or settings.older_than):
        raise ConfigurationError("--reason and --older-than choose among --all; ids are chosen already")
    for name in ("reason", "older_than"):  # an empty one, of a variable that is not set, would choose all
        if name in settings.model_fields_set and not getattr(settings, name):
            raise ConfigurationError(f"--{name.replace('_', '-')} = '': give a value, or leave it out for all")
    if settings.ids:
        return await broker.dead.find(settings.ids)
    before = time.time() - _seconds(settings.older_than)
    return [letter for letter in _of_reason(await broker.dead.all(), settings.reason) if letter.at <= before]


def _of_reason(letters: Sequence[Letter], reason: str) -> list[Letter]:
    """Those that died of it; all for none. Raises ConfigurationError for a reason that nothing dies of."""
    known = sorted({*REASONS, *(letter.entry.reason for letter in letters)})
    if reason and reason not in known:
        raise ConfigurationError(
            f"--reason = {reason!r}: must be one of {', '.join(known)}{did_you_mean(reason, known)}"
        )
    return [letter for letter in letters if reason in ("", letter.entry.reason)]


async def _requeue(broker: Broker, letter: Letter, policy: str) -> str:
    """Put it back; else say why it stays."""
    if letter.sequence:
        return "the rest of its group was trained without it"
    try:
        body = await broker.dead.body(letter)
    except (NotFound, InvalidGroup) as error:
        return str(error)
    if letter.cut_from:
        return f"of its {letter.cut_from:,} bytes only the first {len(body):,} are kept"
    if not letter.accepted:
        return await _post_again(broker, letter, body, policy)
    try:
        group = admit_stored(body, letter.entry.gid)
    except InvalidGroup as error:
        return f"it can't be trained: {str(error)[:SHOWN_BODY]}"
    max_lag, newest = await broker.queue.staleness.rule()
    if 0 < max_lag < newest - group.v_min:
        return (
            f"version {group.v_min} is {newest - group.v_min} behind, and max_lag is {max_lag}, so it would be dropped "
            "again. Start the shim with a larger --max-lag, and try again after the next post"
        )
    if why := await broker.queue.refit.why_not(group):
        return f"{why}, so it would not be trained. Register a trainer that takes it, and try again"
    if not await broker.dead.requeue(letter, group, len(body)):
        return "it is gone: somebody else was faster"
    await broker.journal.control("requeue", WHO, letter.entry.gid)
    return ""


ANY_SIZE = 1 << 31  # bytes; the shim took the post


async def _post_again(broker: Broker, letter: Letter, body: bytes, policy: str) -> str:
    # what the shim does with a post; imported here because the other actions do without its web framework
    from starlette.exceptions import HTTPException

    from lachesis.broker.records.groups import Limits
    from lachesis.shim.errors import Malformed
    from lachesis.shim.intake.backpressure import Backpressure
    from lachesis.shim.intake.decode import Bounds
    from lachesis.shim.intake.intake import Intake
    from lachesis.shim.intake.post import Post
    from lachesis.shim.intake.versions import Versions

    backpressure = Backpressure(broker, Limits())
    intake = Intake(broker, Versions(broker, policy), backpressure, Bounds(ANY_SIZE))
    post = Post(letter.entry.gid.removeprefix(REFUSED), body, is_packed(body))
    try:
        await intake.accept(post, backpressure.deadline())
    except (InvalidGroup, Malformed) as error:
        return f"still refused: {error}"
    except HTTPException as error:
        return str(error.detail)
    await broker.dead.purge(letter, who=WHO, event="requeue")
    return ""


def _seconds(duration: str) -> float:
    if not duration:
        return 0
    if not (found := re.fullmatch(r"(\d+)([smhd])", duration)):
        raise ConfigurationError(f"--older-than = {duration!r}: a number and a unit, such as 90s, 15m, 12h or 3d")
    return int(found[1]) * UNITS[found[2]]


def _plain(letter: Letter) -> dict[str, Any]:
    entry = letter.entry
    return {
        "id": entry.gid,
        "reason": entry.reason,
        "accepted": letter.accepted,
        "died": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(letter.at)),
        "deliveries": entry.deliveries,
        "detail": entry.detail,
    }


async def _content(broker: Broker, letter: Letter) -> tuple[bytes, Group | None, str]:
    """What is kept of it, the group in that (None: a refused post), and why it can't be shown if so."""
    try:
        body = await broker.dead.body(letter)
        return body, from_blob(body) if letter.accepted or letter.sequence else None, ""
    except (NotFound, InvalidGroup) as error:
        return b"", None, str(error)


def _kept(body: bytes, group: Group | None) -> dict[str, Any]:
    return {"group": to_scored(group)} if group else {"body": body.decode(errors="replace")}


def _table(letters: Sequence[Letter]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for letter in letters:
        died = time.strftime("%Y-%m-%d %H:%M", time.localtime(letter.at))
        table.add_row(letter.entry.gid, letter.entry.reason, died, letter.entry.detail)
    console().print(table)


def _summary(group: Group, only: tuple[str, int] | None, tokens: bool) -> list[str]:
    lines = [
        f"group       environment {'-' if group.env is None else group.env}, versions {group.v_min} to {group.v_max}"
    ]
    for index, (row, mask, score) in enumerate(zip(group.tokens, group.masks, group.scores, strict=True)):
        if only and only[1] != index:
            continue
        lines.append(
            f"sequence {index}  score {score:g}, {len(row)} tokens, {int((mask != -100).sum())} of them trained"
        )
        if tokens:
            lines.append(f"  {' '.join(map(str, row.tolist()))}")
    return lines


def _excerpt(body: bytes, whole: bool) -> list[str]:
    text = body.decode(errors="replace")
    cut = "" if whole or len(text) <= SHOWN_BODY else f"… ({len(body):,} bytes; --tokens shows all)"
    return [f"post        {text if whole else text[:SHOWN_BODY]}{cut}"]
