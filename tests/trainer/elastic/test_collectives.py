"""Sums across processes over gloo and, where there are GPUs, NCCL; and sums that don't show their order."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lachesis.broker import BlockingBroker, EmbeddedRedis, connect_blocking
from lachesis.broker.errors import ConfigurationError
from lachesis.broker.records.steps import Membership
from lachesis.trainer.config.rules import Backend
from lachesis.trainer.elastic.collectives import base
from lachesis.trainer.elastic.collectives.base import Reducer
from lachesis.trainer.elastic.collectives.rendezvous import address_towards, connect
from lachesis.trainer.elastic.collectives.reproducible_sum import ReproducibleSum, total


class Enough(Exception):
    """What the tests' watch raises."""


def nothing() -> None:
    pass


def enough() -> None:
    raise Enough


def connected(broker: BlockingBroker, over: Backend, world: int, epoch: int = 1) -> list[Reducer]:
    def one(rank: int) -> Reducer:
        if over == "nccl":
            torch.cuda.set_device(rank)  # of this thread
        return connect(over, broker, Membership("main", f"r{rank}", 1, epoch), rank, world, nothing)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))


def gpus(count: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"NCCL between {count} replicas: {count} GPUs")


WAYS = [
    *(pytest.param("gloo", world, "cpu", id=f"gloo-{world}") for world in (2, 3)),
    *(
        pytest.param("nccl", world, device, marks=gpus(world), id=f"nccl-{world}-{device}")
        for world in (2, 3)
        for device in ("cpu", "cuda")
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8])
@pytest.mark.parametrize(("over", "world", "device"), WAYS)
def test_all_get_the_sum_bit_for_bit(
    shared_redis: EmbeddedRedis,
    run_name: str,
    over: Backend,
    world: int,
    device: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base, "BUCKET_BYTES", 1000)
    terms = [[torch.randn(n).mul(10).abs().to(dtype) for n in (0, 1, 13, 700, 20_000)] for _ in range(world)]
    expected = [torch.stack(parts).sum(0, dtype=dtype) for parts in zip(*terms, strict=True)]
    terms = [
        [part.to(f"{device}:{rank}" if device == "cuda" else device) for part in t] for rank, t in enumerate(terms)
    ]
    with connect_blocking(shared_redis.url, run_name) as broker:
        reducers = connected(broker, over, world)
        with ThreadPoolExecutor(world) as pool:
            list(pool.map(lambda pair: pair[0].sum(pair[1], nothing), zip(reducers, terms, strict=True)))
        for mine in terms:
            assert all(a.cpu().equal(b.cpu()) for a, b in zip(mine, terms[0], strict=True))
            assert all(a.cpu().allclose(b, atol=0.01) for a, b in zip(mine, expected, strict=True))
        for one in reducers:
            one.close()


TWO = [pytest.param("gloo"), pytest.param("nccl", marks=gpus(2))]


@pytest.mark.parametrize("over", TWO)
def test_tensors_are_handed_over(shared_redis: EmbeddedRedis, run_name: str, over: Backend) -> None:
    sent, received = [torch.randn(300), torch.randn(4).double()], [torch.zeros(300), torch.zeros(4).double()]
    with connect_blocking(shared_redis.url, run_name) as broker:
        first, second = connected(broker, over, 2)
        with ThreadPoolExecutor(2) as pool:
            sending = pool.submit(first.send, sent, 1, nothing)
            second.receive(received, 0, nothing)
            sending.result()
        assert all(a.equal(b) for a, b in zip(sent, received, strict=True))
        first.close()
        second.close()


@pytest.mark.parametrize("over", TWO)
def test_waiting_ends_when_the_watch_says_so(shared_redis: EmbeddedRedis, run_name: str, over: Backend) -> None:
    with connect_blocking(shared_redis.url, run_name) as broker:
        first, second = connected(broker, over, 2)
        with pytest.raises(Enough):
            first.sum([torch.ones(3)], enough)
        first.close()
        second.close()
        with pytest.raises(Enough):  # nobody else comes
            connect(over, broker, Membership("main", "r0", 1, 2), 0, 2, enough)


def test_replicas_that_sum_in_different_ways_are_told(shared_redis: EmbeddedRedis, run_name: str) -> None:
    with connect_blocking(shared_redis.url, run_name) as broker:
        me = Membership("main", "r1", 1, 1)
        broker.call(broker.broker.members.put_address, me, "0:over:0", b"nccl")
        with pytest.raises(ConfigurationError, match="'gloo', and of replica 0 it is 'nccl': must be the same"):
            connect("gloo", broker, me, 1, 2, nothing)


@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="a GPU that two replicas share")
def test_replicas_that_share_a_gpu_are_told(shared_redis: EmbeddedRedis, run_name: str) -> None:
    with connect_blocking(shared_redis.url, run_name) as broker:
        me = Membership("main", "r1", 1, 1)
        uuid = str(torch.cuda.get_device_properties(0).uuid).encode()
        for word, value in (("0:over:0", b"nccl"), ("0:gpu:0", uuid)):
            broker.call(broker.broker.members.put_address, me, word, value)
        with pytest.raises(ConfigurationError, match="replicas 0 and 1 both have GPU"):
            connect("nccl", broker, me, 1, 2, nothing)


def test_the_address_is_one_of_this_machine() -> None:
    assert address_towards("unix:///tmp/redis.sock") == address_towards("redis://127.0.0.1:6379/0") == "127.0.0.1"


finite = st.floats(-1e6, 1e6, allow_subnormal=False)


@given(st.lists(st.lists(finite, min_size=3, max_size=3), min_size=1, max_size=20), st.randoms())
def test_an_exact_sum_does_not_depend_on_order_or_grouping(rows: list[list[float]], rng: random.Random) -> None:
    def summed(order: list[list[float]], groups: int) -> Tensor:
        parts = [ReproducibleSum(3) for _ in range(groups)]
        for row in order:
            rng.choice(parts).add(torch.tensor(row, dtype=torch.float64))
        return total(sum((part.parts for part in parts), torch.zeros(2, 3, dtype=torch.float64)))

    expected = summed(rows, 1)
    shuffled = list(rows)
    rng.shuffle(shuffled)
    assert summed(shuffled, rng.randint(1, 4)).equal(expected)
    plain = torch.tensor(rows, dtype=torch.float64).sum(0)
    assert expected.allclose(plain, rtol=1e-12, atol=1e-9)


@given(st.lists(st.floats(-1.0, 1.0, width=32), min_size=1, max_size=50))
def test_sums_of_float32_gradients_are_right_to_the_last_bit_of_float32(values: list[float]) -> None:
    found = ReproducibleSum(1)
    for value in values:
        found.add(torch.tensor([value], dtype=torch.float32))
    expected = torch.tensor(values, dtype=torch.float64).sum()
    assert abs(total(found.parts)[0] - expected) <= max(2.0**-52 * len(values), float(abs(expected)) * 2.0**-50)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_shows(value: float) -> None:
    found = ReproducibleSum(2)
    found.add(torch.tensor([value, 1.0]))
    found.add(torch.tensor([2.0]), start=1)
    assert not total(found.parts)[0].isfinite()
    assert total(found.parts)[1] == 3.0
