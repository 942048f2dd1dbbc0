"""The agent beside one SGLang server: starts it, keeps its weights new, says how it is, starts it again when it dies."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path
from typing import NamedTuple

import anyio
import anyio.to_thread
from redis.exceptions import RedisError
from structlog.stdlib import BoundLogger

from lachesis.broker import Broker, ConfigurationError, LachesisError
from lachesis.broker.records.keys import check_name
from lachesis.broker.records.versions import ServerStatus
from lachesis.inference.agent import sglang_args
from lachesis.inference.agent.sglang_process import ServerFailed, SGLangServer
from lachesis.inference.agent.update import Updates, idle
from lachesis.inference.heartbeat import Heartbeat
from lachesis.inference.settings import AgentSettings
from lachesis.inference.versions.model_folder import download, is_hub_name, read_model_folder
from lachesis.inference.versions.staging import Staging
from lachesis.inference.versions.verification_cache import VerificationCache
from lachesis.inference.versions.watcher import VersionWatcher
from lachesis.service.logs import configure_logging
from lachesis.service.ports import bind, find_free

VERSION_WAIT_S = 5.0  # one wait for another version
SERVER_DRAIN_S = 10.0  # for running requests, at the end
PORT_S = 10.0  # for a predecessor to let go of the port
SERVER_BACKOFF_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
SERVER_STEADY_S = 60.0  # a server that was ready this long starts the backoff anew
DEAD_S = 3600.0  # silence after which a server's entry is removed
NEVER_READY = 3  # starts in a row, after which a server that was never ready is given up


class Agent:
    """Wires the parts: lives of the server follow each other, each fed by the version feed, told by the heartbeat."""

    def __init__(self, settings: AgentSettings, broker: Broker, log: BoundLogger) -> None:
        self._settings, self._broker, self._log = settings, broker, log
        self._python = sglang_args.find_python(settings.sglang_python)
        self._device = sglang_args.find_device(settings.device)
        self._port = settings.port or find_free(settings.host)
        name = settings.server or f"{socket.gethostname()}:{self._port}"
        self.heartbeat = Heartbeat(
            broker.registry,
            ServerStatus(
                server=name,
                pool=check_name("pool", settings.pool),
                url=self._url(),
                state="starting",
                version=-1,
                loading=-1,
                heartbeat=0.0,
            ),
            log,
        )
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
        self._state = settings.state_dir.absolute() / "runs" / settings.run
        self._log_file = self._state / "logs" / f"sglang-{safe}.log"
        self._ready_at: float | None = None  # of the present life, on the monotonic clock
        self._was_ready = False
        self._draining = False
        self._updates = Updates(settings, broker, self.heartbeat, self._become, log)

    @property
    def name(self) -> str:
        return self.heartbeat.status.server

    def _url(self) -> str:
        if self._settings.advertise_url:
            return self._settings.advertise_url.rstrip("/")
        return f"http://{socket.gethostname() if self._everywhere else self._settings.host}:{self._port}"

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises LachesisError for what no restart mends."""
        try:
            async with anyio.create_task_group() as tasks:
                await self._forget_the_dead()
                tasks.start_soon(self.heartbeat.run)
                with anyio.CancelScope() as lives:
                    tasks.start_soon(self._drain_on_signal, lives)
                    await self._supervise()
                tasks.cancel_scope.cancel()
        finally:
            await self._withdraw()

    async def _drain_on_signal(self, lives: anyio.CancelScope) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                self._log.info("draining", signal=number.name, server=self.name)
                self._draining = True
                self.heartbeat.change(state="draining")
                lives.cancel()

    async def _forget_the_dead(self) -> None:
        """Take servers off the list whose agents were killed long ago; one that lives on will report again."""
        for status in await self._broker.registry.servers():
            if time.time() - status.heartbeat > DEAD_S:
                await self._broker.registry.withdraw(status.server)

    async def _withdraw(self) -> None:
        with anyio.move_on_after(2.0, shield=True):
            try:
                await self._broker.registry.withdraw(self.name)
            except (RedisError, OSError) as error:
                self._log.warning("could not leave the pool; it will notice", error=str(error))
        self._log.info("stopped", server=self.name)

    # -- lives of the server --------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        base = await self._base_model()
        policy = self._settings.policy
        staging = Staging(self._state / "staged" / policy, keep=self._settings.keep_staged)
        verified = VerificationCache(self._state / "verified")
        watcher = VersionWatcher(self._broker, policy, base, staging, verified, self.heartbeat, self._log)
        failures = 0
        while True:
            await anyio.sleep(SERVER_BACKOFF_S[min(failures, len(SERVER_BACKOFF_S) - 1)])
            ended = await self._live(watcher)
            self._log.error("SGLang failed, starting it again", reason=ended.reason, log=str(self._log_file))
            for line in ended.last_lines:
                self._log.error("SGLang's log", line=line)
            failures = 0 if ended.served_s > SERVER_STEADY_S else failures + 1
            if not self._was_ready and failures >= NEVER_READY:
                last = ended.last_lines[-1] if ended.last_lines else ended.reason
                raise ServerFailed(
                    f"SGLang failed {failures} times and was never ready: {last}; its log is {self._log_file}"
                )

    async def _base_model(self) -> Path | None:
        """The folder of version 0, which may not exist yet; one that does is checked before anything starts."""
        model = self._settings.model
        if not model:
            return None
        folder = Path(model).expanduser().absolute()
        if is_hub_name(model):
            self._log.info("fetching the model, if it is not here yet", model=model)
            folder = await anyio.to_thread.run_sync(download, model, self._python)
        if folder.exists():
            sglang_args.model_options(self._settings, self._device, read_model_folder(folder), 0)
        return folder

    async def _live(self, watcher: VersionWatcher) -> _Ended:
        """One life of the server, from its start to its death."""
        await self._take_port()
        self._ready_at = None
        reason = ""
        argv = sglang_args.command_line(self._settings, self._python, self._device, self._port)
        local = f"http://{'127.0.0.1' if self._everywhere else self._settings.host}:{self._port}"
        async with (
            SGLangServer(argv, sglang_args.environment(self._device, os.environ), local, self._log_file) as server,
            anyio.create_task_group() as tasks,
        ):

            async def watch() -> None:
                nonlocal reason
                reason = await server.ended()
                tasks.cancel_scope.cancel()

            tasks.start_soon(watch)
            self._log.info("SGLang starts", server=self.name, device=self._device, log=str(self._log_file))
            try:
                await self._serve(server, watcher)
            except ServerFailed as error:
                reason = str(error)
            finally:
                if self._draining:
                    await self._drain(server)
            tasks.cancel_scope.cancel()
        with anyio.move_on_after(1.0), contextlib.suppress(RedisError, OSError):  # the heartbeat says so
            await self.heartbeat.announce(state="failed", version=-1, loading=-1, last_error=f"SGLang: {reason}")
        served_s = time.monotonic() - self._ready_at if self._ready_at is not None else 0.0
        return _Ended(reason, served_s, server.last_lines())

    async def _serve(self, server: SGLangServer, watcher: VersionWatcher) -> None:
        """Start from the newest version, load what came meanwhile, then report ready and follow. Ends by an error."""
        self._become("starting")
        self.heartbeat.change(version=-1, checksum="")
        now = await watcher.first()
        started = time.monotonic()
        try:
            options = sglang_args.model_options(self._settings, self._device, now.model, now.version)
            await server.start_model(options, self._settings.ready_timeout_s)
        except BaseException:
            if not self._draining:
                watcher.did_not_start(now)
            raise
        self._log.info("SGLang is up", version=now.version, seconds=round(time.monotonic() - started, 1))
        checksum = await server.checksum()
        self.heartbeat.change(
            version=now.version, loading=-1, vocab_size=now.model.vocab_size, checksum=checksum,
            prefix_key=self._updates.loaded(now.version, self.heartbeat.status.updates),
        )  # fmt: skip
        while (wanted := await watcher.next(now.version, now.model, 0.0)) is not None:
            await self._updates.swap(server, wanted)
            now = wanted
        self._ready_at, self._was_ready = time.monotonic(), True
        self._become("ready")
        self._log.info("ready", server=self.name, version=now.version, url=self.heartbeat.status.url)
        while True:
            wanted = await watcher.next(now.version, now.model, VERSION_WAIT_S)
            if wanted is not None and await self._updates.apply(server, wanted):
                now = wanted

    def _become(self, state: str) -> None:
        """Change the state; one that drains does so to its end."""
        self.heartbeat.change(state="draining" if self._draining else state)

    async def _drain(self, server: SGLangServer) -> None:
        """Wait, for a while, until no request runs; a front door repeats elsewhere what is cut off then."""
        with (
            anyio.move_on_after(SERVER_DRAIN_S, shield=True),
            contextlib.suppress(ServerFailed),
        ):  # not up yet, or dead already
            await idle(server)

    @property
    def _everywhere(self) -> bool:
        return self._settings.host in ("0.0.0.0", "::", "")

    async def _take_port(self) -> None:
        """Make sure that SGLang will be able to listen; a predecessor's SGLang may need a moment to go."""
        deadline = time.monotonic() + PORT_S
        while True:
            try:
                bind(self._settings.host, self._port).close()
                return
            except ConfigurationError:
                if not self._settings.port:
                    self._port = find_free(self._settings.host)
                    self.heartbeat.change(url=self._url())
                elif time.monotonic() > deadline:
                    raise
            await anyio.sleep(0.1)


class _Ended(NamedTuple):
    """How a life of the server ended."""

    reason: str
    served_s: float
    last_lines: list[str]


async def _main(settings: AgentSettings, url: str, log: BoundLogger) -> None:
    broker = await Broker.connect(url, settings.run)
    try:
        await Agent(settings, broker, log).run()
    finally:
        await broker.aclose()


def run(settings: AgentSettings) -> int:
    """Serve until SIGTERM or SIGINT, then drain; returns 0. Raises LachesisError for what no restart mends."""
    log = configure_logging("inference")
    check_name("policy", settings.policy)
    with settings.redis() as url:
        try:
            anyio.run(_main, settings, url, log, backend_options={"use_uvloop": True})
        except BaseExceptionGroup as group:  # of nested task groups; the first error says it
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from None if isinstance(error, LachesisError) else group
    return 0
