"""What replicas of one policy cost and bring: `python benchmarks/elastic.py`.

The compute of a group is mostly a wait, of fixed length, so that four replicas on two cores show the protocol, not the
cores. What a step takes beyond the compute of that replica which computed longest is the protocol's: claims, sums, votes.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / room) for room in ("", "trainer")]

import elastic_process  # noqa: E402
from scored import group  # noqa: E402
from trainer_kit import context  # noqa: E402

from lachesis.broker import BlockingBroker, EmbeddedRedis, connect_blocking  # noqa: E402
from lachesis.broker.records import LedgerEntry  # noqa: E402
from lachesis.trainer.duties import Team  # noqa: E402

GROUPS, STEPS, COMPUTE_S = 24, 30, 0.05  # groups of a step, steps, seconds of a group


async def _ledger(broker: BlockingBroker) -> list[LedgerEntry]:
    return [entry async for entry in broker.broker.queue.ledger("main")]


def run(
    url: str, folder: Path, name: str, replicas: int, event: Callable[..., None] | None = None
) -> tuple[float, float]:
    """Seconds per step, of the steps that all replicas trained, and of compute of the replica that computed longest."""
    (folder / name).mkdir()
    with connect_blocking(url, name) as broker:
        for number in range(STEPS * GROUPS):
            broker.call(broker.broker.queue.put, f"g{number}", group(number % 64), v_min=0, v_max=0)

        def start(who: str) -> object:
            told = elastic_process.Settings(
                url,
                name,
                str(folder / name),
                who,
                steps=STEPS,
                batch_size=2 * GROUPS,
                compute_s=COMPUTE_S,
                together_s=Team.together_s,
                silent_s=2.0,
            )
            process = context.Process(target=elastic_process.main, args=(told,))
            process.start()
            return process

        processes = [start(f"r{number}") for number in range(replicas)]
        if event is not None:
            event(broker, processes, start)
        for process in processes:
            process.join()  # type: ignore[attr-defined]
        entries = [entry for entry in broker.call(_ledger, broker) if len(entry.replica.split()) == replicas]
    if event is not None or len(entries) < 2:
        return 0.0, 0.0
    took = [json.loads(path.read_text()) for path in (folder / name).glob("took-*.json")]
    longest = [max(one.get(str(entry.step), 0.0) for one in took) for entry in entries[1:]]
    return (entries[-1].at - entries[0].at) / len(longest), statistics.fmean(longest)


def newest(broker: BlockingBroker) -> LedgerEntry | None:
    return broker.call(broker.broker.queue.newest_committed, "main")


def wait_for_team(broker: BlockingBroker, size: int) -> None:
    while (entry := newest(broker)) is None or len(entry.replica.split()) != size:
        time.sleep(0.01)


def next_commit_s(number: int) -> Callable[..., None]:
    """Send the last replica a signal in the middle of a step."""

    def event(broker: BlockingBroker, processes: list, start: object) -> None:
        wait_for_team(broker, len(processes))
        time.sleep(0.2)
        began, before = time.time(), newest(broker).step
        os.kill(processes[-1].pid, number)
        while newest(broker).step == before:
            time.sleep(0.002)
        print(
            f"{signal.Signals(number).name} of one of {len(processes)} to the next commit: {newest(broker).at - began:.2f} s"
        )
        processes[-1].kill()

    return event


def join_s(broker: BlockingBroker, processes: list, start: Callable[[str], object]) -> None:
    wait_for_team(broker, len(processes))
    processes.append(start("late"))

    def others() -> list:
        return [m for m in broker.call(broker.broker.members.members, "main") if m.id.startswith("late")]

    while not others():
        time.sleep(0.002)
    began = time.time()
    while others()[0].step < 0:
        time.sleep(0.002)
    print(f"join to having the newest weights: {time.time() - began:.3f} s")


def main() -> None:
    context.set_forkserver_preload(["elastic_process"])
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder) / "redis") as server:
        at = Path(folder)
        found = {n: run(server.url, at, f"speed{n}", n) for n in (1, 2, 4)}
        for n, (step_s, compute_s) in found.items():
            print(
                f"{n} replicas: {step_s * 1000:.0f} ms per step of {GROUPS} groups, {found[1][0] / step_s:.2f} x; "
                f"{(step_s - compute_s) * 1000:.0f} ms above the longest compute ({compute_s * 1000:.0f} ms)"
            )
        run(server.url, at, "kill", 3, next_commit_s(signal.SIGKILL))
        run(server.url, at, "stop", 3, next_commit_s(signal.SIGSTOP))
        run(server.url, at, "join", 2, join_s)


if __name__ == "__main__":
    main()
