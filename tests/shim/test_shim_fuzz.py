"""Whatever is sent, the shim answers with a code it documents, stores all of a post or nothing, and goes on serving."""

from __future__ import annotations

import gzip
import json
import random
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest
import schemathesis
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from ports import free_port
from schemathesis.specs.openapi import checks
from trajectories import ENV, TRAINER, group, shim_process, wait_until_up
from warm import WarmProcess
from wrong_bodies import PROFILE, SCALE, VALID, WHOLE, wrong_bodies

from lachesis.broker import EmbeddedRedis
from lachesis.broker.records.groups import ScoredGroup
from lachesis.broker.records.packing import PACKED_TYPE, pack
from lachesis.shim.routes.openapi import document

pytestmark = pytest.mark.slow

packb, unpackb = msgspec.msgpack.encode, msgspec.msgpack.decode
MIB = 1 << 20
LIMIT = 24 * MIB
ALLOWED = 2 * LIMIT + 16 * MIB  # of memory: what was received, what it becomes, and what the allocator keeps


class Shim(NamedTuple):
    """A real process, and a client of it."""

    process: WarmProcess
    client: httpx.Client

    def queued(self) -> int:
        return int(self.client.get("/status").json()["queue_size"])

    def begin(self) -> None:
        """Empty, with a trainer."""
        self.client.get("/reset_data")
        self.client.post("/register", json=TRAINER).raise_for_status()

    def is_well(self) -> None:
        assert self.process.poll() is None
        assert self.client.get("/healthz").status_code == 200
        before = self.queued()
        body = group(random.getrandbits(31))
        assert self.client.post("/scored_data", json=body).json() == {"status": "received"}
        assert self.queued() == before + 1

    def hands_out(self) -> None:
        """What is stored can be read again, and be acknowledged."""
        assert self.client.get("/latest_example").status_code == 200
        assert self.client.post("/register", json=TRAINER).status_code in (200, 409)
        answer = self.client.get("/batch")
        assert answer.status_code == 200
        if answer.json()["batch"]:
            assert self.client.get("/batch").status_code == 200

    def raw(self, *parts: bytes, half: bool = False) -> bytes:
        """Send bytes as they are; the answer's first bytes, b"" where the connection is closed without one."""
        with socket.create_connection((self.client.base_url.host, self.client.base_url.port or 80), timeout=20) as peer:
            for part in parts:
                try:
                    peer.sendall(part)
                except OSError:  # refused and closed before all of it was sent
                    break
            try:
                if half:
                    peer.shutdown(socket.SHUT_WR)
                said = peer.recv(200)
                return said.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n") or peer.recv(200)
            except OSError:  # closed before we were done
                return b""


@pytest.fixture(scope="module")
def shim(shared_redis: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shim]:
    log, port = tmp_path_factory.mktemp("shim") / "log", free_port()
    url = f"http://127.0.0.1:{port}"
    options = ("--port", str(port), "--max-body-bytes", str(LIMIT))
    with shim_process(log, "--redis-url", shared_redis.url, "--run", "fuzz", *options) as process:
        wait_until_up(url, process, log)
        with httpx.Client(base_url=url, timeout=60) as client:
            yield Shim(process, client)
    said = log.read_text()
    assert "Traceback" not in said, said[-4000:]


# -- what the document describes ----------------------------------------------------------------------------------


schema = schemathesis.openapi.from_dict(json.loads(document()))
HELD_TO = [  # not to its rules for bodies: the API reads numbers laxly, and refuses groups that can't be trained
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
]


@schema.parametrize()
@settings(max_examples=25 * SCALE, **PROFILE)
def test_requests_made_from_the_document_get_answers_that_stand_in_it(shim: Shim, case: schemathesis.Case) -> None:
    case.call_and_validate(base_url=str(shim.client.base_url), checks=HELD_TO)


# -- what no document describes -----------------------------------------------------------------------------------

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(st.characters(categories=None), max_size=6),  # lone surrogates are among these
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
fields = st.dictionaries(st.sampled_from(tuple(WHOLE)), anything)
registrations = st.sampled_from((TRAINER, ENV)).flatmap(
    lambda valid: st.dictionaries(st.sampled_from(tuple(valid)), anything, max_size=2).map(
        lambda more: {**valid, **more}
    )
)


def deep(opening: bytes, closing: bytes, depth: int) -> bytes:
    return opening * depth + closing * depth


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def is_msgpack(value: Any) -> bool:
    try:
        return bool(packb(value))
    except (OverflowError, UnicodeEncodeError):
        return False


raw_bodies = st.one_of(
    st.binary(max_size=64),
    anything.map(encoded),
    st.builds(lambda more: encoded({**WHOLE, **more}), fields),
    st.lists(st.builds(lambda more: {**WHOLE, **more}, fields), max_size=3).map(encoded),
    registrations.map(encoded),
    wrong_bodies().filter(lambda wrong: wrong[0] == "POST").map(lambda wrong: encoded(wrong[2])),
    st.builds(deep, st.just(b"["), st.just(b"]"), st.integers(1, 200_000)),
    st.builds(lambda depth: b'{"tokens":' + deep(b"[", b"]", depth) + b"}", st.integers(1, 200_000)),
    st.builds(lambda depth: deep(b'{"a":', b"1}", depth)[: 6 * depth], st.integers(1, 100_000)),
    st.builds(lambda depth: encoded(WHOLE)[:-1] + b',"images":' + deep(b"[", b"]", depth) + b"}", st.integers(1, 2000)),
    st.builds(lambda depth: encoded(WHOLE)[:-1] + b',"images":' + b"[" * depth + b"NaN" + b"]" * depth + b"}", st.integers(1, 2000)),
    st.builds(lambda cut: encoded(WHOLE)[:cut], st.integers(0, len(encoded(WHOLE)))),
    st.builds(lambda at, byte: encoded(WHOLE)[:at] + byte + encoded(WHOLE)[at:], st.integers(0, 300), st.binary(min_size=1, max_size=2)),
    st.integers(1, 6000).map(lambda digits: b'{"env_id": ' + b"9" * digits + b"}"),
)  # fmt: skip


def several_members(body: bytes) -> bytes:
    return gzip.compress(body[: len(body) // 2]) + gzip.compress(body[len(body) // 2 :]) + b"\0" * 7


def zipped_and_cut(body: bytes) -> bytes:
    packed = gzip.compress(body)
    return packed[: len(packed) - len(packed) // 3]


GZIP = {"Content-Encoding": "gzip"}
transports = st.sampled_from(
    (
        (bytes, {}),
        (gzip.compress, GZIP),
        (gzip.compress, {"Content-Encoding": "x, GZip"}),
        (gzip.compress, {}),
        (several_members, GZIP),
        (zipped_and_cut, GZIP),
        (lambda body: gzip.compress(body) + b"rest", GZIP),
        (lambda body: gzip.compress(gzip.compress(body)), {"Content-Encoding": "gzip, gzip"}),
        (zlib.compress, GZIP),
        (zlib.compress, {"Content-Encoding": "deflate"}),
        (bytes, GZIP),
        (bytes, {"Content-Encoding": "br"}),
    )
)
odd_headers = st.dictionaries(
    st.sampled_from(("Content-Type", "X-Trainer-Id", "Idempotency-Key", "Accept-Encoding", "Accept", "Origin", "Expect")),
    st.sampled_from(("", "gzip;q=0", "*/*", "text/plain; charset=utf-16", "application/json", "a" * 5000, "ä€".encode(), b"\xff\xfe", "x", "..")),
    max_size=3,
)  # fmt: skip


@settings(max_examples=250 * SCALE, **PROFILE)
@given(path=st.sampled_from(tuple(VALID)), body=raw_bodies, sent=transports, odd=odd_headers, chunked=st.booleans())
def test_any_body_is_stored_whole_or_refused(
    shim: Shim, path: str, body: bytes, sent: Any, odd: dict[str, Any], chunked: bool
) -> None:
    transport, headers = sent
    content = transport(body)
    pieces = iter([content[:7], content[7:]]) if chunked else content
    before = shim.queued()
    answer = shim.client.request(VALID[path][0], path, content=pieces, headers={**odd, **headers})
    assert answer.status_code in ((403,) if "Origin" in odd else (200, 400, 409, 413, 422)), answer.text
    stored = shim.queued() - before
    if answer.status_code == 200 and path == "/scored_data_list":
        told = answer.json()
        assert stored <= told["groups_processed"] - told.get("refused", 0)
    else:
        assert stored in ((0, 1) if (path, answer.status_code) == ("/scored_data", 200) else (0,))
    shim.hands_out()
    assert shim.client.get("/healthz").status_code == 200


PACKED = zstandard.decompress(pack(ScoredGroup(**WHOLE)))


def compressed(data: bytes, *, content_size: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=content_size).compress(data)


def with_bytes(data: bytes, at: int, change: bytes) -> bytes:
    return data[:at] + change + data[at + len(change) :]


packed_bodies = st.one_of(
    st.binary(max_size=64),
    st.binary(max_size=64).map(compressed),
    st.builds(with_bytes, st.just(PACKED), st.integers(0, len(PACKED) - 1), st.binary(min_size=1, max_size=3)).map(compressed),
    st.builds(with_bytes, st.just(compressed(PACKED)), st.integers(0, len(compressed(PACKED)) - 1), st.binary(min_size=1, max_size=3)),
    st.builds(lambda data, cut: compressed(data[:cut]), st.just(PACKED), st.integers(0, len(PACKED))),
    st.builds(lambda field, value: compressed(packb({**unpackb(PACKED), field: value})), st.sampled_from(tuple(unpackb(PACKED))), anything.filter(is_msgpack)),
    st.builds(lambda field, value: compressed(packb({**unpackb(PACKED), "rest": {field: value}})), st.sampled_from(tuple(WHOLE)), anything.filter(is_msgpack)),
    st.just(compressed(PACKED, content_size=False)),
    st.just(compressed(PACKED) + compressed(PACKED)),
)  # fmt: skip


@settings(max_examples=250 * SCALE, **PROFILE)
@given(body=packed_bodies)
def test_any_packed_body_is_stored_whole_or_refused(shim: Shim, body: bytes) -> None:
    before = shim.queued()
    answer = shim.client.post("/scored_data", content=body, headers={"Content-Type": PACKED_TYPE})
    assert answer.status_code in (200, 422), answer.text
    assert shim.queued() - before in ((0, 1) if answer.status_code == 200 else (0,))
    shim.hands_out()


@settings(max_examples=40 * SCALE, **PROFILE)
@given(data=st.data(), count=st.integers(1, 6))
def test_a_list_with_one_malformed_group_stores_nothing(shim: Shim, data: st.DataObject, count: int) -> None:
    shim.begin()
    groups: list[Any] = [group(number) for number in range(count)]
    wrong = data.draw(
        st.sampled_from((None, 1, "x", [], {}, {**group(9), "tokens": [["x"]]}, {**group(9), "scores": None}, {**group(9), "messages": [[{}]]}))
    )  # fmt: skip
    groups.insert(data.draw(st.integers(0, count)), wrong)
    assert shim.client.post("/scored_data_list", json=groups).status_code == 422
    assert shim.queued() == 0


HEAD = b"POST /scored_data HTTP/1.1\r\nHost: localhost\r\n"
BODY = encoded(group(7))
LENGTH = b"Content-Length: %d\r\n" % len(BODY)


RAW: dict[str, tuple[tuple[bytes, ...], tuple[bytes, ...]]] = {
    "no request": ((b"\r\n\r\n\0\xff",), (b"400",)),
    "TLS": ((b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",), (b"400",)),
    "a length that is no number": ((HEAD + b"Content-Length: x\r\n\r\n",), (b"400",)),
    "a negative length": ((HEAD + b"Content-Length: -1\r\n\r\n",), (b"400",)),
    "a length beyond all": ((HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n",), (b"400", b"413")),
    "a length above the limit": ((HEAD + b"Content-Length: %d\r\n\r\n" % (LIMIT + 1),), (b"413",)),
    "two lengths": ((HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", b"{}"), (b"400",)),
    "length and chunks": ((HEAD + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",), (b"400", b"422")),
    "a chunk size that is no number": ((HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",), (b"400", b"")),
    "a chunk beyond all": ((HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n",), (b"400", b"")),
    "an end too early": ((HEAD + LENGTH + b"\r\n", BODY[:9]), (b"400", b"")),
    "an endless header": ((HEAD + b"X: " + b"a" * (4 * MIB),), (b"400", b"431", b"")),
    "a header of two lines": ((HEAD + LENGTH + b"X: 1\r\n  2\r\n\r\n", BODY), (b"200", b"400")),
    "a NUL in a header": ((HEAD + LENGTH + b"X: \0\r\n\r\n", BODY), (b"200", b"400")),
    "a path of bytes": ((b"GET /\xff\xfe%00%ff HTTP/1.1\r\nHost: localhost\r\n\r\n",), (b"400", b"404")),
    "an old client": ((b"POST /scored_data HTTP/1.0\r\n" + LENGTH + b"\r\n", BODY), (b"200",)),
    "a client that asks first": ((HEAD + LENGTH + b"Expect: 100-continue\r\n\r\n", BODY), (b"200",)),
    "upgrade": ((HEAD + LENGTH + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n", BODY), (b"200", b"400", b"422", b"426")),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "codes"), RAW.values(), ids=RAW)
def test_no_bytes_stop_it(shim: Shim, parts: tuple[bytes, ...], codes: tuple[bytes, ...]) -> None:
    shim.begin()
    said = shim.raw(*parts, half=b"" in codes)
    assert said[9:12] in codes, said
    shim.is_well()


# -- memory -------------------------------------------------------------------------------------------------------


def peak(process: WarmProcess) -> int:
    """Bytes of memory that the process has held at most since `forget_peak`."""
    line = next(line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) << 10


def forget_peak(process: WarmProcess) -> int:
    """Let the peak be what is held now, which is returned."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    return peak(process)


def zeros(size: int, members: int = 1) -> bytes:
    return gzip.compress(bytes(size // members), 9) * members


def chunks(size: int) -> Iterator[bytes]:
    for _ in range(size // MIB):
        yield b" " * MIB


BOMBS: dict[str, tuple[bytes | int, dict[str, str], int]] = {
    "gzip of 1 GiB": (zeros(1024 * MIB), GZIP, 413),
    "64 members of 16 MiB": (zeros(1024 * MIB, 64), GZIP, 413),
    "a million empty members": (gzip.compress(b"", mtime=0) * 1_000_000, GZIP, 422),
    "gzip of gzip of 1 GiB": (gzip.compress(zeros(1024 * MIB)), GZIP, 422),
    "just above the limit": (zeros(LIMIT + 1), GZIP, 413),
    "packed, 1 GiB": (compressed(bytes(1024 * MIB)), {"Content-Type": PACKED_TYPE}, 413),
    "packed, of unknown size": (compressed(bytes(1024 * MIB), content_size=False), {"Content-Type": PACKED_TYPE}, 422),
    "plain, with its length": (b" " * (LIMIT + 1), {}, 413),
    "plain, in chunks": (64 * MIB, {}, 413),
    "not gzip, large": (b"x" * LIMIT, GZIP, 400),
}


@pytest.mark.parametrize(("bomb", "headers", "code"), BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("path", ["/scored_data", "/scored_data_list"])
def test_a_bomb_takes_no_more_memory_than_a_body_that_is_allowed(
    shim: Shim, path: str, bomb: bytes | int, headers: dict[str, str], code: int
) -> None:
    if PACKED_TYPE in headers.values() and path == "/scored_data_list":
        code = 422  # a list is JSON
    shim.begin()
    shim.is_well()
    held = forget_peak(shim.process)
    try:
        answer = shim.client.post(path, content=chunks(bomb) if isinstance(bomb, int) else bomb, headers=headers)
        assert answer.status_code == code, answer.text[:500]
    except httpx.WriteError:  # refused and closed while the rest was being sent
        assert code == 413
    assert peak(shim.process) - held < ALLOWED
    shim.is_well()
