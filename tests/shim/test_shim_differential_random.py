"""Random valid jobs: the shim answers what atroposlib's own server answers.

Where a deliberate difference would let the two drift apart, the step is left out, under the difference's name.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import httpx
import pytest
from atroposlib.api.utils import grab_batch_with_minimum_allocations, grab_exact_from_heterogeneous_queue
from differences import UNKNOWN_ENV, left_out
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from side_by_side import BATCH, Both, exactly, side_by_side, words
from trajectories import TRAINER, group, number_of
from wrong_bodies import PROFILE, SCALE

from lachesis.broker import EmbeddedRedis

pytestmark = pytest.mark.slow

JOBS = 60 * SCALE
LENGTH = 3
PLAIN, GZIP = {"Accept-Encoding": "identity"}, {"Accept-Encoding": "gzip"}


@pytest.fixture(scope="module")
def both(shared_redis: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    with side_by_side(shared_redis.url, "differential-random", tmp_path_factory.mktemp("shim") / "log") as both:
        yield both


# -- what is posted -----------------------------------------------------------------------------------------------

numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**6), 10**6)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | numbers | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(st.text(max_size=4), json_values, max_size=3)


def rows(of: st.SearchStrategy[Any], size: int) -> st.SearchStrategy[Any]:
    return st.lists(st.lists(of, min_size=LENGTH, max_size=LENGTH), min_size=size, max_size=size)


def extras(size: int) -> st.SearchStrategy[dict[str, Any]]:
    """The keys of a group that may be absent, null, empty or there."""
    message = st.builds(lambda more, said: {**more, "role": "user", "content": said}, objects, json_values)
    there = {
        "masks": rows(st.integers(-(2**63), 2**63 - 1), size),
        "advantages": st.just([]) | rows(numbers, size),
        "ref_logprobs": st.just([]) | rows(numbers, size),
        "inference_logprobs": st.just([]) | rows(numbers, size),
        "messages": st.lists(st.lists(message, max_size=2), max_size=size),
        "generation_params": objects,
        "group_overrides": objects,
        "overrides": st.lists(objects, max_size=size),
        "images": json_values,
        "distill_token_ids": st.lists(rows(st.integers(0, 2**31), 2), max_size=size),
        "distill_logprobs": st.lists(rows(numbers, 2), max_size=size),
        "unknown": json_values,
    }
    nullable = {name: values if name == "masks" else st.none() | values for name, values in there.items()}
    return st.fixed_dictionaries({"scores": st.lists(numbers, min_size=size, max_size=size)}, optional=nullable)


# -- whole jobs ---------------------------------------------------------------------------------------------------


rarely = st.sampled_from((False, False, False, False, True))


class Job(RuleBasedStateMachine):
    """A trainer, environments of several sizes, and what is queued, as upstream counts it."""

    both: Both
    number = 0  # of groups made, so that no two are alike
    batches = 0  # compared

    @initialize(steps=st.integers(0, 10**6), wait=rarely, minimums=rarely)
    def begin(self, steps: int, wait: bool, minimums: bool) -> None:
        self.minimums = minimums  # whether environments have any: upstream then assembles batches in another way
        self.calls = 0
        self.call("GET", "/reset_data")
        self.registered = self.started = False
        self.envs: list[dict[str, Any]] = []
        self.queue: list[dict[str, Any]] = []
        self.latest: int | None = None  # None: what upstream kept from an earlier run
        self.held: list[int] = []  # the batch that the trainer has and has not acknowledged
        self.trainer = {**TRAINER, "batch_size": BATCH, "starting_step": steps, "num_steps": steps + 5}
        if not wait:
            self.register()
            self.batch(PLAIN)

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        """Send it to both; the answers must be the same, and be compressed alike."""
        self.calls += 1
        how = {"headers": headers or {}} | ({} if body is None else {"json": body})
        return self.equal(path, *self.both.each(method, path, **how))

    def equal(self, path: str, theirs: httpx.Response, ours: httpx.Response) -> Any:
        assert ours.status_code == theirs.status_code, (path, theirs.text, ours.text)
        for name in ("content-type", "allow"):
            assert words(ours, name) == words(theirs, name), (path, name)
        if ours.headers.get("content-encoding") != theirs.headers.get("content-encoding"):
            shorter, longer = sorted(len(answer.content) for answer in (theirs, ours))
            assert shorter < 1000 <= longer, path  # the same numbers, of which one is written 1e16 and the other 1e+16
        if not ours.content or "json" not in ours.headers["content-type"]:
            assert ours.text == theirs.text
            targets = [httpx.URL(answer.headers.get("location", "/")).path for answer in (theirs, ours)]
            assert targets[0] == targets[1], path
            return ours.text
        if (path, ours.status_code) == ("/register", 200):
            assert all(0 <= answer.json()["uuid"] < 2**128 for answer in (theirs, ours))
        elif path == "/batch" and ours.json().get("batch"):
            mine, other = (sorted(answer.json()["batch"], key=number_of) for answer in (ours, theirs))
            assert exactly(mine) == exactly(other)
        else:
            assert exactly(ours.json()) == exactly(theirs.json()), path
        return ours.json()

    # the trainer

    @rule()
    def register(self) -> None:
        self.call("POST", "/register", self.trainer)
        self.registered = True

    @rule(accept=st.sampled_from((PLAIN, GZIP)))
    def batch(self, accept: dict[str, str]) -> None:
        if not self.registered:
            left_out("`/info` keeps the old `max_token_len` after a reset, and `/batch` is a 500")
            self.register()
        theirs, rest = self.upstreams_batch(self.queue)
        if theirs is not None and self.upstreams_batch(rest)[0] is not None:
            left_out("all possible batches are formed at once")
            return
        if any(env["min_batch_allocation"] is not None for env in self.envs):  # tests/broker compares those choices
            left_out("no batch while an environment with a `min_batch_allocation` has no complete pack queued")
            return
        ours = self.oldest_batch()
        if ours != (theirs and sorted(map(number_of, theirs))):
            left_out("group sizes must divide each other and the batch")
            return
        answer = self.call("GET", "/batch", headers=accept)["batch"]
        assert (answer and sorted(map(number_of, answer))) == ours
        Job.batches += bool(ours)
        self.started = True
        self.held = ours or []
        self.queue = rest

    def upstreams_batch(self, queue: list[dict[str, Any]]) -> tuple[list[dict[str, Any]] | None, list[dict[str, Any]]]:
        if any(env["min_batch_allocation"] is not None for env in self.envs):
            found = grab_batch_with_minimum_allocations(queue, BATCH, self.envs)
        else:
            found = grab_exact_from_heterogeneous_queue(queue, BATCH)
        return found

    def oldest_batch(self) -> list[int] | None:
        """The groups that add up and whose newest is oldest, then whose second newest is, and so on."""
        sizes = [len(item["tokens"]) for item in self.queue]
        chosen = [
            subset
            for count in range(1, len(sizes) + 1)
            for subset in combinations(range(len(sizes)), count)
            if sum(sizes[index] for index in subset) == BATCH
        ]
        if not chosen:
            return None
        return sorted(number_of(self.queue[index]) for index in min(chosen, key=lambda subset: subset[::-1]))

    @precondition(lambda self: self.calls > 25)
    @rule()
    def reset(self) -> None:
        self.calls = 0
        self.call("GET", "/reset_data")
        self.registered = self.started = False
        self.envs, self.queue, self.held, self.latest = [], [], [], None

    # environments

    @rule(
        name=st.sampled_from(("sums", "words", "")),
        size=st.sampled_from((1, 2, 2, 4, 4, 8)),
        weight=st.floats(0, 100) | st.just(1),
        length=st.integers(1, 10**5),
        minimum=st.none() | st.none() | st.floats(0, 1),
    )
    def register_env(self, name: str, size: int, weight: float, length: int, minimum: float | None) -> None:
        body = {"max_token_length": length, "desired_name": name, "weight": weight, "group_size": size}
        minimum = minimum if self.minimums else None
        body |= {} if minimum is None else {"min_batch_allocation": minimum}
        answer = self.call("POST", "/register-env", body)
        if self.started:
            assert answer["env_id"] == len(self.envs)
            known = {"registered_id": len(self.envs), "connected": True, "min_batch_allocation": minimum}
            self.envs.append({**body, **known})
        else:
            assert answer == {"status": "wait for trainer to start"}

    @rule(env_id=st.integers(0, 5))
    def disconnect_env(self, env_id: int) -> None:
        answer = self.call("POST", "/disconnect-env", {"env_id": env_id})
        assert answer["status"] == ("success" if env_id < len(self.envs) else "failure")
        if env_id < len(self.envs):
            self.envs[env_id]["connected"] = False

    @precondition(lambda self: self.envs)
    @rule(data=st.data(), zipped=st.booleans())
    def status_env(self, data: st.DataObject, zipped: bool) -> None:
        env_id = data.draw(st.integers(0, len(self.envs) - 1))
        if not sum(env["max_token_length"] * env["weight"] for env in self.envs if env["connected"]) > 0:
            left_out(UNKNOWN_ENV)
        elif self.queue and all(len(item["tokens"]) == 1 for item in self.queue):
            left_out("groups of other environments are not counted while all groups have one sequence")
        else:
            body = json.dumps({"env_id": env_id}).encode()
            headers = {"Content-Type": "application/json", **({"Content-Encoding": "gzip"} if zipped else {})}
            how: dict[str, Any] = {"content": gzip.compress(body) if zipped else body, "headers": headers}
            self.equal("/status-env", *self.both.each("GET", "/status-env", **how))

    @rule(data=st.data(), count=st.sampled_from((None, None, 0, 1, 2, 3)), zipped=st.booleans())
    def post(self, data: st.DataObject, count: int | None, zipped: bool) -> None:
        """One group (`count` None) or a list of them."""
        if not self.registered:
            left_out("a group posted before `/register` blocks registration for ever")
            self.register()
        groups = [self.group(data) for _ in range(1 if count is None else count)]
        if sum(len(item["tokens"]) for item in [*self.queue, *groups]) >= 2 * BATCH:
            left_out("the newest batch first when several are ready")
            return
        body = json.dumps(groups[0] if count is None else groups).encode()
        headers = {"Content-Type": "application/json", **({"Content-Encoding": "gzip"} if zipped else {})}
        path = "/scored_data" if count is None else "/scored_data_list"
        how: dict[str, Any] = {"content": gzip.compress(body) if zipped else body, "headers": headers}
        answer = self.equal(path, *self.both.each("POST", path, **how))
        assert answer == {"status": "received", **({} if count is None else {"groups_processed": count})}
        self.queue += groups
        self.latest = number_of(groups[-1]) if groups else self.latest

    @precondition(lambda self: self.registered)
    @rule(data=st.data(), accept=st.sampled_from((PLAIN, GZIP)))
    def fill_a_batch(self, data: st.DataObject, accept: dict[str, str]) -> None:
        if sum(len(item["tokens"]) for item in self.queue) >= BATCH:  # and none was taken: begin anew
            self.batch(accept)
        if sum(len(item["tokens"]) for item in self.queue) >= BATCH:
            self.reset()
            self.register()
            self.batch(accept)
        while sum(len(item["tokens"]) for item in self.queue) < BATCH:
            self.post(data, None, zipped=False)
        self.batch(accept)

    def group(self, data: st.DataObject) -> dict[str, Any]:
        env_id = data.draw(st.sampled_from((None, 99, *range(len(self.envs)))))
        known = env_id is not None and env_id < len(self.envs)
        size = self.envs[env_id]["group_size"] if known else data.draw(st.sampled_from((1, 2, 4)))
        Job.number += 1
        return {**group(Job.number, size, env_id=env_id), **data.draw(extras(size))}

    # everybody

    @rule(path=st.sampled_from(("/", "/status", "/wandb_info", "/info")), accept=st.sampled_from((PLAIN, GZIP)))
    def look(self, path: str, accept: dict[str, str]) -> None:
        if path == "/info" and not self.registered:
            left_out("`/info` keeps the old `max_token_len` after a reset, and `/batch` is a 500")
        else:
            self.call("GET", path, headers=accept)

    @rule(accept=st.sampled_from((PLAIN, GZIP)))
    def latest_example(self, accept: dict[str, str]) -> None:
        newest = number_of(self.queue[-1]) if self.queue else max(self.held, default=None)
        if self.latest is None or self.latest != newest:
            left_out("`/latest_example` is the last group accepted, for ever")
        else:
            assert number_of(self.call("GET", "/latest_example", headers=accept)) == newest

    @rule(method=st.sampled_from(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")), data=st.data())
    def wrong_method_or_path(self, method: str, data: st.DataObject) -> None:
        posts = ("/register", "/register-env", "/disconnect-env", "/scored_data", "/scored_data_list")
        gets = ("/", "/info", "/wandb_info", "/status", "/status-env", "/batch", "/latest_example", "/reset_data")
        wrong = {"GET": posts, "POST": gets}.get(method, posts + gets)
        path = data.draw(st.sampled_from(("/nothing", "/batch/", "/status/", "/Batch", "/scored_data/1", *wrong)))
        theirs, ours = self.both.each(method, path)
        self.equal(path, theirs, ours)


def test_random_jobs_read_the_same(both: Both) -> None:
    Job.both, Job.batches = both, 0
    run_state_machine_as_test(Job, settings=settings(max_examples=JOBS, stateful_step_count=50, **PROFILE))
    assert Job.batches  # else nothing of value was compared
