"""Replicas of one policy under SIGKILL, SIGSTOP, lost replies and a dying Redis, and whether their trajectory is still one.

`python tests/chaos/soak.py --kills 1000` prints its progress and a report, and exits with 1 if a group was not trained
exactly once, or any weights differ in one bit from those of a run that nothing happens to (verdict.py).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / room) for room in ("", "broker", "trainer")]

import elastic_process  # noqa: E402
from elastic_process import Settings  # noqa: E402
from reply_dropper import dropping_replies  # noqa: E402
from trainer_kit import context, preload  # noqa: E402
from verdict import GROUPS, Found, contradictions, gid_of, group  # noqa: E402

from lachesis.broker import Broker, EmbeddedRedis  # noqa: E402
from lachesis.broker.audit import audit  # noqa: E402

RUN = "soak"
AHEAD = 3 * GROUPS  # groups queued before they are needed
FEWEST, MOST = 2, 4  # replicas
COMPUTE_S, SILENT_S, HOLD_S = 0.01, 1.5, 3.0
TOGETHER_S = (0.0, 0.5)  # some claim groups one by one, some several at once
WEDGED_S = 120.0  # nothing takes so long
ASKED = (0, -signal.SIGTERM)  # how one ends that was asked to; the latter before it listens
KINDS = {  # and how often of 100
    "one killed": 30,
    "the leader killed": 12,
    "one killed at a point": 12,
    "one stopped, and awake in time": 8,
    "one stopped, and awake after its eviction": 8,
    "all killed": 5,
    "all stopped, and awake after a rollback": 3,
    "Redis killed": 8,
    "Redis and all killed": 2,
    "a reply lost": 12,
}
POINTS = (
    *("joined", "met", "healed", "leased", "claimed", "accumulated", "reducing", "reduced", "voted", "committed"),
    *("applied", "published", "saving", "saved", "replayed"),
)
SCRIPTS = (
    "start_generation",
    "join",
    "evict",
    "rendezvous",
    "mark_current",
    "open_step",
    "claim_groups",
    "vote",
    "lease",
    "mark_delivered",
)


class Soak:
    """A Redis, the replicas on it, and what is done to them."""

    def __init__(self, folder: Path, *, seed: int, replica: Any = elastic_process.main) -> None:
        self.folder, self.rng, self._replica = folder, random.Random(seed), replica
        self.processes: dict[str, ForkServerProcess] = {}
        self.size = FEWEST
        self.fed, self.feeding = 0, True  # groups, and whether more are to come
        self.events: Counter[str] = Counter()
        self.back_s: dict[str, list[float]] = defaultdict(list)  # by kind: from the fault to the next commit
        self.wrong: list[str] = []
        self._leaving: set[str] = set()  # asked to stop

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        with EmbeddedRedis(self.folder / "redis", shared=False) as self.redis:
            async with dropping_replies(str(self.redis.socket)) as self.dropper:
                self.broker = await Broker.connect(self.redis.url, RUN)
                await self.broker.queue.subscribe("main")
                try:
                    yield
                finally:
                    for process in self.processes.values():
                        process.kill()
                        process.join()
                    await self.broker.aclose()

    # -- what runs ------------------------------------------------------------------------------------------------

    async def feed(self) -> None:
        """Keep the queue filled; in the end the groups are those of whole steps."""
        while self.feeding or self.fed % GROUPS:
            queued = (await self.broker.queue.status()).groups
            for _ in range(AHEAD - queued if self.feeding else 1):
                await self.broker.queue.put(gid_of(self.fed), group(self.fed), v_min=0, v_max=0)
                self.fed += 1
            await asyncio.sleep(0.02)

    def start(self, crash_at: str = "") -> str:
        name = f"r{self.events['replicas started']}"
        self.events["replicas started"] += 1
        settings = Settings(
            self.dropper.url, RUN, str(self.folder), name, steps=10**9, batch_size=2 * GROUPS, compute_s=COMPUTE_S,
            silent_s=SILENT_S, hold_s=HOLD_S, together_s=self.rng.choice(TOGETHER_S),
        )  # fmt: skip
        self.processes[name] = context.Process(target=self._replica, args=(settings, crash_at))
        self.processes[name].start()
        return name

    def tend(self) -> None:
        """As a supervisor does that scales up and down: replace what ended, now and then want another number of them."""
        for name, process in list(self.processes.items()):
            if process.exitcode is None:
                continue
            del self.processes[name]
            said = self._log(name)
            if process.exitcode == 1 and "RedisUnreachable" in said:
                self.events["replicas that found no Redis"] += 1
            elif process.exitcode != -signal.SIGKILL and not (name in self._leaving and process.exitcode in ASKED):
                self.wrong.append(f"{name} ended with {process.exitcode}: {said[-3000:]}")
        if self.rng.random() < 0.1:
            self.size = self.rng.randint(FEWEST, MOST)
        staying = [name for name in self.processes if name not in self._leaving]
        for name in staying[self.size :]:
            self.processes[name].terminate()
            self._leaving.add(name)
            self.events["replicas asked to stop"] += 1
        for _ in range(self.size - len(staying)):
            self.start()

    def _log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""  # killed before it wrote any

    async def step(self) -> int:
        newest = await self.broker.queue.newest_committed("main")
        return newest.step if newest else 0

    async def until_step(self, step: int) -> None:
        """Until it is committed."""
        began = time.monotonic()
        while await self.step() < step:
            self.tend()
            if time.monotonic() > began + WEDGED_S:
                raise TimeoutError(f"a wedge: step {step} is not committed after {WEDGED_S:.0f} s; see {self.folder}")
            await asyncio.sleep(0.02)

    # -- what is done to it ---------------------------------------------------------------------------------------

    async def disturb(self) -> str:
        """One fault, and what it was."""
        kind = self.rng.choices(list(KINDS), list(KINDS.values()))[0]
        self.events[kind] += 1
        before, began = await self.step(), time.monotonic()
        await self._do(kind)
        if self.rng.random() < 0.5:
            await self.until_step(before + 1)
            self.back_s[kind].append(time.monotonic() - began)
        await asyncio.sleep(self.rng.uniform(0, 0.5))
        return kind

    async def _do(self, kind: str) -> None:
        victim = self.rng.choice(list(self.processes))
        if kind == "one killed":
            self.processes[victim].kill()
        elif kind == "the leader killed":
            leaders = [member.id.split(":")[0] for member in await self.broker.members.members("main")]
            self.processes[next((name for name in leaders if name in self.processes), victim)].kill()
        elif kind == "one killed at a point":
            self.processes[victim].kill()  # and another one, later, by itself
            self.start(f"{self.rng.choice(POINTS)}:{await self.step() + self.rng.randint(1, 4)}")
        elif kind == "one stopped, and awake in time":
            self._signal([victim], signal.SIGSTOP)
            await asyncio.sleep(self.rng.uniform(0.1, 0.5 * SILENT_S))
            self._signal([victim], signal.SIGCONT)
        elif kind == "one stopped, and awake after its eviction":
            self._signal([victim], signal.SIGSTOP)
            await self._until_gone(victim)
            await asyncio.sleep(self.rng.uniform(0, 0.5))
            self._signal([victim], signal.SIGCONT)
        elif kind == "all stopped, and awake after a rollback":
            sleeping, generation = list(self.processes), await self._generation()
            self._signal(sleeping, signal.SIGSTOP)
            while await self._generation() == generation:
                if not any(
                    name not in sleeping and process.exitcode is None for name, process in self.processes.items()
                ):
                    self.start()
                await asyncio.sleep(0.1)
            await asyncio.sleep(self.rng.uniform(0, 0.5))
            self._signal(sleeping, signal.SIGCONT)
        elif kind == "a reply lost":
            script = self.rng.choice(SCRIPTS)
            self.dropper.lose(getattr(self.broker.scripts, script).sha)
        if kind in ("all killed", "Redis and all killed"):
            for process in self.processes.values():
                process.kill()
        if kind in ("Redis killed", "Redis and all killed"):
            assert self.redis.pid is not None
            os.kill(self.redis.pid, signal.SIGKILL)
            await asyncio.sleep(self.rng.uniform(0.1, 2 * SILENT_S))
            assert self.redis.revive()

    def _signal(self, names: list[str], number: signal.Signals) -> None:
        for name in names:
            process = self.processes.get(name)
            if process is not None and process.exitcode is None and process.pid is not None:
                os.kill(process.pid, number)

    async def _until_gone(self, name: str) -> None:
        """Until the replica of that name is no member."""
        while any(member.id.startswith(f"{name}:") for member in await self.broker.members.members("main")):
            self.tend()
            await asyncio.sleep(0.05)

    async def _generation(self) -> int:
        epoch_state = await self.broker.members.epoch_state("main")
        return epoch_state.generation if epoch_state else 0

    # -- the end --------------------------------------------------------------------------------------------------

    async def finish(self) -> Found:
        """Let them train all there is, end them, and read what they leave."""
        steps = self.fed // GROUPS
        await self.until_step(steps)
        await asyncio.sleep(1.0)  # the others have applied it too
        self._leaving.update(self.processes)
        for process in self.processes.values():
            process.terminate()
        for name, process in self.processes.items():
            await asyncio.to_thread(process.join, WEDGED_S)
            if process.exitcode not in ASKED:
                self.wrong.append(f"{name} ended with {process.exitcode}: {self._log(name)[-3000:]}")
        found = self.broker.redis.xrange(self.broker.keys.weights("main"))
        for _, entry in await self.broker.redis.xrange(self.broker.keys.control):
            self.events[f"told: {entry[b'event'].decode()}"] += 1
        return Found(
            steps=steps,
            ledger=[(entry.step, entry.gids) async for entry in self.broker.queue.ledger("main")],
            versions=[(int(fields[b"version"]), fields[b"manifest_sha256"].decode()) for _, fields in await found],
            left={path.stem: json.loads(path.read_text()) for path in self.folder.glob("r*.json")},
            letters=(await self.broker.queue.status()).untrainable,
            findings=(await audit(self.broker)).findings,
        )


async def run(
    folder: Path, *, kills: int, seed: int = 0, show: bool = False, replica: Any = elastic_process.main
) -> dict[str, Any]:
    """Disturb replicas `kills` times, let them finish, and report: counts, and everything that contradicts the guarantees."""
    soak, began = Soak(folder, seed=seed, replica=replica), time.monotonic()
    async with soak.running():
        feeding = asyncio.create_task(soak.feed())
        await soak.until_step(2)
        for done in range(1, kills + 1):
            kind = await soak.disturb()
            soak.tend()
            if feeding.done():
                feeding.result()
            if show:
                line = f"{done}/{kills} step {await soak.step()}  {time.monotonic() - began:.0f} s  {kind:<42}"
                print(line, end="\r" if sys.stdout.isatty() and done < kills else "\n", flush=True)
        soak.feeding = False
        await feeding
        found = await soak.finish()
    wrong = soak.wrong + contradictions(found)
    return {
        "steps": found.steps, "groups": soak.fed, "events": dict(soak.events), "back_s": dict(soak.back_s),
        "wrong": wrong, "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """By kind of fault: how often, and seconds to the next commit where that was waited for."""
    rows = [f"{'fault':<44} count   to the next commit: median, worst"]
    for kind in KINDS:
        back_s = report["back_s"].get(kind)
        seconds = f"{statistics.median(back_s):10.2f} s {max(back_s):6.2f} s" if back_s else ""
        rows.append(f"{kind:<44} {report['events'].get(kind, 0):5d}{seconds}")
    rows += [f"{name:<44} {count:5d}" for name, count in sorted(report["events"].items()) if name not in KINDS]
    rows.append(
        f"{report['steps']} steps of {report['groups']} groups in {report['seconds']} s; wrong: {report['wrong'] or 'nothing'}"
    )
    return "\n".join(rows)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=1000, help="faults in all")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    preload()
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(run(Path(folder), kills=chosen.kills, seed=chosen.seed, show=True))
    print(table(report))
    sys.exit(bool(report["wrong"]))


if __name__ == "__main__":
    main()
