"""One rank of a trainer, as a process: two steps on the same groups, and what came of them."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from contextlib import closing
from multiprocessing import connection
from pathlib import Path
from typing import Any

from ports import free_port
from trainer_kit import PATIENCE_S, context, scored_group, stored

from lachesis.broker.records.groups import Group


def uneven_groups(seed: int) -> list[Group]:
    """Eleven sequences in groups of different sizes; one of them is much longer, one has no trained token."""
    rng = random.Random(seed)
    groups = [scored_group(rng, sequences=count, turns=2) for count in (4, 2, 5)]
    groups[0].tokens[1] += [9] * 40
    groups[0].masks[1] += [9] * 40
    assert groups[0].inference_logprobs
    groups[0].inference_logprobs[1] += [-5.5] * 40
    groups[1].masks[0] = [-100] * len(groups[1].masks[0])
    return [stored(group) for group in groups]


def train(model: Path, overrides: Sequence[str], ranks: int) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Metrics of each step and the weights after them, as rank 0 of a world of `ranks` sees them."""
    port = free_port()
    ours, theirs = context.Pipe()
    processes = [
        context.Process(target=_rank, args=(rank, ranks, port, model, list(overrides), theirs)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    theirs.close()
    try:
        ready = connection.wait([ours, *(process.sentinel for process in processes)], PATIENCE_S)
        assert ours in ready, "a rank died, or all hang"
        found: tuple[list[dict[str, float]], dict[str, Any]] = ours.recv()
        for process in processes:
            process.join(PATIENCE_S)
        assert [process.exitcode for process in processes] == [0] * ranks
        return found
    finally:
        for process in processes:
            process.kill()


def _rank(rank: int, size: int, port: int, model: Path, overrides: list[str], pipe: connection.Connection) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **{k: str(v) for k, v in place.items()}})
    from functools import partial

    from lachesis.trainer.algo.learner import Learner
    from lachesis.trainer.algo.rank_group import RankGroup
    from lachesis.trainer.config.compose import compose_config
    from lachesis.trainer.data.collate import to_batch
    from lachesis.trainer.engine.verl_engine import build_engine

    words = [f"actor_rollout_ref.model.path={model}", "actor_rollout_ref.actor.optim.lr=1e-2", *overrides]
    config = compose_config(words, device="cpu")
    engine = build_engine(config)
    rank_group = RankGroup(engine, Learner(engine, config.algorithm))
    mapped = partial(to_batch, vocab_size=320, max_tokens=128)
    if rank:
        return rank_group.follow(mapped)
    with rank_group:
        with closing(rank_group.tensors()) as tensors:
            next(tensors)  # as where a version is refused for its first tensor: the ranks stay in step
        metrics = [
            rank_group.forward_backward(groups, mapped(groups)) | rank_group.step()
            for groups in (uneven_groups(1), uneven_groups(2))
        ]
        weights = {name: tensor.detach().clone().numpy() for name, tensor in rank_group.tensors()}
    pipe.send((metrics, weights))
    return None
