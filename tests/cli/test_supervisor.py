"""Supervision of real child processes: restart, giving up, stopping, dying with the parent."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lachesis.cli.up import supervisor as supervising
from lachesis.cli.up.supervisor import Part, PartFailed, Supervisor

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"  # the supervisor runs on the standard loop, whose children have a preexec_fn


def part(tmp_path: Path, code: str, name: str = "part") -> Part:
    return Part(name=name, argv=(sys.executable, "-c", code), log=tmp_path / f"{name}.log")


async def until(condition: object, timeout_s: float = 60.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        await asyncio.sleep(0.01)


async def test_a_killed_part_is_started_again_and_the_person_is_told(tmp_path: Path) -> None:
    notes: list[str] = []
    supervisor = Supervisor(notes.append)
    sleeper = part(tmp_path, "import time; time.sleep(60)")
    supervisor.start(sleeper)
    await until(lambda: sleeper.pid)
    first = sleeper.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: sleeper.pid not in (None, first))
    assert sleeper.restarts == 1
    assert "SIGKILL" in notes[0]
    await supervisor.stop("part")
    assert sleeper.state == "stopped"


async def test_exit_0_is_done_and_is_not_repeated(tmp_path: Path) -> None:
    supervisor = Supervisor(lambda text: None)
    done = part(tmp_path, "print('x')")
    supervisor.start(done)
    await supervisor.wait("part")
    assert (done.state, done.restarts, done.tail()) == ("done", 0, ["x"])


async def test_wrong_settings_are_not_retried_and_their_line_is_the_error(tmp_path: Path) -> None:
    supervisor = Supervisor(lambda text: None)
    supervisor.start(part(tmp_path, "import sys; print('lachesis x: no such model'); sys.exit(2)"))
    with pytest.raises(PartFailed, match=r"^lachesis x: no such model$"):
        await supervisor.wait("part")


async def test_giving_up_shows_the_end_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervising, "PART_BACKOFF_S", (0.01,))
    supervisor = Supervisor(lambda text: None)
    supervisor.start(part(tmp_path, "raise SystemExit('the reason')"))
    with pytest.raises(PartFailed, match="the reason") as caught:
        await supervisor.wait("part")
    assert f"{supervising.GIVE_UP} times in a row" in str(caught.value)


async def test_a_part_that_fails_slowly_again_and_again_is_given_up_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "PART_BACKOFF_S", (0.01,))
    monkeypatch.setattr(supervising, "PART_STEADY_S", 0.0)  # every life is a long one
    supervisor = Supervisor(lambda text: None)
    supervisor.start(part(tmp_path, "raise SystemExit('no memory')"))
    with pytest.raises(PartFailed, match=f"{supervising.GIVE_UP} times in a row.*\n.*no memory"):
        await supervisor.wait("part")


async def test_a_part_that_was_of_use_in_between_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "PART_BACKOFF_S", (0.01,))
    monkeypatch.setattr(supervising, "PART_STEADY_S", 0.0)
    supervisor = Supervisor(lambda text: supervisor.of_use("part"))
    lives = tmp_path / "lives"
    code = f"""
import sys, time
with open({str(lives)!r}, "a+") as lives:
    lives.write("x")
    lives.seek(0)
    count = len(lives.read())
if count > {2 * supervising.GIVE_UP}:
    sys.exit(0)
while not __import__("os").path.exists({str(lives)!r} + str(count)):
    time.sleep(0.01)
sys.exit(1)
"""
    worker = part(tmp_path, code)
    supervisor.start(worker)
    for life in range(1, 2 * supervising.GIVE_UP + 1):
        await until(lambda life=life: lives.exists() and len(lives.read_text()) == life and worker.state == "running")
        supervisor.of_use("part")
        Path(f"{lives}{life}").touch()
    await supervisor.wait("part")
    assert (worker.state, worker.restarts) == ("done", 2 * supervising.GIVE_UP)


async def test_another_parts_failure_ends_the_wait(tmp_path: Path) -> None:
    supervisor = Supervisor(lambda text: None)
    supervisor.start(part(tmp_path, "import time; time.sleep(60)", "good"))
    supervisor.start(part(tmp_path, "import sys; print('bad settings'); sys.exit(2)", "bad"))
    with pytest.raises(PartFailed, match="bad settings"):
        await supervisor.wait("good")
    await supervisor.stop("good")


async def test_waiting_beside_a_part_that_is_done_takes_no_cpu(tmp_path: Path) -> None:
    supervisor = Supervisor(lambda text: None)
    supervisor.start(part(tmp_path, "pass", "done"))
    await supervisor.wait("done")
    supervisor.start(part(tmp_path, "import time; time.sleep(1)", "other"))
    began = time.thread_time()
    await supervisor.wait("other")
    assert time.thread_time() - began < 0.3  # a busy loop would take the whole second


async def test_a_part_that_ignores_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    notes: list[str] = []
    supervisor = Supervisor(notes.append)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    stubborn = part(tmp_path, code)
    supervisor.start(stubborn)
    await until(lambda: stubborn.tail() == ["up"])
    await supervisor.stop("part", grace_s=0.2)
    assert stubborn.state == "stopped"
    assert "killed" in notes[0]


def test_children_end_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    code = f"""
import asyncio, sys
from pathlib import Path
from lachesis.cli.up.supervisor import Part, Supervisor
async def main():
    s = Supervisor(print)
    p = Part("child", (sys.executable, "-c", "import time; time.sleep(60)"), Path({str(tmp_path)!r}) / "c.log")
    s.start(p)
    while not p.pid: await asyncio.sleep(0.01)
    print(p.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the child outlived its supervisor"
        time.sleep(0.02)
