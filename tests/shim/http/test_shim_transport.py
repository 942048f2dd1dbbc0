"""What HTTP clients and browsers see beside the JSON: the same of atroposlib's server and of the shim."""

from __future__ import annotations

import gzip
import json
import socket
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from side_by_side import BATCH, Both, side_by_side, words
from trajectories import ENV, TRAINER, group

from lachesis.broker import EmbeddedRedis

POSTS = ("/register", "/register-env", "/disconnect-env", "/scored_data", "/scored_data_list")
GETS = ("/", "/info", "/wandb_info", "/status", "/status-env", "/batch", "/latest_example", "/reset_data")


@pytest.fixture(scope="module")
def pair(shared_redis: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    with side_by_side(shared_redis.url, "transport", tmp_path_factory.mktemp("shim") / "log") as both:
        yield both


@pytest.fixture
def both(pair: Both) -> Both:
    pair.get("/reset_data")
    pair.register()
    assert pair.batch() is None
    return pair


def headers(answers: tuple[httpx.Response, httpx.Response], *names: str) -> list[dict[str, list[str] | None]]:
    return [{name: words(answer, name) for name in names} for answer in answers]


def same(answers: tuple[httpx.Response, httpx.Response], *names: str) -> httpx.Response:
    theirs, ours = headers(answers, *names)
    assert ours == theirs
    assert answers[0].status_code == answers[1].status_code
    return answers[1]


@pytest.mark.parametrize("path", [*POSTS, *GETS])
def test_head_is_refused(both: Both, path: str) -> None:
    both.each("POST", "/scored_data", json=group(1, BATCH))
    answer = same(both.each("HEAD", path), "allow", "content-length", "content-type")
    assert (answer.status_code, answer.content) == (405, b"")
    assert both.get("/status") == {"current_step": 0, "queue_size": 1}  # HEAD /batch took nothing


def test_a_get_reads_its_body_and_no_query(both: Both) -> None:
    both.post("/register-env", ENV)
    assert both.get("/status-env", json={"env_id": 0})["queue_size"] == 0
    assert both.get("/status-env", json={"env_id": 0}, params={"env_id": "7"})["queue_size"] == 0
    for answer in both.each("GET", "/status-env", params={"env_id": "0"}):
        assert (answer.status_code, answer.json()["detail"][0]["type"]) == (422, "missing")
    for path in ("/status", "/info", "/batch", "/"):  # elsewhere a body does no harm
        both.get(path, json={"env_id": 0})


@pytest.mark.parametrize("encoding", ["deflate", "br", "zstd", "Deflate, gzip", "gzip, gzip"])
@pytest.mark.parametrize("path", ["/scored_data", "/scored_data_list", "/register-env"])
def test_another_compression_is_refused_by_its_name(both: Both, path: str, encoding: str) -> None:
    body = gzip.compress(zlib.compress(b"{}")) if "gzip" in encoding else zlib.compress(b"{}")
    answer = both.shim.post(path, content=body, headers={"Content-Encoding": encoding})
    [told] = answer.json()["detail"]
    assert (answer.status_code, told["loc"]) == (422, ["header", "Content-Encoding"])
    rule = "a body may be compressed with gzip, once, or not at all"
    assert told["msg"] == f"Content-Encoding = {encoding!r}: {rule}"


def test_uuids_have_128_bits_in_json(both: Both) -> None:
    for client in (both.upstream, both.shim):
        found = [int(client.post("/register", json={**TRAINER, "batch_size": BATCH}).json()["uuid"]) for _ in range(8)]
        assert len(set(found)) == 8
        assert all(0 < each < 1 << 128 for each in found)
        assert max(found) > 1 << 120


@pytest.mark.parametrize(
    "accepted", ["gzip", "gzip, deflate", "GZIP", "br", "identity", "", "*", "gzip;q=0", "deflate, gzip;q=0.5, br;q=1"]
)
def test_long_answers_are_compressed_as_upstream_does(both: Both, accepted: str) -> None:
    both.post("/scored_data", group(1, BATCH, length=60))
    for path in ("/latest_example", "/batch"):
        same(both.each("GET", path, headers={"Accept-Encoding": accepted}), "content-encoding", "content-type", "vary")


def test_a_short_batch_is_not(both: Both) -> None:
    for number, length in ((1, 3), (2, 60)):
        both.post("/scored_data", group(number, BATCH, length=length))
        answer = same(both.each("GET", "/batch", headers={"Accept-Encoding": "gzip"}), "content-encoding", "vary")
        assert (len(answer.content) >= 1000) == (length == 60)
        assert answer.headers.get("content-encoding") == ("gzip" if length == 60 else None)


def test_short_answers_are_not(both: Both) -> None:
    """The boundary is at 1000 bytes; these answers are spelled alike, to the byte."""
    for length, encoding in ((999, None), (1000, "gzip")):
        both.each("GET", "/reset_data")
        both.register()
        empty = {**group(2), "images": ""}
        sizes = []
        for _ in range(2):
            both.post("/scored_data", empty)
            sizes = [len(answer.content) for answer in both.each("GET", "/latest_example")]
            assert sizes[0] == sizes[1]
            empty = {**group(3), "images": "x" * (length - sizes[0])}
        assert sizes == [length, length]
        answer = same(both.each("GET", "/latest_example", headers={"Accept-Encoding": "gzip"}), "content-encoding")
        assert answer.headers.get("content-encoding") == encoding


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (gzip.compress, "gzip"),
        (gzip.compress, "GZIP"),
        (gzip.compress, "x-gzip"),
        (bytes, "identity"),
        (bytes, "gzip"),
        (bytes, "deflate"),
        (lambda body: gzip.compress(body[:9]) + gzip.compress(body[9:]), "gzip"),
        (lambda body: gzip.compress(body) + b"\0\0\0", "gzip"),
        (lambda body: gzip.compress(body) + b"rest", "gzip"),
        (lambda body: b"", "gzip"),
    ],
)
def test_compressed_bodies(both: Both, content: Any, encoding: str) -> None:
    body = content(json.dumps(group(1)).encode())
    sent = {"Content-Encoding": encoding, "Content-Type": "application/json"}
    same(both.each("POST", "/scored_data", content=body, headers=sent), "content-type")
    both.get("/status")


def test_a_connection_is_kept_and_requests_may_be_pipelined(both: Both) -> None:
    body = json.dumps(group(1)).encode()
    post = (
        b"POST /scored_data HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % len(body)
    )
    requests = (
        post
        + body
        + b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n"
        + b"GET /info HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )
    answers = []
    for client in (both.upstream, both.shim):
        with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=10) as peer:
            peer.sendall(requests)
            said = b""
            while part := peer.recv(65536):
                said += part
        assert said.count(b"HTTP/1.1 200 OK") == 3
        answers.append([line for line in said.split(b"\r\n") if line.startswith((b"{", b"connection"))])
    assert answers[0] == answers[1]


def test_connections_of_older_clients_are_closed(both: Both) -> None:
    said = []
    for client in (both.upstream, both.shim):
        with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=10) as peer:
            peer.sendall(b"GET /info HTTP/1.0\r\n\r\n")
            received = b""
            while part := peer.recv(65536):
                received += part
        said.append((received.partition(b"\r\n")[0], received.rpartition(b"\r\n")[2]))
    assert said[0] == said[1]
