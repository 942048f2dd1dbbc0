"""What `lachesis up` does: starts the parts, keeps them running until the last step, and evaluates what came of it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import anyio
import anyio.to_thread

from lachesis.broker.audit import audit
from lachesis.broker.client import Broker
from lachesis.broker.errors import ConfigurationError
from lachesis.broker.store.embedded import EmbeddedRedis, Keeper
from lachesis.cli.commands.audit import render as render_audit
from lachesis.cli.terminal import say
from lachesis.cli.up import plan as parts
from lachesis.cli.up import preflight
from lachesis.cli.up.progress import Display, View
from lachesis.cli.up.settings import UpSettings
from lachesis.cli.up.supervisor import Supervisor
from lachesis.cli.up.watch import watch
from lachesis.service.ports import listen
from lachesis.service.settings import make_folder

POLICY = "main"
ALL_PROBLEMS = 500  # at most, of the held-out ones
EVALUATIONS = 5  # while it trains, evenly over its steps
CURVE_PROBLEMS = 50  # of the held-out ones, asked in each of those
SERVE_PATIENCE_S = 120.0  # how long the pool may take to serve the last version


def run(settings: UpSettings) -> int:
    """Train, or go on training, until the last step or Ctrl-C. Returns the exit code. Raises LachesisError."""
    settings.state_dir = settings.state_dir.absolute()
    plan = parts.plan(settings)
    tracking = preflight.check(settings, plan, parts.trainer_overrides(settings, plan))  # before anything is started
    with contextlib.ExitStack() as stack:
        shim = stack.enter_context(listen("127.0.0.1", settings.shim_port, "--shim-port"))
        door = stack.enter_context(listen("127.0.0.1", settings.front_door_port, "--front-door-port"))
        redis = None if settings.redis_url else stack.enter_context(own_redis(settings))
        keeper = stack.enter_context(Keeper(redis)) if redis else None
        return asyncio.run(Run(settings, plan, redis, keeper, shim, door, tracking).main())


def own_redis(settings: UpSettings) -> EmbeddedRedis:
    """The state folder's Redis, ours alone: two runs at once in one folder would be in each other's way."""
    make_folder("--state-dir", settings.state_dir)
    return EmbeddedRedis(settings.state_dir / "redis", shared=False)


async def start_over(broker: Broker, state_dir: Path) -> None:
    """Forget what the run did before: in Redis, and what its parts left in the state folder."""
    await broker.forget()
    for place in ("runs", "weights", "checkpoints", "tracking"):
        shutil.rmtree(state_dir / place / broker.keys.run, ignore_errors=True)


class Run:
    """One run, from the base model to the summary. Components don't know each other: they are wired here."""

    def __init__(
        self,
        settings: UpSettings,
        plan: parts.Plan,
        redis: EmbeddedRedis | None,
        keeper: Keeper | None,
        shim: parts.Listener,
        door: parts.Listener,
        tracking: Sequence[str],
    ) -> None:
        self.settings, self.plan, self.keeper, self.restarts = settings, plan, keeper, 0
        self.url = redis.url if redis else settings.redis_url
        self.home = settings.state_dir / "runs" / settings.run
        title = f"Lachesis · run {settings.run} · {plan.env} · {plan.model_name} · {plan.device}"
        self.view = View(title=title, steps=plan.steps)
        self.display = Display(self.view)
        self.supervisor = Supervisor(self.display.note)
        self.processes = parts.Processes(settings, plan, self.url, self.home, shim, door)
        self.front_door = f"http://127.0.0.1:{door.getsockname()[1]}"
        self.tracking = tracking  # verl's trackers that the trainer tells of its steps
        self.began = time.monotonic()

    async def main(self) -> int:
        broker = await Broker.connect(self.url, self.settings.run)
        try:
            if await broker.tokens.all():
                raise ConfigurationError(
                    f"run {self.settings.run!r} has tokens, and `lachesis up` has none for its environment: give another --run, "
                    "or start the parts one by one"
                )
            make_folder("--state-dir", self.settings.state_dir)
            if self.settings.fresh:
                await start_over(broker, self.settings.state_dir)
            await broker.enlist()  # from now on there is something to look at
            newest = await broker.queue.newest_committed(POLICY)
            if newest is not None and newest.step >= self.plan.steps:
                say(
                    f"run {self.settings.run!r} has its {self.plan.steps} steps already: --steps N trains on, --fresh starts over"
                )
                return 0
            return await self._train(broker, resumed=newest is not None)
        finally:
            await broker.aclose()

    async def _train(self, broker: Broker, *, resumed: bool) -> int:
        interrupted = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt, interrupted)
        with self.display:
            work = asyncio.create_task(self._work(broker, resumed=resumed))
            watcher = asyncio.create_task(watch(broker, self.view, self.supervisor, self._look_around))
            waiter = asyncio.create_task(interrupted.wait())
            try:
                await asyncio.wait({work, waiter, watcher}, return_when=asyncio.FIRST_COMPLETED)
                if watcher.done():
                    watcher.result()  # it never ends by itself: raise what ended it
                if not work.done():
                    work.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await work
                    self.display.note("draining: the step in hand is finished and saved (Ctrl-C again to kill)")
                    await self._drain()
                else:
                    work.result()
            finally:
                waiter.cancel()
                await self._stop_all()
                watcher.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watcher
        return await self._conclude(broker, interrupted=interrupted.is_set())

    def _look_around(self) -> None:
        if self.keeper is not None and self.keeper.restarts > self.restarts:
            self.restarts = self.keeper.restarts
            self.display.note("Redis ended and was started again")
        self.display.refresh()

    def _interrupt(self, interrupted: asyncio.Event) -> None:
        if interrupted.is_set():
            self.supervisor.kill_all()
        interrupted.set()

    async def _work(self, broker: Broker, *, resumed: bool) -> None:
        view, start, processes = self.view, self.supervisor.start, self.processes
        await broker.registry.halt()  # else environments would be told how many steps the trainer before this one took
        for index in range(self.settings.servers):  # SGLang is imported while the base model is made
            start(processes.inference(index))
        start(processes.front_door())
        if self.plan.tiny and not Path(self.plan.model).is_dir():
            view.phase = "making the base model"
            start(processes.base_model())
            await self.supervisor.wait("base-model")
        view.phase = "starting"
        start(processes.env())  # waits for the shim, whose socket is open already
        start(processes.trainer())
        if not resumed:
            await self._wait_served(broker, 0, timeout_s=float("inf"))
            view.phase = "evaluating before training"
            await self._evaluate(broker, 0)
        start(processes.shim())
        view.phase = "training"
        curve = asyncio.create_task(self._evaluate_along(broker))
        try:
            await self.supervisor.wait("trainer")
        finally:
            curve.cancel()
            [ended] = await asyncio.gather(curve, return_exceptions=True)
        if isinstance(ended, Exception):
            raise ended

        await self.supervisor.stop("env", grace_s=5.0)
        view.phase = "evaluating"
        served = self.plan.steps
        try:
            await self._wait_served(broker, served, timeout_s=SERVE_PATIENCE_S)
        except TimeoutError:  # the pool is pinned, or no server can load it, as the display warns
            served = self.view.served
            self.display.note(f"no server serves version {self.plan.steps}: version {served} is evaluated")
        await self._evaluate(broker, served)
        if self.tracking:
            start(processes.track())
            await self.supervisor.wait("track")
        view.phase = "done"

    async def _wait_served(self, broker: Broker, version: int, *, timeout_s: float) -> None:
        with anyio.fail_after(timeout_s):
            while True:
                self.supervisor.check()
                servers = await broker.registry.servers()
                if any(server.state == "ready" and server.version >= version for server in servers):
                    return
                await asyncio.sleep(0.2)

    async def _evaluate_along(self, broker: Broker) -> None:
        """Points of the curve between the two evaluations of all held-out problems."""
        from lachesis.envs.evaluate import EvaluationFailed

        newest, every = await broker.queue.newest_committed(POLICY), max(1, -(-self.plan.steps // EVALUATIONS))
        due = every * ((newest.step if newest else 0) // every + 1)
        while due < self.plan.steps:
            await self._wait_served(broker, due, timeout_s=float("inf"))
            try:
                await self._evaluate(broker, max(due, self.view.served), problems=CURVE_PROBLEMS)
            except EvaluationFailed as error:
                self.display.note(f"not evaluated with version {due}: {error}")
            due = every * (max(due, self.view.served) // every + 1)

    async def _evaluate(self, broker: Broker, version: int, problems: int = ALL_PROBLEMS) -> None:
        from lachesis.envs.evaluate import evaluate

        plan, data = self.plan, self.settings.data or None
        result = await anyio.to_thread.run_sync(
            lambda: evaluate(self.front_door, plan.env, plan.model, data=data, limit=problems), abandon_on_cancel=True
        )
        values = {"env": plan.env, "version": version, "accuracy": result.accuracy, "n": result.n}
        values |= {"seconds": result.seconds}
        await broker.journal.metric(
            "eval", values | {f"accuracy/{kind}": value for kind, value in result.per_kind.items()}
        )
        self.display.say(
            f"held-out accuracy with version {version}: {result.accuracy:.3f} ({result.n} problems, {result.seconds:.1f} s)"
        )

    async def _drain(self) -> None:
        self.view.phase = "draining"
        await self.supervisor.stop("env", grace_s=5.0)
        await self.supervisor.stop("trainer", grace_s=60.0)

    async def _stop_all(self) -> None:
        names = list(self.supervisor.parts)
        await self.supervisor.stop(*(name for name in names if name.startswith(("env", "trainer"))), grace_s=60.0)
        await self.supervisor.stop(*names, grace_s=20.0)

    async def _conclude(self, broker: Broker, *, interrupted: bool) -> int:
        newest = await broker.queue.newest_committed(POLICY)
        report = await audit(broker, POLICY)
        step = newest.step if newest else 0
        rewards = [entry.reward async for entry in broker.queue.ledger(POLICY)][-10:]
        held_out = await self._held_out(broker)
        say(
            f"{'interrupted' if interrupted else 'done'}: step {step}/{self.plan.steps} in {time.monotonic() - self.began:.0f} s"
            + (f", mean reward of the last {len(rewards)} steps {sum(rewards) / len(rewards):.3f}" if rewards else "")
            + (f", held-out {' -> '.join(held_out[:1] + held_out[1:][-1:])}" if held_out else "")
            + f"; audit {render_audit(report)}"
        )
        if interrupted:
            say(f"run the same command again to go on from step {step}; {self.home / 'logs'} has the logs")
            return 130
        return 0 if report.clean else 1

    async def _held_out(self, broker: Broker) -> list[str]:
        found, cursor = [], "0-0"
        while entries := await broker.journal.metrics(cursor):
            found += [
                fields["accuracy"] for _, fields in entries if fields.get("kind") == "eval" and "accuracy" in fields
            ]
            cursor = entries[-1][0]
        return found
