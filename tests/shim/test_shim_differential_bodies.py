"""Bodies with something wrong: the shim refuses what atroposlib's own server refuses, for the same reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from differences import DIFFERENCES, MESSAGES, UNKNOWN_ENV, left_out
from hypothesis import given, settings
from side_by_side import Both, exactly, side_by_side
from wrong_bodies import PROFILE, SCALE, VALID, wrong_bodies

from lachesis.broker import EmbeddedRedis


@pytest.fixture(scope="module")
def both(shared_redis: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    with side_by_side(shared_redis.url, "differential-bodies", tmp_path_factory.mktemp("shim") / "log") as both:
        yield both


def reasons(answer: httpx.Response) -> list[tuple[str, list[str | int]]]:
    """Type and place of each entry of a 422, but for those of messages."""
    found = [(entry["type"], entry["loc"]) for entry in answer.json()["detail"]]
    apart = [entry for entry in found if "messages" in entry[1]]
    if apart:
        left_out(MESSAGES)
    return [entry for entry in found if entry not in apart]


@settings(max_examples=400 * SCALE, **PROFILE)
@given(wrong=wrong_bodies())
def test_a_wrong_body_is_refused_for_the_same_reason_at_the_same_place(both: Both, wrong: tuple[str, str, Any]) -> None:
    method, path, body = wrong
    try:
        theirs, ours = both.each(method, path, json=body)
    finally:
        both.each("GET", "/reset_data")
    if theirs.status_code == 422:
        assert ours.status_code == 422, (body, ours.text)
        assert sorted(map(exactly, reasons(ours))) == sorted(map(exactly, reasons(theirs))), body
    elif ours.status_code == 422 and {entry["type"] for entry in ours.json()["detail"]} == {"value_error"}:
        left_out("ragged, empty or over-long groups and groups larger than the batch are accepted")
    elif theirs.status_code == 500 and path == "/status-env":
        assert ours.status_code == 200
        left_out(UNKNOWN_ENV)
    elif theirs.status_code == 500:
        assert ours.status_code == 422, body
        assert any("messages" in entry["loc"] for entry in ours.json()["detail"]), (body, ours.text)
    else:
        assert ours.status_code == theirs.status_code == 200, (body, theirs.text, ours.text)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b'{"tokens": ',
        b"[1,]",
        b"{'a': 1}",
        b"nul",
        b'"\xff"',
        b'{"images": "\xe4"}',
        b"{}x",
        b"\xef\xbb\xbf{}",
    ],
)
@pytest.mark.parametrize("path", VALID)
def test_what_is_not_json_is_refused_alike(both: Both, path: str, body: bytes) -> None:
    theirs, ours = both.each(VALID[path][0], path, content=body, headers={"Content-Type": "application/json"})
    assert ours.status_code == 422
    if theirs.status_code == 400:
        assert "a body that is not UTF-8 is a 400" in DIFFERENCES
    else:
        assert reasons(ours) == reasons(theirs)
