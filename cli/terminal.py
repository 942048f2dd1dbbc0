"""What a person reads: text from outside shows on a terminal as itself, and does nothing there.

Names, errors and rollouts come from environments, trainers, servers and archives. In them, a terminal's control sequences,
Rich's markup, line breaks and the marks that turn the direction of writing would rewrite what stands beside them. All
that commands print goes through `say`, `say_json` or a `console()`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, TextIO

import msgspec
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

# C0, DEL and C1, line and paragraph separators, what turns the direction of writing, halves of characters
_ACTIVE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, *, keep: str = "") -> str:
    """The text with what acts on a terminal spelled out, as `\\x1b`; but for the characters to `keep`."""
    return _ACTIVE.sub(lambda found: found[0] if found[0] in keep else _spelled(found[0]), text)


def say(*lines: object, file: TextIO | None = None, flush: bool = False) -> None:
    """Print, each in a line of its own."""
    for line in lines:
        print(visible(str(line)), file=file, flush=flush)


def say_json(value: Any) -> None:
    """Print as JSON in one line, in which what acts on a terminal is escaped."""
    text = msgspec.json.encode(value).decode()
    print(_ACTIVE.sub(lambda found: f"\\u{ord(found[0]):04x}", text), flush=True)


def console(
    *, stderr: bool = False, width: int | None = None, soft_wrap: bool = False, highlight: bool = False
) -> Console:
    """Where tables and live displays are printed: without markup in any text."""
    return _Console(stderr=stderr, width=width, soft_wrap=soft_wrap, highlight=highlight, markup=False, emoji=False)


class _Console(Console):
    """A string is one line; other renderables keep their line breaks."""

    def render_str(self, text: str, **style: Any) -> Text:
        return super().render_str(visible(text), **style)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text, keep="\n"), segment.style)


def _spelled(character: str) -> str:
    return f"\\x{ord(character):02x}" if ord(character) < 0x100 else f"\\u{ord(character):04x}"
