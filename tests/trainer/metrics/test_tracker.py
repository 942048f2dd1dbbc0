"""What a step tells: the run's metrics in short names, trackers in verl's, and examples in words."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from msgspec import structs
from trainer_kit import scored_group, stored

from lachesis.broker import BlockingBroker
from lachesis.broker.errors import ConfigurationError
from lachesis.broker.records.groups import Group, Spans
from lachesis.broker.records.registrations import EnvConfig
from lachesis.broker.records.steps import LedgerEntry
from lachesis.cli.up.run import start_over
from lachesis.service.logs import configure_logging
from lachesis.trainer.config import tracking_backends
from lachesis.trainer.config.plan import make_plan
from lachesis.trainer.config.tracking_backends import BACKENDS, check_backends
from lachesis.trainer.data.batch import TrainingBatch
from lachesis.trainer.data.collate import to_batch
from lachesis.trainer.metrics.reporter import Reporter
from lachesis.trainer.metrics.samples import SHOWN, examples
from lachesis.trainer.metrics.step import VERLS, batch_metrics, env_scores, mfu, under_verls_names
from lachesis.trainer.metrics.tracker import Tracker
from lachesis.trainer.settings import TrainerSettings

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lachesis.trainer.algo.learner import Estimated
    from lachesis.trainer.engine.verl_engine import Engine

ENTRY = LedgerEntry(7, ("a",), 8, 1, 6, 7, 3, 3, "me", 1.5, 0.25, 1.0)


def some_groups(*, count: int = 2) -> list[Group]:
    rng = random.Random(5)
    groups = [stored(scored_group(rng, turns=2), v_min=3) for _ in range(count)]
    for number, group in enumerate(groups):
        group.v_max = 3 + 2 * number
    return groups


def mapped(groups: list[Group]) -> TrainingBatch:
    return to_batch(groups, vocab_size=320, max_tokens=128)


def estimate(batch: TrainingBatch, advantage: float) -> Estimated:
    from lachesis.trainer.algo.learner import Estimated

    return Estimated(batch, batch.response_mask, batch.response_mask * advantage)


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VERL_FILE_LOGGER_PATH", "TENSORBOARD_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.verl
def test_a_steps_data_is_described_as_verl_does(built: Callable[..., tuple[Engine, DictConfig]]) -> None:
    """The same numbers as verl's own compute_data_metrics on the same sequences."""
    import torch
    from verl import DataProto
    from verl.trainer.ppo.metric_utils import compute_data_metrics
    from verl_driver import padded_batch

    groups = some_groups()
    batch = mapped(groups)
    tensors, _ = padded_batch(groups)
    advantages = torch.randn(tensors["response_mask"].shape)
    theirs = compute_data_metrics(
        DataProto.from_dict(
            tensors
            | {"advantages": advantages, "returns": advantages, "token_level_rewards": tensors["token_level_scores"]}
        ),
        use_critic=False,
    )
    from lachesis.trainer.algo.learner import Estimated

    ours = batch_metrics(ENTRY, groups, batch, Estimated(batch, batch.response_mask, advantages))
    same = ours.keys() & theirs.keys()
    assert same == {
        f"{name}/{what}"
        for name in ("critic/score", "critic/rewards", "critic/advantages", "response_length", "prompt_length")
        for what in ("mean", "max", "min")
    }
    assert {name: ours[name] for name in same} == pytest.approx({name: float(theirs[name]) for name in same}, rel=1e-6)


def test_staleness_is_told_in_versions() -> None:
    groups = some_groups()
    values = batch_metrics(ENTRY, groups, mapped(groups), None)
    staleness = "training/off_policy/trajectory_staleness"
    assert [values[f"{staleness}/{what}"] for what in ("mean", "max", "min")] == [2, 3, 1]  # 6 - 3, 6 - 5
    assert [values[f"{staleness}_worst/{what}"] for what in ("mean", "max", "min")] == [3, 3, 3]
    assert [values[f"training/off_policy/trajectory_spans/{what}"] for what in ("mean", "max", "min")] == [2, 3, 1]
    assert (values["lag"], values["lag_mean"], values["reward"]) == (3, 3, 1.5)
    assert values["version_known"] == 0
    assert "critic/advantages/mean" not in values


def test_staleness_is_that_of_the_tokens_where_their_versions_are_known() -> None:
    """Two groups of two sequences, twelve tokens each, the last eight trained: versions 3 and 5 in all, now at 6."""
    known: dict[str, list[Spans]] = {
        "known": [((3, 0, 6), (5, 6, 12)), ((5, 4, 12),)],  # a prompt's versions do not count: 2 x 3 + 6 x 5, 8 x 5
        "half": [((4, 4, 12),), ((5, 4, 8),)],  # 8 x 4; 4 x 5, and 4 that nobody knows: from 3 to 5
    }
    groups = [
        Group(
            gid=gid, env=None, v_min=3, v_max=5, tokens=[np.arange(12)] * 2,
            masks=[np.array([-100] * 4 + [1] * 8)] * 2, scores=np.array([0.0, 1.0]),
            advantages=None, ref_logprobs=None, inference_logprobs=None, rest={}, versions=versions,
        )
        for gid, versions in known.items()
    ]  # fmt: skip
    values = batch_metrics(ENTRY, groups, mapped(groups), None)
    staleness = "training/off_policy/trajectory_staleness"
    assert [values[f"{staleness}/{what}"] for what in ("mean", "max", "min")] == [1.25, 2, 1]  # 1, 1, 2, 1
    assert [values[f"{staleness}_worst/{what}"] for what in ("mean", "max", "min")] == [2.25, 3, 1]  # 3, 1, 2, 3
    assert [values[f"training/off_policy/trajectory_spans/{what}"] for what in ("mean", "max", "min")] == [2, 3, 1]
    assert values["lag_mean"] == 6 - (2 * 3 + 6 * 5 + 8 * 5 + 8 * 4 + 4 * 5 + 4 * 3) / 32
    assert values["version_known"] == 28 / 32


def test_scores_are_told_by_environment_however_often_it_registered() -> None:
    groups = some_groups(count=4)
    for group, env, score in zip(groups, (0, 1, 7, None), (1.0, 0.0, 0.25, 0.5), strict=True):
        group.env, group.scores = env, np.full(4, score)
    names = {0: "sums", 1: "sums", 7: "a/b: words"}
    assert env_scores(groups, names) == {"env_score/a_b_words": 0.25, "env_score/sums": 0.5, "env_score/unnamed": 0.5}
    assert env_scores(groups[:1], {}) == {"env_score/0": 1.0}


@pytest.mark.verl
@pytest.mark.usefixtures("clean_environment")
def test_a_step_tells_scores_by_environment_and_the_tracker_of_evaluations_since_the_step_before(
    blocking: BlockingBroker, configured: Callable[..., DictConfig], tmp_path: Path
) -> None:
    broker, metric = blocking.broker, blocking.broker.journal.metric
    env = blocking.call(broker.registry.register_env, EnvConfig(16, "sums", 1.0, 4), "nonce")
    blocking.call(metric, "eval", {"env": "sums", "version": 2, "accuracy": 0.125, "n": 10})  # told of already
    blocking.call(metric, "step", {"step": 6})
    blocking.call(metric, "eval", {"env": "sums", "version": 6, "accuracy": 0.75, "n": 10})
    config = configured("lachesis.examples_every=1", "lachesis.num_steps=9")
    plan = make_plan(config, TrainerSettings(state_dir=tmp_path, run=broker.keys.run))
    groups = some_groups()
    for group in groups:
        group.env = env.env_id
    engine: Any = SimpleNamespace(flops_counter=None, tokenizer=Letters)
    values = {"loss": 0.5, "grad_norm": 1.0, "wait_s": 1.0, "step_s": 2.0, "train_s": 0.5, "version": 6}
    with Tracker(("file",), project="p", name="n", folder=tmp_path, config={}) as tracker:
        reporter = Reporter(blocking, plan, engine, tracker, configure_logging("test"))
        for step in (7, 8):
            batch = mapped(groups)
            entry = structs.replace(ENTRY, step=step)
            reporter.report(batch_metrics(entry, groups, batch, None) | values, groups, batch, None)
    (file,) = tmp_path.glob("*.jsonl")
    first, second = (json.loads(line)["data"] for line in file.read_text().splitlines())
    assert (first["val-core/sums/acc/mean@1"], first["val-aux/version"]) == (0.75, 6)
    assert "val-core/sums/acc/mean@1" not in second
    assert first["env_score/sums"] == pytest.approx(float(np.mean([group.scores for group in groups])))
    _, steps = blocking.call(broker.journal.newest, 1, {"step"})
    assert float(steps[0][1]["env_score/sums"]) == pytest.approx(first["env_score/sums"], abs=1e-5)
    _, told = blocking.call(broker.journal.newest, 1, {"example"})
    assert told[0][1]["env_name"] == "sums"


def test_trackers_get_verls_names_and_ours_only_for_what_is_ours() -> None:
    told = under_verls_names(
        {"loss": 1.0, "entropy": 2.0, "actor/entropy": 3.0, "queue": 4, "reward": 5.0, "rollout_corr/kl": 6.0}
    )
    assert told == {
        "actor/loss": 1.0, "actor/entropy": 3.0, "lachesis/queue": 4, "rollout_corr/kl": 6.0
    }  # fmt: skip
    assert len(set(VERLS.values())) == len(VERLS)


@pytest.mark.verl
def test_the_backends_are_verls() -> None:
    from verl.utils.tracking import Tracking

    assert list(BACKENDS) == sorted(Tracking.supported_backend, key=list(BACKENDS).index)
    assert set(BACKENDS) == set(Tracking.supported_backend)


@pytest.mark.verl
@pytest.mark.usefixtures("clean_environment")
def test_what_is_tracked_can_be_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = {"reward": 0.5, "loss": -0.25, "wait_share": 0.125, "critic/rewards/mean": 0.5}
    with Tracker(("file", "tensorboard"), project="p", name="n", folder=tmp_path, config={}) as tracker:
        for step in (3, 4):
            tracker.log(step, values | {"loss": step / 4})
    (file,) = tmp_path.glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4]
    assert lines[1]["data"] == {
        "actor/loss": 1.0, "fully_async/trainer/idle_ratio": 0.125, "critic/rewards/mean": 0.5
    }  # fmt: skip
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(lines[1]["data"])
    assert [(event.step, event.value) for event in events.Scalars("actor/loss")] == [(3, 0.75), (4, 1.0)]


@pytest.mark.verl
@pytest.mark.usefixtures("clean_environment")
def test_a_run_that_starts_over_forgets_what_it_tracked(
    blocking: BlockingBroker, configured: Callable[..., DictConfig], tmp_path: Path
) -> None:
    """And its weights and checkpoints; not what is another run's."""
    mine, other = (
        make_plan(configured(), TrainerSettings(state_dir=tmp_path, run=run))
        for run in (blocking.broker.keys.run, f"{blocking.broker.keys.run}-2")
    )
    with Tracker(("file", "tensorboard"), project="p", name="n", folder=mine.tracking_dir, config={}) as tracker:
        tracker.log(1, {"loss": 1.0})
    assert list(mine.tracking_dir.glob("*.jsonl"))
    for plan in (mine, other):
        for folder in (plan.tracking_dir, plan.weights_dir, plan.checkpoint_dir):
            folder.mkdir(parents=True, exist_ok=True)
    blocking.call(start_over, blocking.broker, tmp_path)
    left = {place.name: [run.name for run in place.iterdir()] for place in tmp_path.iterdir()}
    assert left == {"tracking": [other.run], "weights": [other.run], "checkpoints": [other.run]}


def test_without_backends_nothing_is_made(tmp_path: Path) -> None:
    with Tracker((), project="p", name="n", folder=tmp_path / "t", config={}) as tracker:
        tracker.log(1, {"loss": 1.0})
    assert not (tmp_path / "t").exists()


def test_backends_that_cannot_work_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_backends(["file", "console"]) == ("file", "console")
    assert check_backends("file") == ("file",)
    assert check_backends(None) == ()
    with pytest.raises(ConfigurationError, match=r"no backend 'visdom'; verl has console, file, tensorboard"):
        check_backends(["visdom"])
    monkeypatch.setitem(tracking_backends.BACKENDS, "wandb", "not_there")
    with pytest.raises(ConfigurationError, match="wandb needs a package that is not installed: pip install not_there"):
        check_backends(["wandb"])


@pytest.mark.verl
@pytest.mark.usefixtures("clean_environment")
def test_a_tracker_that_does_not_start_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigurationError, match=r"lachesis.tracking = \['tensorboard'\]: .*file"):
        Tracker(("tensorboard",), project="p", name="n", folder=tmp_path / "file", config={})


@pytest.mark.verl
def test_operations_are_counted_by_verl() -> None:
    from transformers import Qwen2Config
    from verl.utils.flops_counter import FlopsCounter

    batch = mapped(some_groups())
    counter = FlopsCounter(Qwen2Config(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2))
    assert 0 < mfu(counter, batch, 2.0) == pytest.approx(mfu(counter, batch, 1.0) / 2)


class Letters:
    """A tokenizer that can be read."""

    @staticmethod
    def decode(ids: list[int]) -> str:
        return "".join(chr(0x100 + token) for token in ids)


@pytest.mark.verl
def test_examples_are_the_best_and_the_worst_of_the_most_divided_groups() -> None:
    groups = some_groups(count=3)
    for group, scores in zip(groups, ([1, 1, 1, 1], [0, 9, 4, 5], [2, 2, 3, 2]), strict=True):
        group.scores = np.array(scores, dtype=np.float64)
    batch = mapped(groups)
    found = list(examples(groups, batch, estimate(batch, 0.5), Letters))
    assert [(one["gid"], one["row"], one["score"]) for one in found] == [
        (groups[1].gid, 1, 9.0),
        (groups[1].gid, 0, 0.0),
        (groups[2].gid, 2, 3.0),
        (groups[2].gid, 3, 2.0),
    ]
    best, tokens, mask = found[0], groups[1].tokens[1], groups[1].masks[1]
    start = int((mask != -100).argmax())
    assert (best["prompt"], best["response"]) == (
        Letters.decode(tokens[:start].tolist()),
        Letters.decode(tokens[start:].tolist()),
    )
    assert (best["advantage"], best["v_min"], best["v_max"]) == (0.5, 3, 5)
    assert (best["tokens"], best["trained_tokens"]) == (len(tokens), int((mask != -100).sum()))


@pytest.mark.verl
def test_examples_leave_out_what_did_not_enter_the_model_and_know_no_advantage_of_what_was_filtered() -> None:
    groups = some_groups()
    groups[0].tokens[0] = groups[0].tokens[0] + 1000
    batch = mapped(groups)
    filtered = replace(batch, uids=np.array(["other"] * len(batch.uids), dtype=object))
    found = list(examples(groups, batch, estimate(filtered, 0.5), Letters))
    assert len(found) == 4
    assert (groups[0].gid, 0) not in {(one["gid"], one["row"]) for one in found}
    assert {one["advantage"] for one in found} == {"-"}
    assert {one["advantage"] for one in examples(groups, batch, None, Letters)} == {"-"}


def test_long_examples_are_cut_in_the_middle() -> None:
    from lachesis.trainer.metrics.samples import shortened

    assert shortened("a" * SHOWN) == "a" * SHOWN
    cut = shortened("a" * 5000 + "b" * 5000)
    assert cut.startswith("a" * 1000 + " … [10,000 characters] … b")
    assert len(cut) < SHOWN + 40
