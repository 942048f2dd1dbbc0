"""How tests are run: which belong to a tier, in which order, by which worker, and how long a file may take.

Tests run in a random order that `--randomly-seed=N` repeats; the first lines say N. Two workers share them, a file on one
of them; files that start a real SGLang are one group, so that one of them runs at a time. Hypotheses are the same in each
run; with --long they are random, and what fails says how to repeat it.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Generator
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

SLOW = ("sglang", "verl")  # markers of files that take long
PIECE_S = 0.12  # of Python's time on the machine that limits were set on
CHECKS = list(hypothesis.HealthCheck)  # they judge wall time
hypothesis.settings.register_profile("ci", deadline=None, suppress_health_check=CHECKS, derandomize=True, database=None)
hypothesis.settings.register_profile("long", deadline=None, suppress_health_check=CHECKS, print_blob=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the tests marked long too, others in their long form")
    parser.addoption(
        "--file-s",
        type=float,
        help="fail where a file's tests take longer together, session's fixtures apart; slower machines get more in proportion",
    )


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("long" if config.getoption("--long") else "ci")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_FileTimes(config.getoption("--file-s")))


@pytest.fixture(scope="session")
def long_form(request: pytest.FixtureRequest) -> bool:
    """Whether tests are run that are long, and others in their long form."""
    return bool(request.config.getoption("--long"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        left_out = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    """Files that take long begin first, so that workers end together. Else the order stays."""
    return next((place for place, marker in enumerate(SLOW) if item.get_closest_marker(marker)), len(SLOW))


class _ByFile(LoadScopeScheduling):
    """A file is one worker's, and so are all files together that start a real SGLang."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "sglang" if self._starts_sglang(file) else file

    @functools.cache  # noqa: B019  # one scheduler a process
    def _starts_sglang(self, file: str) -> bool:
        return "mark.sglang" in (self.config.rootpath / file).read_text()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    config.option.loadscopereorder = False  # it would begin with the files that have most tests
    return _ByFile(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(request: Any) -> Generator[None, object, object]:
    """Note what a fixture took that serves more than one file."""
    began = time.monotonic()
    try:
        return (yield)
    finally:
        if request.scope == "session":
            request._pyfuncitem.user_properties.append(("session_fixture_s", time.monotonic() - began))


def slowness() -> float:
    """How many times longer a piece of Python takes now than on the machine that limits were set on; 1 at least."""
    began = time.perf_counter()
    sum(number * number for number in range(2_000_000))
    return max(1.0, (time.perf_counter() - began) / PIECE_S)


class _FileTimes:
    """Seconds by file; a file that takes longer than the limit fails the run."""

    def __init__(self, limit_s: float | None) -> None:
        self._limit_s, self._seconds = limit_s, defaultdict[str, float](float)
        if self._limit_s:
            self._slowness = slowness()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        shared = sum(float(str(value)) for name, value in report.user_properties if name == "session_fixture_s")
        if report.when == "setup":
            self._seconds[report.nodeid.partition("::")[0]] -= shared
        self._seconds[report.nodeid.partition("::")[0]] += report.duration

    def _too_long(self) -> list[str]:
        return [f"{file} took {s:.0f} s" for file, s in self._seconds.items() if self._limit_s and s > self._limit_s]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._limit_s:
            self._limit_s *= max(self._slowness, slowness())
        if self._too_long() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._limit_s:
            terminalreporter.section("slowest files")
            for file, seconds in sorted(self._seconds.items(), key=lambda one: -one[1])[:10]:
                terminalreporter.write_line(f"{seconds:6.0f} s  {file}")
            for line in self._too_long():
                terminalreporter.write_line(
                    f"{line}: more than {self._limit_s:g} s; split it, or make a part of it long"
                )
