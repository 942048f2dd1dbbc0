"""Shims, trainers and Redis under SIGKILL, SIGSTOP, lost replies and full memory, and whether anything was lost.

`python tests/chaos/fabric.py --kills 1000` prints its progress and a report, and exits with 1 if the fabric lost or
doubled a group. Environments and HTTP trainers are coroutines of this process, which is what remembers the truth: every
post that was answered with 200 was accepted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # where it is run as a program

import aiohttp
from lossy_proxy import LossyProxy
from ports import free_port
from redis import Redis
from redis.exceptions import RedisError

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.broker.audit import audit
from lachesis.broker.records.entries import gid_of

BATCH = 16
SIZES = (2, 4, 8, 3)  # threes don't divide the batch
ENVS, SHIMS, TRAINERS, HTTP_TRAINERS = 24, 3, 2, 2
DUPLICATES, ABORTS, LOST_REPLIES = 0.1, 0.1, 0.002
LEASE_S = 3.0
QUOTA_BYTES = 40_000
DRAIN_S = 120.0
HERE = Path(__file__).parent
REGISTRATION = {
    "wandb_group": "g", "wandb_project": "p", "batch_size": BATCH, "max_token_len": 64, "checkpoint_dir": "",
    "save_checkpoint_interval": 1, "starting_step": 0, "num_steps": 10**9,
}  # fmt: skip


@dataclass
class Process:
    """One that may be killed and is started again."""

    name: str
    argv: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.argv, stdout=log, stderr=log)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()


@dataclass
class Truth:
    """What clients know."""

    accepted: set[str] = field(default_factory=set)  # answered with 200
    in_doubt: set[str] = field(default_factory=set)  # posted, never answered
    events: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Fabric:
    """Everything that runs, and everything that is done to it."""

    def __init__(self, folder: Path, *, fsync: str, seed: int) -> None:
        self.folder, self.fsync, self.rng = folder, fsync, random.Random(seed)
        self.redis = EmbeddedRedis(folder / "redis", shared=False, config=[f"appendfsync {fsync}"])
        self.truth = Truth()
        self.posting = self.taking = True

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        with self.redis:
            self.proxy = LossyProxy(self.redis.socket, LOST_REPLIES, self.rng)
            async with self.proxy.listening(self.folder / "lossy.sock") as lossy:
                self.ports = [free_port() for _ in range(SHIMS)]
                self.shims = [
                    self._process(f"shim-{index}", "-m", "lachesis.cli.main", "shim", "--redis-url",
                                  lossy if index == 0 else self.redis.url, "--port", str(port), "--lease-s", str(LEASE_S),
                                  "--queue-quota-bytes", str(QUOTA_BYTES))
                    for index, port in enumerate(self.ports)
                ]  # fmt: skip
                self.trainers = [
                    self._process(f"trainer-{index}", str(HERE / "consumer.py"), self.redis.url, f"native-{index}",
                                  str(BATCH), str(LEASE_S))
                    for index in range(TRAINERS)
                ]  # fmt: skip
                try:
                    for process in (*self.shims, *self.trainers):
                        process.start()
                    yield
                finally:
                    for process in (*self.shims, *self.trainers):
                        process.kill()

    def _process(self, name: str, *arguments: str) -> Process:
        return Process(name, (sys.executable, *arguments), self.folder / f"{name}.log")

    def _configure(self, name: str, value: str) -> None:
        with Redis(unix_socket_path=str(self.redis.socket)) as redis:
            redis.config_set(name, value)

    def start_what_ended(self) -> None:
        """As a supervisor does: a shim that finds no Redis when it starts says so and ends."""
        for process in (*self.shims, *self.trainers):
            if process.process is not None and process.process.poll() is not None:
                self.truth.events["ended by themselves"] += 1
                process.start()

    # -- what is done to it ---------------------------------------------------------------------------------------

    async def disturb(self) -> str:
        """One event, and what it was."""
        redis = 12 if self.fsync == "always" else 0  # with everysec its death may cost what it just answered
        kind = self.rng.choices(("shim", "trainer", "redis", "stop", "full"), (35, 35, redis, 15, 3))[0]
        self.truth.events[kind] += 1
        if kind == "shim":
            await self._restart(self.rng.choice(self.shims))
        elif kind == "trainer":
            await self._restart(self.rng.choice(self.trainers))
        elif kind == "redis":
            assert self.redis.pid is not None
            os.kill(self.redis.pid, signal.SIGKILL)
            await asyncio.sleep(self.rng.uniform(0.1, 0.4))
            assert self.redis.revive()
        elif kind == "stop":  # longer than a lease: whoever it is comes back as a zombie
            victim = self.rng.choice((*self.shims, *self.trainers))
            victim.signal(signal.SIGSTOP)
            await asyncio.sleep(self.rng.uniform(0.5, 1.4 * LEASE_S))
            victim.signal(signal.SIGCONT)
        else:
            self._configure("maxmemory", "1mb")  # less than an empty server has
            await asyncio.sleep(self.rng.uniform(0.2, 1.0))
            self._configure("maxmemory", "0")
        return kind

    async def _restart(self, victim: Process) -> None:
        victim.kill()
        await asyncio.sleep(self.rng.uniform(0, 0.2))
        victim.start()

    # -- clients --------------------------------------------------------------------------------------------------

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.rng.choice(self.ports)}{path}"

    async def register(self, session: aiohttp.ClientSession) -> None:
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.post(self._url("/register"), json=REGISTRATION) as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.1)

    async def environment(self, session: aiohttp.ClientSession, env: int) -> None:
        """Posts groups, each until it is answered; some it posts again although they were."""
        number = 0
        while self.posting:
            number += 1
            size = self.rng.choice(SIZES)
            tokens = [[env, number, index, self.rng.randrange(10**6)] for index in range(size)]
            group = {
                "tokens": tokens,
                "masks": tokens,
                "scores": [float(index) for index in range(size)],
                "env_id": env,
            }
            body = json.dumps(group).encode()
            gid = gid_of(body)
            self.truth.in_doubt.add(gid)
            attempts = 1
            while not await self._post(session, body):
                attempts += 1
                await asyncio.sleep(self.rng.uniform(0.01, 0.2))
            self.truth.events["posts sent again"] += attempts > 1
            self.truth.in_doubt.discard(gid)
            self.truth.accepted.add(gid)
            if self.rng.random() < DUPLICATES:
                self.truth.events["repeated posts"] += await self._post(session, body)
            await asyncio.sleep(self.rng.uniform(0, 0.02))

    async def _post(self, session: aiohttp.ClientSession, body: bytes) -> bool:
        headers = {"Content-Type": "application/json"}
        data = body
        if self.rng.random() < 0.5:
            data, headers["Content-Encoding"] = gzip.compress(body, mtime=self.rng.randrange(2**31)), "gzip"
        try:
            async with session.post(self._url("/scored_data"), data=data, headers=headers) as answer:
                if answer.status == 200:
                    return True
                if answer.status != 503:
                    self.truth.wrong.append(f"a valid post was answered with {answer.status}: {await answer.text()}")
                self.truth.events[f"answers {answer.status}"] += 1
        except (aiohttp.ClientError, TimeoutError):
            self.truth.events["posts without an answer"] += 1
        return False

    async def http_trainer(self, session: aiohttp.ClientSession, name: str) -> None:
        """Takes batches as an Atropos trainer does; breaks some answers off."""
        while self.taking:
            abort = self.rng.random() < ABORTS
            try:
                async with session.get(self._url("/batch"), headers={"X-Trainer-Id": name}) as answer:
                    if abort:
                        await answer.content.read(10)
                        answer.close()
                        continue
                    found = (await answer.json())["batch"] if answer.status == 200 else None
            except (aiohttp.ClientError, TimeoutError, ValueError):
                await asyncio.sleep(0.05)
                continue
            if found:
                self.truth.events["HTTP batches"] += 1
                if (size := sum(len(group["tokens"]) for group in found)) != BATCH:
                    self.truth.wrong.append(f"{name} was given a batch of {size} sequences")
            await asyncio.sleep(self.rng.uniform(0, 0.05) if found else 0.1)

    async def acknowledge(self, session: aiohttp.ClientSession, name: str) -> None:
        """A trainer's last call, to whichever shim is up."""
        while True:
            self.start_what_ended()
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(self._url("/batch"), headers={"X-Trainer-Id": name}) as answer:
                    if answer.status == 200:
                        assert (await answer.json())["batch"] is None
                        return
            await asyncio.sleep(0.1)


async def run(folder: Path, *, kills: int, fsync: str = "always", seed: int = 0, show: bool = False) -> dict[str, Any]:
    """Disturb the fabric `kills` times, let it drain, and report: counts, and everything that contradicts the guarantees."""
    fabric = Fabric(folder, fsync=fsync, seed=seed)
    began = time.monotonic()
    async with fabric.running(), aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(20)) as session:
        await fabric.register(session)
        environments = [asyncio.create_task(fabric.environment(session, env)) for env in range(ENVS)]
        takers = [asyncio.create_task(fabric.http_trainer(session, f"h{index}")) for index in range(HTTP_TRAINERS)]
        for done in range(1, kills + 1):
            kind = await fabric.disturb()
            if show:
                line = (
                    f"{done}/{kills} {kind:<8} accepted {len(fabric.truth.accepted)}  {time.monotonic() - began:.0f} s"
                )
                print(line, end="\r" if sys.stdout.isatty() and done < kills else "\n", flush=True)
            await asyncio.sleep(fabric.rng.uniform(0.05, 0.6))
            fabric.start_what_ended()
            for task in (*environments, *takers):
                if task.done():
                    task.result()  # they never end by themselves
        fabric.posting = False
        await asyncio.gather(*environments)
        broker = await Broker.connect(fabric.redis.url)
        try:
            await _drain(broker, session, fabric)
            fabric.taking = False
            await asyncio.gather(*takers)
            for index in range(HTTP_TRAINERS):  # the next call acknowledges; there is no batch left to take
                await fabric.acknowledge(session, f"h{index}")
            fabric.truth.events["lost replies"] = fabric.proxy.dropped
            for process in fabric.shims:
                if (start := (said := process.log.read_text()).find("Traceback")) >= 0:
                    fabric.truth.wrong.append(f"{process.name} says: {said[start : start + 8000]}")
            return await judge(broker, fabric.truth, time.monotonic() - began)
        finally:
            await broker.aclose()


async def _drain(broker: Broker, session: aiohttp.ClientSession, fabric: Fabric) -> None:
    """Wait until no more batches can be made and all that were are trained."""
    deadline = time.monotonic() + DRAIN_S
    quiet = 0
    while quiet < 10:
        fabric.start_what_ended()
        if time.monotonic() > deadline:
            fabric.truth.wrong.append(f"not drained within {DRAIN_S:.0f} s: a wedge")
            return
        with contextlib.suppress(RedisError):
            report = await audit(broker)
            sizes = [entry.n for _, entry in await broker.queue.queued()]
            # a trainer that took the last batch over HTTP acknowledges it with its next call
            quiet = quiet + 1 if report.open == 0 and sum(sizes) < BATCH + max(SIZES) else 0
        await asyncio.sleep(0.2)


async def judge(broker: Broker, truth: Truth, seconds: float) -> dict[str, Any]:
    """Compare what clients know with what Redis holds."""
    report = await audit(broker)
    places: Counter[str] = Counter()
    wrong = [*truth.wrong, *report.findings]
    async for entry in broker.queue.ledger("main"):
        places.update(entry.gids)
        if entry.n != BATCH:
            wrong.append(f"step {entry.step} has {entry.n} sequences")
    queued = [entry for _, entry in await broker.queue.queued()]
    places.update(entry.gid for entry in queued)
    places.update(letter.entry.gid for letter in await broker.dead.accepted())
    for batch in await broker.queue.batches():
        if batch.step > (await broker.queue.settled("main")):
            places.update(batch.gids)
    lost = truth.accepted - places.keys()
    doubled = [gid for gid, count in places.items() if count > 1]
    invented = places.keys() - truth.accepted - truth.in_doubt
    for name, gids in (("lost", lost), ("doubled", doubled), ("invented", invented)):
        if gids:
            wrong.append(f"{len(gids)} groups {name}, such as {next(iter(gids))}")
    status = await broker.queue.status()
    held = {"groups": len(queued), "sequences": sum(entry.n for entry in queued), "bytes": sum(e.bytes for e in queued)}
    counted = {"groups": status.groups, "sequences": status.sequences, "bytes": status.bytes}
    if held != counted:
        wrong.append(f"the counters say {counted}, the queue holds {held}")
    return {
        "accepted": len(truth.accepted), "in_doubt": len(truth.in_doubt), "steps": report.steps,
        "trained": report.trained, "queued": report.queued, "lost": len(lost), "doubled": len(doubled),
        "events": dict(truth.events), "wrong": wrong, "seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=1000, help="events in all, half with each AOF policy")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--fsync", choices=("everysec", "always"), nargs="+", default=["everysec", "always"])
    chosen = options.parse_args()
    failed = False
    for fsync in chosen.fsync:
        with tempfile.TemporaryDirectory() as folder:
            kills = chosen.kills // len(chosen.fsync)
            report = asyncio.run(run(Path(folder), kills=kills, fsync=fsync, seed=chosen.seed, show=True))
        print(json.dumps({"appendfsync": fsync, "kills": kills, **report}, indent=1))
        failed |= bool(report["wrong"])
    sys.exit(failed)


if __name__ == "__main__":
    main()
