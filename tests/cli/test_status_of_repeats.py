"""`lachesis status` tells which environment's posts are dropped as repeats."""

from __future__ import annotations

import json

import pytest
from scored import group

from lachesis.broker import EmbeddedRedis
from lachesis.broker.client import connect_blocking
from lachesis.broker.records.registrations import EnvConfig
from lachesis.cli.commands.status import main


def test_posts_dropped_as_repeats_are_told_by_environment(
    shared_redis: EmbeddedRedis, run_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--redis-url", shared_redis.url, "--run", run_name)
    with connect_blocking(shared_redis.url, run_name) as blocking:
        for nonce in ("one", "two"):
            blocking.call(blocking.broker.registry.register_env, EnvConfig(16, "sums", 1.0, 2), nonce)
        for number in (1, 2, 2, 2):
            blocking.call(blocking.broker.queue.put, f"g{number}", group(number, env_id=number % 2), v_min=0, v_max=0)
    assert main(where) == 1  # nobody trains
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    (repeating,) = (line for line in lines if line.startswith("environment 0 sums_0 groups of 2 heard "))
    assert repeating.endswith(" ago 2 posts dropped as repeats")
    (other,) = (line for line in lines if line.startswith("environment 1 sums_1 groups of 2 heard "))
    assert other.endswith(" ago")
    assert main([*where, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["queue"]["duplicates"] == {"0": 2}
