"""The deliberate differences from upstream, each with its reason and with calls that show it.

This is the only list of exceptions of the differential tests: they may leave something out, or let answers differ, only
under a name that stands here. Names and reasons stand in docs/atropos-compatibility.md too, word for word.
"""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
from hypothesis import event
from side_by_side import BATCH, Both
from trajectories import ENV, TRAINER, group, number_of

Show = Callable[[Both], None]


@dataclass(frozen=True)
class Difference:
    name: str
    reason: str
    show: Show  # calls both servers, which are new and empty but for `both.register()` and a first `/batch`


DIFFERENCES: dict[str, Difference] = {}
UNKNOWN_ENV = (
    "500 for an unknown `env_id`, for a lone environment of weight ≤ 0 or group size 0, and when all are disconnected"
)
MESSAGES = "a message without `role` or `content` is placed at all `messages`, what is no message there is a 500"


def differs(name: str, reason: str) -> Callable[[Show], Show]:
    def add(show: Show) -> Show:
        DIFFERENCES[name] = Difference(name, reason, show)
        return show

    return add


def left_out(name: str) -> None:
    """The next answers would differ, or did, for this reason."""
    assert name in DIFFERENCES, name
    event(f"left out: {name}")


def post(both: Both, *bodies: dict[str, Any]) -> None:
    for body in bodies:
        both.each("POST", "/scored_data", json=body)


def numbers(both: Both) -> list[list[int] | None]:
    """Of the groups in both servers' next batch: upstream's, then ours."""
    batches = [answer.json()["batch"] for answer in both.each("GET", "/batch")]
    return [batch and sorted(map(number_of, batch)) for batch in batches]


def codes(answers: tuple[httpx.Response, httpx.Response]) -> list[int]:
    return [answer.status_code for answer in answers]


def status(both: Both) -> list[tuple[int, int]]:
    answers = [answer.json() for answer in both.each("GET", "/status")]
    return [(answer["current_step"], answer["queue_size"]) for answer in answers]


def status_env(both: Both, env_id: int) -> tuple[httpx.Response, httpx.Response]:
    return both.each("GET", "/status-env", json={"env_id": env_id})


# -- batches ------------------------------------------------------------------------------------------------------


@differs(
    "the newest batch first when several are ready",
    "the newest-first order makes waiting rollouts ever more stale",
)
def _(both: Both) -> None:
    post(both, group(1, BATCH), group(2, BATCH))
    assert numbers(both) == [[2], [1]]


@differs(
    "all possible batches are formed at once",
    "environments pause by `queue_size`: it must tell the truth",
)
def _(both: Both) -> None:
    post(both, *(group(number, BATCH) for number in range(3)))
    both.each("GET", "/batch")
    assert status(both) == [(3, 0), (1, 2)]


@differs("a batch is gone once it was taken from the queue", "a client's timeout must not cost a batch")
def _(both: Both) -> None:
    post(both, group(1, BATCH))
    for client in (both.upstream, both.shim):
        address = urlsplit(str(client.base_url))
        with socket.create_connection((address.hostname, address.port)) as raw:
            raw.sendall(b"GET /batch HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert raw.recv(1) == b"H"  # and the rest stays unread
    assert numbers(both) == [None, [1]]


@differs(
    "group sizes must divide each other and the batch",
    "what does not fit waits, and must block nobody",
)
def _(both: Both) -> None:
    post(both, group(1, BATCH - 3), group(2, 3))
    assert numbers(both) == [None, [1, 2]]


@differs(
    "the key `weight_versions` is dropped like any that is unknown",
    "an environment that knows the weight versions of its tokens has no other place to say so",
)
def _(both: Both) -> None:
    for spans, expected in (([[[3, 1, 3]]], 200), ([[[3, 1, 9]]], 422)):
        body = {"tokens": [[1, 2, 3]], "masks": [[-100, 2, 3]], "scores": [1.0], "weight_versions": spans}
        answers = both.each("POST", "/scored_data", json=body)
        assert [answer.status_code for answer in answers] == [200, expected]


@differs("groups within a batch stand in the order in which packs were complete", "ours stand oldest first")
def _(both: Both) -> None:
    post(both, group(1, 2), group(2, 4), group(3, 2))
    batches = [answer.json()["batch"] for answer in both.each("GET", "/batch")]
    assert [[number_of(item) for item in batch] for batch in batches] == [[2, 1, 3], [1, 2, 3]]


@differs(
    "a group whose size differs from its environment's is in no queue until some add up to that size",
    "the buffer is invisible, and what is larger than the environment's size never leaves it",
)
def _(both: Both) -> None:
    both.post("/register-env", {**ENV, "group_size": 4})
    post(both, group(1, BATCH, env_id=0))
    assert status(both) == [(0, 0), (0, 1)]
    assert numbers(both) == [None, [1]]


@differs(
    "no batch while an environment with a `min_batch_allocation` has no complete pack queued",
    "one slow or dead environment must not stop the training of all",
)
def _(both: Both) -> None:
    for minimum, size in ((None, BATCH - 2), (0.5, 2)):
        both.post("/register-env", {**ENV, "group_size": size, "min_batch_allocation": minimum})
    post(both, group(1, BATCH - 2, env_id=0), group(2, 2, env_id=1))
    assert numbers(both) == [None, [1, 2]]


# -- groups -------------------------------------------------------------------------------------------------------


@differs("a repeated post is queued twice", "clients post again when an answer is lost")
def _(both: Both) -> None:
    post(both, group(1), group(1))
    assert status(both) == [(0, 2), (0, 1)]


@differs(
    "NaN and infinity are accepted, and break the batch they end up in",
    "its author reads the reason in the environment's log",
)
def _(both: Both) -> None:
    body = json.dumps({**group(1, BATCH), "scores": [float("nan")] * BATCH})
    headers = {"Content-Type": "application/json"}
    assert codes(both.each("POST", "/scored_data", content=body, headers=headers)) == [200, 422]
    assert codes(both.each("GET", "/batch")) == [500, 200]


@differs(
    "ragged, empty or over-long groups and groups larger than the batch are accepted",
    "they could never be trained",
)
def _(both: Both) -> None:
    for body in (
        {**group(1), "masks": [[1], [1]]},
        {**group(2), "tokens": [], "masks": [], "scores": []},
        group(3, length=TRAINER["max_token_len"] + 1),
        group(4, BATCH + 1),
    ):
        assert codes(both.each("POST", "/scored_data", json=body)) == [200, 422]
    bodies = [group(5), {**group(6), "masks": [[1], [1]]}]
    theirs, ours = (answer.json() for answer in both.each("POST", "/scored_data_list", json=bodies))
    assert theirs == {"status": "received", "groups_processed": 2}
    assert {**theirs, "refused": 1, "detail": ours["detail"]} == ours


# -- registration -------------------------------------------------------------------------------------------------


@differs(
    "a second `/register` is answered and ignored",
    "to train with another batch size than one's own is worse than an error",
)
def _(both: Both) -> None:
    answers = both.each("POST", "/register", json={**TRAINER, "batch_size": 2 * BATCH})
    assert codes(answers) == [200, 409]
    assert both.get("/info")["batch_size"] == BATCH


@differs(
    "a `batch_size` below 1, and numbers beyond all sense, can be registered",
    "they break later answers, to everybody",
)
def _(both: Both) -> None:
    both.get("/reset_data")
    for wrong in (0, -1, 1 << 21, 10**30):
        assert codes(both.each("POST", "/register", json={**TRAINER, "batch_size": wrong})) == [200, 422]
    for name in ("weight", "group_size", "max_token_length", "min_batch_allocation"):
        assert codes(both.each("POST", "/register-env", json={**ENV, name: 1e300 if name == "weight" else 10**30})) == [
            200,
            422,
        ]


@differs(
    "a group posted before `/register` blocks registration for ever",
    "environments that were there before the trainer do just that",
)
def _(both: Both) -> None:
    both.get("/reset_data")
    post(both, group(1))
    both.register()
    assert [answer.json()["batch_size"] for answer in both.each("GET", "/info")] == [-1, BATCH]


@differs(
    "`/info` keeps the old `max_token_len` after a reset, and `/batch` is a 500",
    "both answer as before the first registration",
)
def _(both: Both) -> None:
    both.get("/reset_data")
    theirs, ours = both.each("GET", "/info")
    assert theirs.json() == {**ours.json(), "max_token_len": TRAINER["max_token_len"]}
    assert codes(both.each("GET", "/batch")) == [500, 200]


@differs("negative `env_id`s count from the end", "they are unknown: an environment has one id")
def _(both: Both) -> None:
    both.post("/register-env", ENV)
    answers = both.each("POST", "/disconnect-env", json={"env_id": -1})
    assert [answer.json()["status"] for answer in answers] == ["success", "failure"]


# -- status -------------------------------------------------------------------------------------------------------


@differs(
    UNKNOWN_ENV,
    "an environment exits when this call fails",
)
def _(both: Both) -> None:
    both.post("/register-env", {**ENV, "weight": -1.0})
    assert codes(status_env(both, 0)) == [500, 200]
    both.post("/register-env", ENV)
    both.post("/register-env", {**ENV, "group_size": 0})
    assert codes(status_env(both, 1)) == [200, 200]
    assert codes(status_env(both, 2)) == [500, 200]
    assert codes(status_env(both, 7)) == [500, 200]


@differs(
    "groups of other environments are not counted while all groups have one sequence",
    "they fill batches as any others do",
)
def _(both: Both) -> None:
    both.post("/register-env", {**ENV, "group_size": 1})
    post(both, group(1, 1), group(2, 1))
    assert [answer.json()["queue_size"] for answer in status_env(both, 0)] == [0, 2]


@differs(
    "an environment's group size grows with what it posts",
    "the environment multiplies by the size it registered",
)
def _(both: Both) -> None:
    both.post("/register-env", ENV)
    both.each("POST", "/scored_data", json=group(1, 4, env_id=9))  # of an id that comes to be
    for _ in range(9):
        both.post("/register-env", {**ENV, "group_size": 2})
    assert [answer.json()["self_queue_size"] for answer in status_env(both, 9)] == [1, 2]


@differs(
    "`/latest_example` is the last group accepted, for ever",
    "groups are freed when they are trained",
)
def _(both: Both) -> None:
    post(both, group(1, BATCH))
    for _ in range(2):
        both.each("GET", "/batch")
    assert [len(answer.json()["tokens"]) for answer in both.each("GET", "/latest_example")] == [BATCH, 0]


# -- transport ----------------------------------------------------------------------------------------------------


@differs("truncated gzip is a 500", "it is the sender's mistake")
def _(both: Both) -> None:
    body = gzip.compress(json.dumps(group(1)).encode())[:-9]
    answers = both.each("POST", "/scored_data", content=body, headers={"Content-Encoding": "gzip"})
    assert codes(answers) == [500, 400]


@differs("the body's `Content-Type` must be JSON", "what is not that is JSON")
def _(both: Both) -> None:
    headers = {"Content-Type": "text/plain"}
    answers = both.each("POST", "/scored_data", content=json.dumps(group(1)), headers=headers)
    assert codes(answers) == [422, 200]


@differs("a 422 repeats the whole wrong value", "it may be megabytes, and lands in a log")
def _(both: Both) -> None:
    for length, errors in ((100, 20), (5000, 1)):
        answers = both.each("POST", "/scored_data", json={**group(1), "masks": ["x" * length] * 50})
        assert codes(answers) == [422, 422]
        theirs, ours = (answer.json()["detail"] for answer in answers)
        assert (len(theirs), len(ours)) == (50, errors)
    assert len(theirs[0]["input"]) == 5000
    assert len(ours[0]["input"]) < 1100


@differs("a body that is not UTF-8 is a 400", "one code for every malformed body")
def _(both: Both) -> None:
    headers = {"Content-Type": "application/json"}
    assert codes(both.each("POST", "/scored_data", content=b'"\xff"', headers=headers)) == [400, 422]


@differs(
    MESSAGES,
    "its sender should find the one that is wrong",
)
def _(both: Both) -> None:
    answers = both.each("POST", "/scored_data", json={**group(1), "messages": [[{"role": "a"}]]})
    assert [answer.json()["detail"][0]["loc"] for answer in answers] == [
        ["body", "messages"], ["body", "messages", 0, 0]
    ]  # fmt: skip
    assert codes(both.each("POST", "/scored_data", json={**group(1), "messages": [[1]]})) == [500, 422]


@differs(
    "pages of any origin may call, with what their browser remembers, under any `Host`",
    "any page that a developer visits could read, fill and reset a run",
)
def _(both: Both) -> None:
    page = {"Origin": "http://evil.example", "Cookie": "a=b"}
    theirs, ours = both.each("POST", "/scored_data", json=group(1), headers=page)
    assert codes((theirs, ours)) == [200, 403]
    assert theirs.headers["access-control-allow-origin"] == page["Origin"]
    assert "access-control-allow-origin" not in ours.headers
    assert codes(both.each("GET", "/status", headers={"Host": "evil.example"})) == [200, 421]


@differs("any `min_batch_allocation` can be registered", "it is a part of each batch")
def _(both: Both) -> None:
    assert codes(both.each("POST", "/register-env", json={**ENV, "min_batch_allocation": 1.5})) == [200, 422]


@differs(
    "the interactive pages `/docs` and `/redoc`", "they load their scripts from elsewhere; `/openapi.json` is there"
)
def _(both: Both) -> None:
    assert codes(both.each("GET", "/docs")) == [200, 404]
    assert codes(both.each("GET", "/redoc")) == [200, 404]


@differs(
    "any `desired_name`, and any length of texts", "they are kept for the life of the run, and printed on terminals"
)
def _(both: Both) -> None:
    for name in ("a\nb", "x" * 201):
        assert codes(both.each("POST", "/register-env", json={**ENV, "desired_name": name})) == [200, 422]
    assert codes(both.each("POST", "/register", json={**TRAINER, "wandb_group": "x" * 1025})) == [200, 422]
