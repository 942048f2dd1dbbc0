"""What does the trainer cost around verl's step? `python benchmarks/trainer.py [--quick]`.

Batches of 256 sequences x 2048 tokens (512 of prompt, with masks and log-probs) go from a Redis that this starts through
everything that the step loop does besides verl: look, fetch, unpack, map, lease, commit, publish, report. Measures CPU time
of the process, all its threads (Redis apart, and told), as a share of a step of 10 s. What runs beside the step (the next
batch, writing a version) counts too, as if it were in its way. Prints a table and writes benchmarks/results/trainer.json.
Ends with 1 where a measure misses what it must reach.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from report import report
from rich.console import Console
from rich.table import Table
from servers import BATCH, LENGTH, SEQUENCES, VOCABULARY, cpu_ms, group

from lachesis.broker import BlockingBroker, EmbeddedRedis, connect_blocking
from lachesis.broker.records.blobs import from_blob, to_blob
from lachesis.broker.records.packing import pack
from lachesis.broker.records.steps import LedgerEntry
from lachesis.shim.intake.simdjson_decoder import read_group
from lachesis.trainer.config.plan import Plan
from lachesis.trainer.data.collate import to_batch
from lachesis.trainer.metrics.step import batch_metrics
from lachesis.trainer.prefetch import Prefetcher, PreparedBatch
from lachesis.trainer.weights.publisher import Publisher
from lachesis.trainer.weights.versions import VersionStore
from lachesis.trainer.writer_lock import WriterLease

GROUPS = BATCH // SEQUENCES
STEP_S = 10.0
SHARE = 0.03  # of the step, at most
MODEL = 12_000_000  # parameters of the published model: what a CPU trains on such a batch in a minute
console = Console(width=132)


@dataclass(frozen=True)
class Row:
    """One measure: CPU ms of a step; must: what it may be, where there is a limit."""

    measure: str
    cpu_ms: float
    must: float | None = None
    note: str = ""

    @property
    def good(self) -> bool:
        return self.must is None or self.cpu_ms <= self.must


class Clock:
    """CPU time of this process and of Redis, and wall time, by part of a step."""

    def __init__(self, redis_pid: int) -> None:
        self._pids = os.getpid(), redis_pid
        self.spent: dict[str, list[tuple[float, float, float]]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        before = *map(cpu_ms, self._pids), time.perf_counter_ns() / 1e6
        yield
        after = *map(cpu_ms, self._pids), time.perf_counter_ns() / 1e6
        mine, redis, wall = (late - early for early, late in zip(before, after, strict=True))
        self.spent.setdefault(name, []).append((mine, redis, wall))

    def rows(self) -> list[Row]:
        found = []
        for name, spent in self.spent.items():
            mine, redis, wall = map(statistics.median, zip(*spent, strict=True))
            found.append(Row(name, mine, note=f"wall {wall:.1f} ms, Redis {redis:.2f} ms CPU"))
        return found


def plan(folder: Path, steps: int) -> Plan:
    return Plan(
        run="default", policy="main", shadow=None, replica="bench", elastic=False, elastic_over="gloo", exact=False, model_dir=folder / "model", batch_size=BATCH, max_token_len=4096,
        num_steps=steps, prefetch=0, lockstep=False, publish_every=1, checkpoint_every=1000, keep_versions=2,
        weights_dir=folder / "weights", weights_url="", full_every=1, weights_dtype="bf16", checkpoint_dir=folder / "checkpoints", lease_s=30.0,
        max_deliveries=10, temperature=1.0, examples_every=0, tracking=(), tracking_dir=folder / "tracking",
        wandb_project="bench", wandb_group="bench",
    )  # fmt: skip


def one_step(clock: Clock, blocking: BlockingBroker, prefetcher: Prefetcher, publisher: Publisher, step: int) -> None:
    """What SoloTrainer does around verl, part by part."""
    queue = blocking.broker.queue
    with clock.part("form, lease, fetch, unpack, map"):
        found = prefetcher.next(step - 1, lambda: False)
    assert found is not None
    lease, ready = found
    batch = lease.batch
    entry = LedgerEntry(step, batch.gids, batch.n, batch.tok, step - 1, step, 0, 0, "bench", 0.5, 0.1, STEP_S)
    with clock.part("commit, deliver"):
        publisher.deliver(step)
        blocking.call(queue.commit, "main", lease, entry)
        publisher.flush()
    weights = [(f"layer.{index}.weight", torch.randn(1000, 1000)) for index in range(MODEL // 1_000_000)]
    with clock.part(f"hand a model of {MODEL // 1_000_000} million parameters to the publisher"):
        publisher.publish(step, step - 1, weights)
    with clock.part("write, hash, sync and announce it (beside the step)"):
        publisher.flush()
    with clock.part("describe the step and tell it"):
        values = batch_metrics(entry, ready.groups, ready.batch, None)
        blocking.call(blocking.broker.journal.metric, "step", values)
    blocking.call(queue.retire, "main", step)


def mapping(ready: PreparedBatch, times: int) -> float:
    """Median CPU ms of map + pack alone."""
    spent = []
    for _ in range(times):
        before = time.process_time()
        to_batch(ready.groups, vocab_size=VOCABULARY, max_tokens=4096)
        spent.append((time.process_time() - before) * 1e3)
    return statistics.median(spent)


def measure(folder: Path, steps: int) -> list[Row]:
    stored = [found for number in range(GROUPS) if (found := read_group(group(number)))]
    blobs = [to_blob(pack(one), f"g{number}", v_min=0, v_max=0) for number, one in enumerate(stored)]
    the_plan = plan(folder, steps)
    the_plan.model_dir.mkdir()
    (the_plan.model_dir / "config.json").write_text("{}")
    with ExitStack() as stack:
        redis = stack.enter_context(EmbeddedRedis(folder / "redis"))
        assert redis.pid is not None
        blocking = stack.enter_context(connect_blocking(redis.url))
        blocking.call(blocking.broker.queue.subscribe, "main")
        writer_lease = stack.enter_context(WriterLease(blocking, "main", ttl_s=30))
        assert writer_lease.wait(unless=lambda: False, on_standby=lambda: None)
        versions = VersionStore(the_plan.weights_dir, the_plan.model_dir, dtype="bf16")
        publisher = stack.enter_context(Publisher(blocking, "main", versions, writer_lease, keep_versions=2))
        prefetcher = stack.enter_context(
            Prefetcher(
                blocking,
                the_plan,
                writer_lease,
                partial(to_batch, vocab_size=VOCABULARY, max_tokens=the_plan.max_token_len),
            )
        )
        clock = Clock(redis.pid)
        for step in range(1, steps + 1):
            for number, blob in enumerate(blobs):
                put = blocking.broker.queue.put
                blocking.call(put, f"{step}-{number}", from_blob(blob), v_min=step - 1, v_max=step - 1)
            one_step(clock, blocking, prefetcher, publisher, step)
        for spent in clock.spent.values():
            del spent[0]  # the first pays for imports and pages
        rows = clock.rows()
        groups = [from_blob(blob) for blob in blobs]
        ready = PreparedBatch(
            LedgerEntry(1, (), BATCH, 0, 0, 0, 0, 0, "", 0, 0, 0),
            groups,
            to_batch(groups, vocab_size=VOCABULARY, max_tokens=4096),
            (),
            0,
            0,
        )
        alone = mapping(ready, 3 * steps)
    total = sum(row.cpu_ms for row in rows)
    return [
        Row(f"map + pack {BATCH} x {LENGTH} tokens", alone, must=60),
        *rows,
        Row(f"all around the step, {total / STEP_S / 10:.2f} % of {STEP_S:g} s", total, must=SHARE * STEP_S * 1e3),
    ]


def copying() -> Row:
    """What a large model adds to the hand-over: bytes, as published."""
    weights = [(str(index), torch.randn(1000, 10_000)) for index in range(25)]
    with tempfile.TemporaryDirectory() as name:
        store = VersionStore(Path(name) / "weights", Path(name), dtype="bf16")
        store.copy(1, weights)
        before = time.process_time()
        copied = store.copy(2, weights)
        spent = (time.process_time() - before) * 1e3
    size = sum(tensor.nbytes for _, tensor in copied)
    return Row("copy a model from float32 in host memory, each GB of bfloat16", spent / size * 1e9)


def table(rows: list[Row]) -> Table:
    shown = Table("measure", "CPU", "of a 10 s step", "must", "", "", title="around verl's step")
    for row in rows:
        must = "" if row.must is None else f"{row.must:g} ms"
        verdict = "" if row.must is None else "must" if row.good else "MISSED"
        shown.add_row(row.measure, f"{row.cpu_ms:.1f} ms", f"{row.cpu_ms / STEP_S / 10:.2f} %", must, verdict, row.note)
    return shown


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="fewer repetitions")
    quick = options.parse_args().quick
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        rows = [*measure(Path(name), 4 if quick else 12), copying()]
    console.print(table(rows))
    return report("trainer", rows, [row.measure for row in rows if not row.good], console, quick=quick)


if __name__ == "__main__":
    sys.exit(main())
