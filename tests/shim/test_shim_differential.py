"""The shim beside atroposlib's own server: the same valid calls, the same JSON."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from side_by_side import BATCH, Both, side_by_side
from trajectories import ENV, TRAINER, group

from lachesis.broker import EmbeddedRedis


@pytest.fixture
def both(shared_redis: EmbeddedRedis, run_name: str, tmp_path: Path) -> Iterator[Both]:
    with side_by_side(shared_redis.url, run_name, tmp_path / "log") as both:
        yield both


def test_a_whole_job_reads_the_same(both: Both) -> None:
    both.get("/")
    for path in ("/info", "/wandb_info", "/status", "/batch", "/latest_example"):
        both.get(path)
    both.post("/register-env", ENV)
    both.register(starting_step=7)
    both.register(starting_step=7)
    for path in ("/info", "/wandb_info", "/status"):
        both.get(path)
    both.post("/register-env", ENV)
    assert both.batch() is None
    for name, size in (("sums", 2), ("sums", 4), ("words", 4)):
        both.post("/register-env", {**ENV, "desired_name": name, "group_size": size, "weight": size / 2})

    numbers = iter(range(1000))
    chance, sizes = random.Random(0), (2, 4, 4)
    queued = batches = 0
    for _ in range(150):
        call = chance.choice(("post", "post", "post", "list", "status", "status-env", "batch"))
        env_id = chance.randrange(3)
        size = sizes[env_id]
        if (
            call == "post" and queued + size < 2 * BATCH
        ):  # with two batches ready, upstream hands out the newer one first
            queued += size
            more: dict[str, Any] = {
                "env_id": env_id,
                "overrides": [{}] * size,
                "inference_logprobs": [[1.0, -0.5, -0.25]] * size,
            }
            assert both.post("/scored_data", group(next(numbers), size, **more)) == {"status": "received"}
            both.get("/latest_example")
        elif call == "list" and queued + 2 * size < 2 * BATCH:
            queued += 2 * size
            both.post("/scored_data_list", [group(next(numbers), size, env_id=env_id) for _ in range(2)])
        elif call == "status":
            both.get("/status")
        elif call == "status-env":
            both.get("/status-env", json={"env_id": env_id})
        elif call == "batch" and both.batch() is not None:
            queued -= BATCH
            batches += 1
    assert batches > 5

    both.post("/disconnect-env", {"env_id": 1})
    both.post("/disconnect-env", {"env_id": 17})
    both.post("/register-env", {**ENV, "desired_name": "least", "min_batch_allocation": 0.25, "weight": 0.0})
    for env_id in range(4):
        both.get("/status-env", json={"env_id": env_id})
    both.get("/reset_data")
    for path in ("/status", "/wandb_info"):
        both.get(path)


def test_odd_sizes_are_buffered_the_same(both: Both) -> None:
    both.register()
    both.batch()
    for group_size in (4, 8):
        both.post("/register-env", {**ENV, "group_size": group_size})
    numbers = iter(range(100))
    for env_id, sizes in ((0, (2, 1, 1, 4, 1, 2, 1)), (1, (4, 2, 8, 1, 1, 2, 2, 2, 2))):
        for size in sizes:
            both.post("/scored_data", group(next(numbers), size, env_id=env_id))
    both.post("/scored_data_list", [group(next(numbers), size, env_id=0) for size in (2, 4, 1, 1)])
    both.post("/scored_data_list", [group(next(numbers), 4, env_id=0)])
    both.post("/scored_data", group(next(numbers), 2, env_id=7))


def test_minimum_allocations_make_the_same_batches(both: Both) -> None:
    both.register()
    both.batch()
    for minimum in (None, 0.25, 0.5):
        both.post("/register-env", {**ENV, "min_batch_allocation": minimum})
    chance, numbers, batches = random.Random(1), iter(range(1000)), 0
    for env_id in (0, 0, 0, 1, 2, 2):  # fewer than two batches, or upstream hands out the newer one first
        both.post("/scored_data", group(next(numbers), 2, env_id=env_id))
    while batches < 12:
        assert both.batch() is not None
        batches += 1
        for env_id in (1, 2, chance.choice((0, 1, 2)), chance.choice((0, 2))):
            both.post("/scored_data", group(next(numbers), 2, env_id=env_id))


def test_lax_numbers_and_unknown_keys_read_the_same(both: Both) -> None:
    both.register(batch_size="8", num_steps=100.0, unknown=1)
    both.get("/info")
    both.post("/scored_data", {**group(1), "tokens": [["7", True], [1.0, 2]], "masks": [[1, 2], [3, 4]], "seed": 1})
    both.get("/latest_example")
    both.post("/scored_data", group(2, advantages=[], messages=[], group_overrides={}, images=None, env_id="3"))
    both.get("/latest_example")
    both.post("/scored_data_list", [])


def test_refusals_have_the_same_code_type_and_place(both: Both) -> None:
    both.get("/nothing")
    both.post("/batch", {})
    both.get("/register")
    wrong = [
        ("POST", "/scored_data", {**group(1), "tokens": [[1.5]]}),
        ("POST", "/scored_data", {**group(1), "scores": "x"}),
        ("POST", "/scored_data", {**group(1), "overrides": [None]}),
        ("POST", "/scored_data", {**group(1), "env_id": "x", "masks": None}),
        ("POST", "/scored_data", "text"),
        ("POST", "/scored_data", None),
        ("POST", "/scored_data_list", {}),
        ("POST", "/scored_data_list", [group(1), {}]),
        ("POST", "/register", {**TRAINER, "batch_size": None, "num_steps": "1e3"}),
        ("POST", "/register-env", {**ENV, "weight": None}),
        ("GET", "/status-env", {}),
        ("POST", "/disconnect-env", {"env_id": [1]}),
    ]
    for method, path, body in wrong:
        theirs, ours = both.each(method, path, json=body)
        assert (theirs.status_code, ours.status_code) == (422, 422), (path, body)
        places = [[(entry["type"], entry["loc"]) for entry in answer.json()["detail"]] for answer in (theirs, ours)]
        assert places[0] == places[1], (path, body)
    theirs, ours = both.each(
        "POST", "/scored_data", content=b'{"tokens": ', headers={"Content-Type": "application/json"}
    )
    assert [entry["loc"] for entry in theirs.json()["detail"]] == [entry["loc"] for entry in ours.json()["detail"]]
    theirs, ours = both.each("POST", "/scored_data", content=b"no", headers={"Content-Encoding": "gzip"})
    assert (ours.status_code, ours.text) == (theirs.status_code, theirs.text)
    assert both.each("GET", "/status-env")[1].json()["detail"][0]["type"] == "missing"
