"""Small posts that would be large, or too many, inside: refused in bounded time and memory, while others are served."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
from bombs import BOMBS, GZIP, MIB, PACKED, packed
from ports import free_port
from trajectories import TRAINER, group, shim_process, wait_until_up

from lachesis.broker import EmbeddedRedis
from lachesis.broker.records.groups import ScoredGroup
from lachesis.broker.records.packing import pack
from lachesis.shim.intake import large_bodies
from lachesis.shim.intake.large_bodies import INLINE_LISTS
from lachesis.shim.intake.simdjson_decoder import LONGEST, read_group, read_groups


class Shim:
    def __init__(self, url: str, pid: int) -> None:
        self.url, self.pid = url, pid
        self.client = httpx.Client(base_url=url, timeout=280)

    def post(self, path: str, body: bytes, headers: dict[str, str] = GZIP) -> httpx.Response:
        return self.client.post(path, content=body, headers=headers)

    def resident(self, name: str) -> int:
        """Bytes, of this process and its workers."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        found = 0
        for pid in (str(self.pid), *children):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            found += next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))
        return found


@pytest.fixture(scope="module")
def shim(shared_redis: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shim]:
    port, log = free_port(), tmp_path_factory.mktemp("attack") / "log"
    options = (
        "--redis-url",
        shared_redis.url,
        "--run",
        "bodies",
        "--port",
        str(port),
        "--max-body-bytes",
        str(128 * MIB),
    )
    with shim_process(log, *options) as process:
        wait_until_up(f"http://127.0.0.1:{port}/status", process, log)
        shim = Shim(f"http://127.0.0.1:{port}", process.pid)
        assert shim.client.post("/register", json=TRAINER).status_code == 200
        large = json.dumps(group(1, length=64), separators=(",", ":")).ljust(2 * MIB).encode()
        assert shim.post("/scored_data", large, {}).status_code == 200  # a worker is there
        yield shim


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(shim: Shim, name: str) -> None:
    path, make, headers, status, words = BOMBS[name]
    body = make()
    assert len(body) < 400_000
    before = shim.resident("VmRSS")
    Path(f"/proc/{shim.pid}/clear_refs").write_text("5")  # peaks are counted anew
    answers: list[httpx.Response] = []
    poster = threading.Thread(target=lambda: answers.append(shim.post(path, body, headers)))
    poster.start()
    with httpx.Client(base_url=shim.url, timeout=60) as other:
        while poster.is_alive():
            assert other.get("/runs/other/status").status_code == 200
    poster.join()
    (answer,) = answers
    assert (answer.status_code, words in answer.text) == (status, True), answer.text[:500]
    assert len(answer.content) < 10_000
    assert len(answer.json()["detail"]) <= 20 or isinstance(answer.json()["detail"], str)
    assert shim.resident("VmHWM") - before < 500 * MIB


def test_text_is_not_counted(shim: Shim) -> None:
    """Brackets, commas and quotes in a text are no lists, in whatever form they come."""
    text = '[{,"\\' * 100_000
    for number, headers in ((11, {}), (12, PACKED)):
        posted = {**group(number), "messages": [[{"role": "user", "content": text}]] * 2}
        body = pack(msgspec.convert(posted, ScoredGroup)) if headers else json.dumps(posted).encode()
        assert shim.post("/scored_data", body, headers).json() == {"status": "received"}
        kept = shim.client.get("/latest_example").json()
        assert kept["messages"][0][0]["content"] == text


def test_large_groups_are_read_as_small_ones_are(shim: Shim) -> None:
    """What a worker reads: one group, a list with a group that can't be trained, a mistake, numbers sent as texts."""
    space = b" " * MIB
    assert shim.client.get("/reset_data").status_code == 200
    assert shim.client.post("/register", json=TRAINER).status_code == 200
    plain = group(21, messages=[[{"role": "user", "content": "x"}]] * 2, weight_versions=[[[3, 0, 3]], [[4, 0, 3]]])
    for headers, body in (({}, json.dumps(plain).encode() + space), (GZIP, gzip.compress(json.dumps(plain | {"images": [1]}).encode() + space))):  # fmt: skip
        assert shim.post("/scored_data", body, headers).json() == {"status": "received"}
        assert shim.post("/scored_data", body, headers).json()["status"] == "duplicate"
    kept = shim.client.get("/latest_example").json()
    assert {name: kept[name] for name in ("tokens", "masks", "scores", "messages", "images")} == {
        **{name: plain[name] for name in ("tokens", "masks", "scores", "messages")}, "images": [1],
    }  # fmt: skip
    several = [group(22), group(23) | {"scores": [1e999, 0.0]}, group(24) | {"masks": [[1], [1]]}]
    told = shim.post("/scored_data_list", json.dumps(several).encode() + space, {}).json()
    assert (told["groups_processed"], told["refused"]) == (3, 2)
    assert [each["msg"] for each in told["detail"]] == [
        "[1].scores[0] = inf: must be finite", "[2].masks[0] = '1 values': must be as long as its tokens, 3"
    ]  # fmt: skip
    wrong = shim.post("/scored_data", json.dumps(group(25) | {"scores": ["x", 1]}).encode() + space, {})
    assert (wrong.status_code, wrong.json()["detail"][0]["loc"]) == (422, ["body", "scores", 0])
    lax = json.dumps(group(26) | {"tokens": [["1", 2.0, 3], [4, 5, True]]}).encode() + space
    assert shim.post("/scored_data", lax, {}).json() == {"status": "received"}
    assert shim.client.get("/latest_example").json()["tokens"] == [[1, 2, 3], [4, 5, 1]]


@pytest.mark.parametrize("more", [{"length": 65}, {"size": 5}], ids=["too long", "too many"])
def test_a_large_group_has_to_fit_the_trainer_too(shim: Shim, more: dict[str, int]) -> None:
    """A worker knows no trainer: what it has admitted is held against the trainer's limits, and against those alone."""
    assert shim.client.get("/reset_data").status_code == 200
    assert shim.client.post("/register", json=TRAINER).status_code == 200
    plain = group(27, **more)
    small = shim.post("/scored_data", json.dumps(plain).encode(), {})
    lists = {**plain, "messages": [[{"role": "user", "content": "x"}] * INLINE_LISTS]}
    large = [(json.dumps(plain).encode() + b" " * MIB, {}), (pack(msgspec.convert(lists, ScoredGroup)), PACKED)]
    for body, headers in large:
        answer = shim.post("/scored_data", body, headers)
        assert (answer.status_code, answer.json()) == (small.status_code, small.json())
    assert "must not exceed the trainer's" in small.json()["detail"][0]["msg"]


def test_a_worker_that_dies_is_replaced(shim: Shim) -> None:
    for number in (31, 32):
        for child in Path(f"/proc/{shim.pid}/task/{shim.pid}/children").read_text().split():
            if b"lachesis.shim.intake.body_worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                subprocess.run(["kill", "-9", child], check=True)
        body = json.dumps(group(number)).encode() + b" " * MIB
        assert shim.post("/scored_data", body, {}).json() == {"status": "received"}


def test_readers_that_crash_had_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    command, pipe = [sys.executable, "-c", crash], subprocess.PIPE
    monkeypatch.setattr(large_bodies, "_take", lambda: subprocess.Popen(command, stdin=pipe, stdout=pipe))
    reply = large_bodies._ask(large_bodies.Order("group", 1, 4), b"[{}]")
    assert (reply.kind, b"times as much memory" in reply.told) == ("too much", True)


FIELDS = (b'"images":[', b'"messages":[[', b'"distill_token_ids":[[[', b'"overrides":[', b'"tokens":[[', b'"scores":[')


@pytest.mark.parametrize(
    ("before", "count"), [*((field, 2**24 + 1) for field in FIELDS), (FIELDS[0], 2**24 - 1), (FIELDS[0], 2**24)]
)
def test_lists_longer_than_simdjson_counts(shim: Shim, before: bytes, count: int) -> None:
    body = packed([b'{"masks":[[1]],', before, b"0," * (count - 1), b"0" + b"]" * before.count(b"[") + b"}"])
    answer = shim.post("/scored_data", body)
    assert (answer.status_code, "values: must hold at most 15000000" in answer.text) == (413, True)


def test_simdjson_sees_no_list_that_it_cannot_count() -> None:
    """Whatever lets a body come so far: n elements take 2n - 1 bytes."""
    whole = b'{"tokens":[[1]],"masks":[[1]],"scores":[1],"images":['
    count = (LONGEST - len(whole) - 1) // 2
    assert count < 2**24 - 1
    longest = read_group(whole + b"0," * (count - 1) + b"0]}")
    assert longest is not None
    assert len(longest.rest["images"]) == count
    for longer in (count + 1, 2**24 - 1, 2**24, 2**24 + 1):
        assert read_group(whole + b"0," * (longer - 1) + b"0]}") is None
        assert read_groups(b"[" + whole + b"0," * (longer - 1) + b"0]}]") is None


def test_every_route_says_what_it_takes(shim: Shim) -> None:
    for method, path in (
        ("POST", "/register"),
        ("POST", "/register-env"),
        ("GET", "/status-env"),
        ("POST", "/disconnect-env"),
    ):
        body = b'{"env_id": 0, "x": "' + b"x" * 70_000 + b'"}'
        answer = shim.client.request(method, path, content=body)
        assert (answer.status_code, answer.json()["detail"]) == (
            413,
            "the body is larger than 65536 bytes (of this route)",
        )
        answer = shim.client.request(method, path, content=body[:-10_000] + b'"}')
        assert answer.status_code in (200, 422)
