"""The front door before servers that fail in every way on command; before real ones it is shown in test_agent.py."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
import roles
from aiohttp import web
from doors import REQUEST, Upstream, answers, door, good, hangs_up, post

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.records.entries import tokens_digest
from lachesis.broker.records.versions import WeightsEntry

pytestmark = pytest.mark.anyio


async def test_an_answer_and_its_lineage(broker: Broker) -> None:
    async with Upstream(broker, "s", answers).running() as server, door(broker) as client:
        status, answer = await post(client, rid="mine")
        [lineage] = await broker.lineage.look_up([tokens_digest([1, 2, 7, 8])])

    assert (status, answer) == (200, good())
    assert lineage is not None
    assert (lineage.v_min, lineage.v_max, lineage.spans) == (3, 4, ((3, 0, 1), (4, 1, 2)))
    assert len(server.bodies[0].pop("rid")) == 32
    assert server.bodies == [REQUEST]


async def test_a_request_waits_for_a_server(broker: Broker) -> None:
    async with door(broker) as client:
        waiting = asyncio.create_task(post(client))
        with anyio.fail_after(60):
            while (await (await client.get("/health")).json())["waiting"] != 1:  # noqa: ASYNC110
                await anyio.sleep(0.02)
        async with Upstream(broker, "s", answers).running():
            assert (await waiting)[0] == 200


async def test_patience_ends_with_a_clear_503(broker: Broker) -> None:
    async with door(broker, patience_s=0.3) as client:
        status, answer = await post(client)

    assert status == 503
    assert answer["error"]["message"] == "no server could answer within 0.3 s"


async def test_an_abort_is_tried_again(broker: Broker) -> None:
    async def aborts(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response(good(finish_reason={"type": "abort", "message": "paused"}))

    async with Upstream(broker, "s", aborts, aborts, answers).running() as server, door(broker) as client:
        assert await post(client) == (200, good())

    assert len({body["rid"] for body in server.bodies}) == 3


async def test_a_server_that_refuses_or_hangs_up_is_left_for_another(broker: Broker) -> None:
    async def refuses(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.Response(status=503)

    async with (
        Upstream(broker, "a", refuses).running() as refusing,
        Upstream(broker, "b", hangs_up).running() as hanging,
        Upstream(broker, "c", answers).running(),
        door(broker) as client,
    ):
        for token in range(24):  # prompts of their own, so that each server is the first choice of some
            assert (await post(client, input_ids=[token]))[0] == 200

    assert refusing.bodies
    assert hanging.bodies


async def test_a_request_that_loses_two_servers_is_taken_for_the_cause(broker: Broker) -> None:
    async with Upstream(broker, "s", hangs_up).running() as server, door(broker) as client:
        status, answer = await post(client)

    assert status == 502
    assert "2 servers were lost while they ran this request" in answer["error"]["message"]
    assert len(server.bodies) == 2


async def test_null_log_probs_are_never_handed_out(broker: Broker) -> None:
    async def broken(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response(good(output_token_logprobs=[[None, 0, None], [None, 0, None]]))

    async with Upstream(broker, "s", broken).running(), door(broker) as client:
        status, answer = await post(client)

    assert status == 502
    assert "null log-probs" in answer["error"]["message"]


async def test_an_id_beyond_the_vocabulary_does_not_reach_a_server(broker: Broker) -> None:
    async with Upstream(broker, "s", answers).running() as server, door(broker) as client:
        status, answer = await post(client, input_ids=[1, 320])

    assert status == 400
    assert {key: answer["error"][key] for key in ("field", "value", "rule")} == {
        "field": "input_ids[1]",
        "value": 320,
        "rule": "token ids go from 0 to 319",
    }
    assert server.bodies == []


async def test_only_fields_that_are_known_reach_a_server(broker: Broker) -> None:
    """And those that were asked for; what OpenAI's clients may send for nothing is left out."""
    chat = {"messages": [{"role": "user", "content": "hi"}], "user": "me", "store": True, "metadata": {"a": "b"}}

    async def completes(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"choices": []})

    async with (
        Upstream(broker, "s", answers, completes).running() as server,
        door(broker) as client,
        door(broker, pass_fields="image_data,lora_path") as lenient,
    ):
        status, answer = await post(client, image_data="/etc/passwd")
        assert (status, answer["error"]["param"], answer["error"]["value"]) == (400, "image_data", "/etc/passwd")
        assert answer["error"]["message"].startswith("image_data = '/etc/passwd': is not taken here")
        assert server.bodies == []
        assert (await post(lenient, image_data="x"))[0] == 200
        async with client.post("/v1/chat/completions", json=chat) as response:
            assert response.status == 200

    passed, asked = server.bodies
    assert passed["image_data"] == "x"
    assert asked["messages"] == chat["messages"]
    assert not asked.keys() & {"user", "store", "metadata"}


async def test_errors_of_a_server_are_passed_on(broker: Broker) -> None:
    async def objects(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"error": {"message": "temperature must be non-negative"}}, status=400)

    async with Upstream(broker, "s", objects).running(), door(broker) as client:
        assert await post(client) == (400, {"error": {"message": "temperature must be non-negative"}})


async def test_what_a_client_left_is_cancelled(broker: Broker) -> None:
    arrived, cancelled = anyio.Event(), anyio.Event()

    async def takes_long(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        arrived.set()
        try:
            await anyio.sleep_forever()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return web.Response()

    async with Upstream(broker, "s", takes_long).running(), door(broker) as client:
        request = asyncio.create_task(post(client))
        with anyio.fail_after(60):
            await arrived.wait()
            request.cancel()
            await cancelled.wait()


async def test_a_stream_is_passed_on_piece_by_piece(broker: Broker) -> None:
    go_on = anyio.Event()

    async def streams(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await go_on.wait()
        await response.write(b"data: [DONE]\n\n")
        return response

    async with (
        Upstream(broker, "s", hangs_up, streams).running(),
        door(broker) as client,
        client.post("/v1/completions", json={"prompt": "hi", "stream": True}) as response,
    ):
        assert response.content_type == "text/event-stream"
        assert await response.content.readany() == b"data: 1\n\n"
        go_on.set()
        assert await response.read() == b"data: [DONE]\n\n"


async def test_a_stream_that_breaks_is_seen_to_break(broker: Broker) -> None:
    async def breaks(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        return await hangs_up(request, body)

    async with Upstream(broker, "s", breaks).running() as server, door(broker) as client:
        with pytest.raises(aiohttp.ClientPayloadError):
            async with client.post("/generate", json=REQUEST | {"stream": True}) as response:
                await response.read()

    assert len(server.bodies) == 1


async def test_only_what_is_meant_for_clients_is_served(broker: Broker) -> None:
    async with Upstream(broker, "s", answers).running() as server, door(broker) as client:
        for path in (
            "/server_info",
            "/get_server_info",
            "/pause_generation",
            "/update_weights_from_disk",
            "/flush_cache",
        ):
            assert (await client.post(path, json={})).status == 404
        assert (await client.put("/generate", json=REQUEST)).status == 200
        models = await (await client.get("/v1/models")).json()
        health = await (await client.get("/healthz")).json()

    assert len(server.bodies) == 1
    assert [model["id"] for model in models["data"]] == ["main"]
    assert (health["status"], health["ready"], health["waiting"]) == ("ok", 1, 0)


async def test_without_redis_requests_are_answered_and_lost_lineage_is_counted(redis_server: EmbeddedRedis) -> None:
    broker = await Broker.connect(redis_server.url)
    async with Upstream(broker, "s", answers).running(), door(broker) as client:
        assert (await post(client))[0] == 200
        redis_server.stop()
        assert (await post(client))[0] == 200
        health = await (await client.get("/health")).json()
    await broker.aclose()

    assert health["lineage_lost"] == 1


async def test_a_restart_on_an_inherited_socket_refuses_nobody(broker: Broker, tmp_path: Path) -> None:
    listener = roles.listener()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    options = ("--redis-url", broker.url, "--run", broker.keys.run, "--fd", str(listener.fileno()))

    async def ask() -> int:
        async with aiohttp.ClientSession(url) as client:
            return (await post(client))[0]

    async with Upstream(broker, "s", answers).running():
        process = roles.front_door(tmp_path / "log", *options, inherit=listener)
        try:
            assert await ask() == 200
            process.kill()
            meanwhile = [asyncio.create_task(ask()) for _ in range(20)]
            process = roles.front_door(tmp_path / "log", *options, inherit=listener)
            assert await asyncio.gather(*meanwhile) == [200] * 20
            assert await anyio.to_thread.run_sync(process.stop) == 0
        finally:
            process.kill()
            listener.close()


async def test_an_occupied_port_is_named(broker: Broker, tmp_path: Path) -> None:
    with roles.listener() as taken:
        port = taken.getsockname()[1]
        process = roles.front_door(tmp_path / "log", "--redis-url", broker.url, "--port", str(port))
        assert await anyio.to_thread.run_sync(process.process.wait) == 1

    assert f"port = {port}: another program listens on 127.0.0.1:{port}" in (tmp_path / "log").read_text()


async def test_only_who_has_a_token_of_the_run_is_answered(broker: Broker) -> None:
    environment, record = await broker.tokens.create("environment")
    trainer, _ = await broker.tokens.create("trainer")
    async with Upstream(broker, "s", answers).running() as server, door(broker, require_tokens=True) as client:

        async def status(path: str, token: str | None) -> tuple[int, str]:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            async with client.post(path, json=REQUEST, headers=headers) as response:
                return response.status, response.headers.get("WWW-Authenticate", "")

        assert await status("/generate", environment) == (200, "")
        assert await status("/generate", None) == (401, 'Bearer realm="lachesis"')
        assert (await status("/v1/completions", "wrong"))[0] == 401
        assert await status("/v1/chat/completions", trainer) == (403, "")
        assert (await client.get("/v1/models")).status == 401
        assert (await client.get("/health")).status == 200
        await broker.tokens.revoke(record.name)
    assert len(server.bodies) == 1
    async with Upstream(broker, "s", answers).running(), door(broker) as client:
        assert (await post(client))[0] == 401  # without the setting, too: the run has tokens
    other = broker.for_run(f"{broker.keys.run}-b")
    async with Upstream(other, "s", answers).running(), door(other) as client:
        assert (await post(client))[0] == 200


async def test_tokens_outlast_redis(redis_server: EmbeddedRedis) -> None:
    broker = await Broker.connect(redis_server.url)
    token, _ = await broker.tokens.create("admin")
    headers = {"Authorization": f"Bearer {token}"}
    async with Upstream(broker, "s", answers).running(), door(broker, require_tokens=True) as client:
        async with client.post("/generate", json=REQUEST, headers=headers) as response:
            assert response.status == 200
        redis_server.stop()
        async with client.post("/generate", json=REQUEST, headers=headers) as response:
            assert response.status == 200
        async with client.post("/generate", json=REQUEST) as response:
            assert response.status == 401
    await broker.aclose()


async def test_it_listens_where_atropos_environments_look(broker: Broker, tmp_path: Path) -> None:
    options = ("--redis-url", broker.url, "--run", broker.keys.run, "--port", "9005", "--atropos-ports")
    process = roles.front_door(tmp_path / "log", *options)
    try:
        async with aiohttp.ClientSession() as client:
            for port in (9004, 9005, 9006, 9007):
                with anyio.fail_after(60):
                    while True:
                        try:
                            async with client.get(f"http://127.0.0.1:{port}/health") as response:
                                assert response.status == 200
                                break
                        except aiohttp.ClientConnectionError:
                            await anyio.sleep(0.05)
        assert await anyio.to_thread.run_sync(process.stop) == 0
    finally:
        process.kill()


async def test_a_request_waits_for_a_server_that_is_new_enough(broker: Broker) -> None:
    await broker.weights.publish("main", WeightsEntry(6, 6, "file:///v", "0", 1, "F32", 0))
    async with (
        Upstream(broker, "s", answers).running(),  # serves version 4
        door(broker, max_lag=1, catch_up_s=0.0, patience_s=2.0) as late,
        door(broker, max_lag=2, catch_up_s=0.0) as client,
    ):
        assert (await post(client))[0] == 200
        assert (await post(late))[0] == 503


async def test_vllms_shape_is_answered_in_vllms_shape(broker: Broker) -> None:
    body = {"prompt": {"prompt_token_ids": [1, 2]}, "logprobs": 0, "max_tokens": 2, "n": 1}
    async with Upstream(broker, "s", answers).running() as server, door(broker) as client:
        async with client.post("/generate", json=body) as response:
            assert await response.json() == {
                "text": ["ab"], "prompt": None, "token_ids": [[7, 8]], "finish_reasons": ["length"],
                "logprobs": [[[{"7": -0.5}], [{"8": -1.5}]]],
            }  # fmt: skip
        async with client.post("/generate", json=body | {"prompt": [320]}) as response:
            assert (await response.json())["error"]["field"] == "input_ids[0]"
        assert (await broker.lineage.look_up([tokens_digest([1, 2, 7, 8])]))[0] is not None
    assert server.bodies[0]["sampling_params"] == {"max_new_tokens": 2, "n": 1}


async def test_without_room_for_lineage_nothing_is_asked_for_it(broker: Broker) -> None:
    async with (
        Upstream(broker, "s", answers).running() as server,
        door(broker, lineage_bytes=0) as client,
        client.post("/generate", json={"text": "hi"}) as response,
    ):
        assert response.status == 200
    assert server.bodies[0].keys() == {"text", "rid"}
    assert await broker.redis.exists(broker.keys.lineage) == 0
