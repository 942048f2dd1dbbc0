"""Each route's exact answer."""

from __future__ import annotations

import gzip
import json
from typing import Any

import httpx
import pytest
from silent import silence
from trajectories import ENV, KEYS, TRAINER, group

from lachesis.broker import Broker
from lachesis.broker.records.registrations import EnvConfig, EnvRecord, TrainerConfig
from lachesis.broker.records.steps import QueueStatus
from lachesis.broker.run.environments import ALIVE_S, Alive, is_alive
from lachesis.shim.routes.status import env_status

pytestmark = pytest.mark.anyio


async def status_env(client: httpx.AsyncClient, env_id: object) -> httpx.Response:
    return await client.request("GET", "/status-env", json={"env_id": env_id})


async def test_before_a_trainer_registers(client: httpx.AsyncClient) -> None:
    for path, answer in {
        "/": {"message": "AtroposLib API"},
        "/info": {"batch_size": -1, "max_token_len": -1},
        "/wandb_info": {"group": None, "project": None},
        "/status": {"current_step": 0, "queue_size": 0},
        "/batch": {"status": "error", "message": "Trainer not registered. Call /register first.", "batch": []},
    }.items():
        response = await client.get(path)
        assert (response.status_code, response.json()) == (200, answer), path
    assert (await client.post("/register-env", json=ENV)).json() == {"status": "wait for trainer to start"}
    example = (await client.get("/latest_example")).json()
    assert all(value == [] for value in example.values())
    assert len(example) == 9


async def test_a_trainer_and_its_environments(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/register", json={**TRAINER, "starting_step": 5})).json()
    assert list(answer) == ["uuid"]
    assert 0 < answer["uuid"] < 2**128
    assert (await client.get("/info")).json() == {"batch_size": 4, "max_token_len": 64}
    assert (await client.get("/wandb_info")).json() == {"group": "group", "project": "project"}
    assert (await client.post("/register-env", json=ENV)).json() == {"status": "wait for trainer to start"}
    assert (await client.get("/batch")).json() == {"batch": None}
    names = []
    for env_id, name in enumerate(("sums", "sums", "words")):
        answer = (await client.post("/register-env", json={**ENV, "desired_name": name})).json()
        names.append(answer.pop("wandb_name"))
        assert answer == {
            "status": "success", "env_id": env_id, "checkpoint_dir": "/checkpoints", "starting_step": 5,
            "checkpoint_interval": 10, "num_steps": 100,
        }  # fmt: skip
    assert names == ["sums_0", "sums_1", "words_0"]
    assert (await client.post("/disconnect-env", json={"env_id": 1})).json() == {"status": "success"}
    failure = {"status": "failure", "error": "list index out of range"}
    assert (await client.post("/disconnect-env", json={"env_id": 3})).json() == failure
    assert (await status_env(client, 0)).json()["env_weight"] == 0.5


async def test_the_queue_as_environments_see_it(registered: httpx.AsyncClient) -> None:
    for name in ("sums", "words"):
        await registered.post("/register-env", json={**ENV, "desired_name": name})
    for number in range(3):
        answer = await registered.post("/scored_data", json=group(number, env_id=number % 2))
        assert answer.json() == {"status": "received"}
    assert (await registered.get("/status")).json() == {"current_step": 0, "queue_size": 3}
    expected = {
        "current_step": 0, "queue_size": 3, "unallocated_fraction": 1.0, "self_queue_size": 2, "max_group_size": 2,
        "env_weight": 0.5,
    }  # fmt: skip
    assert (await status_env(registered, 0)).json() == expected
    assert (await status_env(registered, 1)).json() == {**expected, "self_queue_size": 1}
    unknown = (await status_env(registered, 99)).json()
    assert unknown == {**expected, "self_queue_size": 0, "env_weight": 1.0}
    assert len((await registered.get("/batch")).json()["batch"]) == 2
    assert (await registered.get("/status")).json() == {"current_step": 1, "queue_size": 1}


async def test_groups_come_back_with_all_14_keys_as_they_were_sent(registered: httpx.AsyncClient) -> None:
    sent = group(
        1, advantages=[], messages=[[{"role": "user", "content": None, "reward": 1}], []], group_overrides={},
        overrides=[{"temperature": 0.5}, {}], images=[["x"]], inference_logprobs=[[1.0, -0.5, -0.1]] * 2, env_id=0,
        distill_token_ids=[[[1, 2]] * 3] * 2, unknown="dropped",
    )  # fmt: skip
    await registered.post("/scored_data", json=sent)
    expected = {**dict.fromkeys(KEYS), **sent}
    del expected["unknown"]
    latest = await registered.get("/latest_example")
    assert latest.json() == expected
    assert "content-encoding" not in latest.headers
    await registered.post("/scored_data", json=group(2))
    assert (await registered.get("/batch")).json()["batch"][0] == expected


async def test_numbers_are_as_lax_as_upstream(registered: httpx.AsyncClient) -> None:
    body = {"tokens": [["8", 1.0, True]], "masks": [[-100, "1", 2]], "scores": [True], "advantages": [["0.5", 1, 0]]}
    assert (await registered.post("/scored_data", json=body)).json() == {"status": "received"}
    latest = (await registered.get("/latest_example")).json()
    assert (latest["tokens"], latest["masks"]) == ([[8, 1, 1]], [[-100, 1, 2]])
    assert (latest["scores"], latest["advantages"]) == ([1.0], [[0.5, 1.0, 0.0]])


MALFORMED: dict[str, tuple[str, Any, str, list[object], str]] = {
    "a fraction": ("/scored_data", group(1, masks=[[1.5, 1, 1]]), "int_from_float", ["masks", 0, 0], "masks[0][0] = 1.5: "),
    "text": ("/register", {**TRAINER, "batch_size": "x"}, "int_parsing", ["batch_size"], "batch_size = 'x': "),
    "null": ("/register-env", {**ENV, "desired_name": None}, "string_type", ["desired_name"], "desired_name = None: "),
    "a key too few": ("/disconnect-env", {}, "missing", ["env_id"], "env_id: Field required"),
    "not an object": ("/scored_data", [1], "model_attributes_type", [], "body = [1]: "),
    "in a list": ("/scored_data_list", [group(1), {**group(2), "scores": None}], "list_type", [1, "scores"], "[1].scores = None: "),
    "a message": ("/scored_data", group(1, messages=[[{"role": "user"}]]), "value_error", ["messages", 0, 0], "messages[0][0] = {'role': 'user'}: Message must have"),
}  # fmt: skip


@pytest.mark.parametrize(("path", "body", "kind", "location", "message"), MALFORMED.values(), ids=MALFORMED)
async def test_malformed_bodies_are_named(
    registered: httpx.AsyncClient, path: str, body: object, kind: str, location: list[object], message: str
) -> None:
    response = await registered.post(path, json=body)
    assert response.status_code == 422
    (entry,) = response.json()["detail"]
    assert (entry["type"], entry["loc"]) == (kind, ["body", *location])
    assert entry["msg"].startswith(message)
    assert (await registered.get("/status")).json()["queue_size"] == 0


@pytest.mark.parametrize(
    ("body", "kind", "location"),
    [(b"", "missing", ["body"]), (b'{"env_id": ', "json_invalid", ["body", 11]), (b"\xff", "json_invalid", ["body", 0]),
     (b"[" * 60_000, "json_invalid", ["body", 0])],
)  # fmt: skip
async def test_what_is_not_json(registered: httpx.AsyncClient, body: bytes, kind: str, location: list[object]) -> None:
    for path in ("/scored_data", "/disconnect-env"):
        response = await registered.post(path, content=body)
        assert response.status_code == 422
        assert (response.json()["detail"][0]["type"], response.json()["detail"][0]["loc"]) == (kind, location)


async def test_an_environment_of_no_finite_weight_is_refused(registered: httpx.AsyncClient) -> None:
    response = await registered.post("/register-env", content=json.dumps({**ENV, "weight": float("nan")}))
    assert response.status_code == 422
    assert response.json()["detail"][0]["msg"] == "weight = nan: must be finite"


async def test_a_large_wrong_value_is_not_sent_back_whole(registered: httpx.AsyncClient) -> None:
    response = await registered.post("/scored_data", json={"tokens": [[1] * 5000], "masks": [[1] * 5000]})
    assert response.status_code == 422
    assert len(response.content) < 2500


async def test_methods_and_paths_that_do_not_exist(client: httpx.AsyncClient) -> None:
    for method, path, code, detail in (
        ("GET", "/nothing", 404, "Not Found"),
        ("POST", "/batch", 405, "Method Not Allowed"),
        ("GET", "/register", 405, "Method Not Allowed"),
    ):
        response = await client.request(method, path)
        assert (response.status_code, response.json()) == (code, {"detail": detail})
    assert (await client.head("/batch")).status_code == 405


async def test_large_answers_are_compressed_for_who_accepts_it(registered: httpx.AsyncClient) -> None:
    await registered.post("/scored_data", json=group(1, size=4, length=64))
    plain = await registered.get("/latest_example", headers={"Accept-Encoding": "identity"})
    packed = await registered.get("/latest_example", headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.json() == plain.json()
    batch = await registered.get("/batch", headers={"Accept-Encoding": "gzip"})
    assert batch.headers["content-encoding"] == "gzip"
    assert batch.json() == {"batch": [plain.json()]}


async def test_status_env_accepts_a_compressed_body(registered: httpx.AsyncClient) -> None:
    body = gzip.compress(b'{"env_id": 0}')
    response = await registered.request("GET", "/status-env", content=body, headers={"Content-Encoding": "gzip"})
    assert response.json()["queue_size"] == 0


async def test_reset(registered: httpx.AsyncClient, broker: Broker) -> None:
    await registered.post("/register-env", json=ENV)
    await registered.post("/scored_data", json=group(1))
    response = await registered.get("/reset_data")
    assert (response.text, response.headers["content-type"]) == ("Reset successful", "text/plain; charset=utf-8")
    assert (await registered.get("/info")).json() == {"batch_size": -1, "max_token_len": -1}
    assert (await registered.get("/batch")).json()["status"] == "error"
    assert (await status_env(registered, 0)).json()["queue_size"] == 0
    await registered.post("/scored_data", json=group(1))
    assert (await registered.get("/status")).json()["queue_size"] == 1
    assert (await broker.redis.xrevrange(broker.keys.control, count=1))[0][1][b"event"] == b"reset"


async def test_other_settings_are_refused_while_a_trainer_is_active(
    registered: httpx.AsyncClient, broker: Broker
) -> None:
    assert (await registered.post("/register", json=TRAINER)).status_code == 200
    assert (await registered.post("/register", json={**TRAINER, "starting_step": 3})).status_code == 200
    other = {**TRAINER, "batch_size": 8}
    response = await registered.post("/register", json=other)
    assert response.status_code == 409
    assert "batch_size = 4 (not 8), and trainer http:127.0.0.1 was here 0 s ago" in response.json()["detail"]
    assert (await registered.get("/info")).json()["batch_size"] == 4

    await broker.redis.hset(broker.keys.trainers, "http:127.0.0.1", "0")  # a minute and more passes
    assert (await registered.post("/register", json=other)).status_code == 200
    await broker.redis.hset(broker.keys.trainers, "http:127.0.0.1", "0")
    async with broker.registry.writer("main", ttl_s=60):
        response = await registered.post("/register", json=TRAINER)
    assert "a trainer holds policy 'main'" in response.json()["detail"]


async def test_silent_environments_do_not_dilute_the_others(registered: httpx.AsyncClient, broker: Broker) -> None:
    for minimum in (None, 0.5):
        await registered.post("/register-env", json={**ENV, "min_batch_allocation": minimum})

    async def told() -> tuple[float, float]:
        answer = (await status_env(registered, 0)).json()
        return answer["env_weight"], answer["unallocated_fraction"]

    assert await told() == (0.5, 0.5)
    await silence(broker, 1)
    assert await told() == (1.0, 1.0)
    await registered.post("/scored_data", json=group(1, env_id=1))
    assert await told() == (0.5, 0.5)


async def test_health(registered: httpx.AsyncClient, run_name: str) -> None:
    await registered.post("/scored_data", json=group(1))
    await registered.post("/scored_data", json=group(1))
    assert (await registered.get("/healthz")).json() == {
        "status": "ok", "run": run_name, "groups": {"stored": 1, "duplicate": 1, "refused": 0},
        "lineage": {"joined": 0, "unknown": 2, "mismatched": 0, "sent": 0}, "dead": 0, "dropped": {}, "duplicates": {"-": 1},
    }  # fmt: skip


# -- the formulas, where no small run reaches ---------------------------------------------------------------------


NOW = 1e9


def environment(
    env_id: int, weight: float = 1.0, minimum: float | None = None, *, connected: bool = True, heard_at: float = NOW
) -> EnvRecord:
    return EnvRecord(env_id, "e", EnvConfig(100, "e", weight, 4, minimum), connected, heard_at=heard_at)


def told_of(envs: list[EnvRecord], status: QueueStatus) -> dict[str, Any]:
    """What the first of these environments is told."""
    return env_status(envs[0], "0", Alive(env for env in envs if is_alive(env, NOW)), status, CONFIG)


def queue(**sequences: int) -> QueueStatus:
    """Sequences in groups of 4, and one of 8 without an environment."""
    waiting = {name.removeprefix("e"): {4: count // 4} for name, count in sequences.items() if name != "undelivered"}
    return QueueStatus(0, 8 + sum(sequences.values()), 0, 0, 1, 1, {**waiting, "-": {8: 1}})


CONFIG = TrainerConfig("", "", 32, 64, "", 1, 0, 1)


def test_what_is_reserved_for_others_is_not_queued_for_this_one() -> None:
    envs = [environment(0), environment(1, minimum=0.5), environment(2, minimum=0.25, connected=False)]
    told = told_of(envs, queue(e0=8, e1=20, e2=4))
    assert told["max_group_size"] == 8
    assert told["queue_size"] == (8 + (24 - 16) + 8 + 8) // 4
    assert told["unallocated_fraction"] == 0.5
    assert told["self_queue_size"] == 2


def test_batches_formed_and_not_delivered_are_still_queued() -> None:
    assert told_of([environment(0)], queue(e0=8, undelivered=32))["queue_size"] == (8 + 32 + 8) // 4


def test_weights_of_nothing_do_not_divide_by_zero() -> None:
    for envs, weight in (
        ([environment(0, weight=-1.0)], 1.0),
        ([environment(0, connected=False)], 1.0),
        ([environment(0, weight=-1.0), environment(1)], 0.01),
    ):
        assert told_of(envs, queue())["env_weight"] == weight


def test_the_silent_count_for_nothing() -> None:
    silent = environment(1, minimum=0.5, heard_at=NOW - ALIVE_S)
    quiet = environment(2, minimum=0.25, heard_at=NOW - ALIVE_S + 1)
    told = told_of([environment(0), silent, quiet], queue(e0=8, e1=16))
    assert (told["env_weight"], told["unallocated_fraction"]) == (0.5, 0.75)
    assert told["queue_size"] == (8 + 16 + 8) // 4
