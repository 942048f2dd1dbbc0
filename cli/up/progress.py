"""What a person sees while a run trains: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lachesis.cli import terminal
from lachesis.cli.terminal import say, visible

PLAIN_EVERY_S = 5.0
NOTES = 4
SPARKS = "▁▂▃▄▅▆▇█"
COLOURS = {
    "running": "green",
    "ready": "green",
    "done": "green",
    "updating": "green",
    "restarting": "yellow",
    "failed": "red",
}


@dataclass
class View:
    """The state of a run as shown; filled from the metrics stream, the pools and the supervisor."""

    title: str
    steps: int
    phase: str = "starting"
    step: int = 0
    version: int = 0
    served: int = -1
    lag: int = 0
    queue: int = 0
    reward: float = float("nan")
    tokens_per_s: float = 0.0
    wait_share: float = 0.0
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (version, accuracy)
    rewards: deque[float] = field(default_factory=lambda: deque(maxlen=60))
    scores: dict[str, float] = field(default_factory=dict)  # of each environment, in the newest step
    parts: dict[str, str] = field(default_factory=dict)  # name -> state
    warnings: list[str] = field(default_factory=list)  # what is so now; notes are of what was
    notes: deque[str] = field(default_factory=lambda: deque(maxlen=NOTES))
    began: float = field(default_factory=time.monotonic)

    def line(self) -> str:
        """One plain line."""
        if not self.step:
            waiting = ", ".join(f"{name} {state}" for name, state in self.parts.items())
            return f"{self.phase} · {waiting}"
        return (
            f"step {self.step}/{self.steps}  reward {self.reward:.3f}  lag {self.lag}  queue {self.queue}  "
            f"{self.tokens_per_s:.0f} tokens/s  trainer wait {self.wait_share:.0%}  version {self.version}"
            + (f"  {self.each_score()}" if len(self.scores) > 1 else "")
            + "".join(f"  WARNING {warning}" for warning in self.warnings)
        )

    def each_score(self) -> str:
        """The mean score of each environment."""
        return "  ".join(f"{name} {score:.3f}" for name, score in self.scores.items())

    def curve(self) -> str:
        """Held-out accuracy: how it went, where it began and where it is."""
        if not self.held_out:
            return "–"
        shown = [f"{accuracy:.3f} (version {version})" for version, accuracy in (self.held_out[0], self.held_out[-1])]
        if len(self.held_out) == 1:
            return shown[0]
        return f"{shown[0]}  {sparkline([accuracy for _, accuracy in self.held_out])}  {shown[1]}"

    def panel(self) -> RenderableType:
        """The live panel."""
        clock = time.strftime("%M:%S", time.gmtime(time.monotonic() - self.began))
        numbers = Table.grid(padding=(0, 3))
        for _ in range(6):
            numbers.add_column()
        numbers.add_row(
            *(Text(label, style="dim") for label in ("reward", "lag", "queue", "tokens/s", "trainer wait", "version"))
        )
        reward = "–" if self.reward != self.reward else f"{self.reward:.3f}"
        numbers.add_row(
            Text(f"{reward} {sparkline(self.rewards)}", style="bold"),
            str(self.lag),
            f"{self.queue} groups",
            f"{self.tokens_per_s:,.0f}",
            f"{self.wait_share:.0%}",
            f"{self.version} (served {self.served if self.served >= 0 else '–'})",
        )
        bar = Table.grid(expand=True)  # a bar alone does not end its line
        bar.add_row(ProgressBar(total=max(self.steps, 1), completed=self.step))
        parts = Text("  ").join(
            Text.assemble(("● ", COLOURS.get(state.split()[0], "dim")), f"{name} ", (state, "dim"))
            for name, state in self.parts.items()
        )
        rows: list[RenderableType] = [
            Text.assemble((f"{self.phase}  ", "bold"), (f"step {self.step}/{self.steps}", "")),
            bar,
            numbers,
            Text.assemble(("held-out  ", "dim"), self.curve()),
            *([Text.assemble(("scores  ", "dim"), self.each_score())] if len(self.scores) > 1 else []),
            parts,
            *(Text(f"! {visible(warning)}", style="bold red") for warning in self.warnings),
        ]
        rows += [Text(visible(note, keep="\n"), style="yellow") for note in self.notes]
        return Panel(
            Group(*rows),
            title=Text(visible(self.title)),
            subtitle=Text(clock),
            title_align="left",
            subtitle_align="right",
        )


class Display:
    """`with Display(view) as display:` and `display.refresh()` whenever the view changed."""

    def __init__(self, view: View, *, console: Console | None = None) -> None:
        self.view = view
        self._console = console or terminal.console(highlight=True)
        self._live = Live(console=self._console, refresh_per_second=2, get_renderable=view.panel, transient=True)
        self._plain = not self._console.is_terminal
        self._printed_at = 0.0
        self._printed = ""

    def __enter__(self) -> Display:
        if not self._plain:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._plain:
            self._live.stop()

    def note(self, text: str) -> None:
        """Something a person should know; stays visible."""
        stamped = f"{time.strftime('%H:%M:%S')} {text}"
        self.view.notes.append(stamped)
        if self._plain:
            say(*stamped.split("\n"), flush=True)

    def say(self, text: str) -> None:
        """A line that stays in the scroll-back."""
        if self._plain:
            say(text, flush=True)
        else:
            self._console.print(text, highlight=False)

    def refresh(self) -> None:
        """Show the view's present state; on a pipe at most a line every few seconds."""
        now = time.monotonic()
        if self._plain and now - self._printed_at >= PLAIN_EVERY_S and (line := self.view.line()) != self._printed:
            say(line, flush=True)
            self._printed_at, self._printed = now, line
            sys.stdout.flush()


def sparkline(values: Iterable[float], width: int = 20) -> str:
    """Values between 0 and 1 (others are clipped) as a row of bars, averaged into at most `width`."""
    numbers = [min(max(value, 0.0), 1.0) for value in values]
    size = max(1, -(-len(numbers) // width))
    means = [
        sum(chunk) / len(chunk) for start in range(0, len(numbers), size) if (chunk := numbers[start : start + size])
    ]
    return "".join(SPARKS[round(mean * (len(SPARKS) - 1))] for mean in means)
