"""`lachesis COMMAND …`: finds the command, reads its settings, turns errors into one line and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import TracebackType

from lachesis import __version__
from lachesis.broker.errors import ConfigurationError, LachesisError, did_you_mean
from lachesis.cli.catalogue import COMMANDS, MODULES
from lachesis.cli.terminal import say

USAGE_ERROR, FAILED, INTERRUPTED, PIPE_CLOSED = 2, 1, 130, 141


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        (
            "usage: lachesis COMMAND [options]",
            "",
            "RL post-training on Redis Streams: Atropos environments, verl trainers, SGLang pools.",
            "",
            "commands:",
            *lines,
            "",
            "`lachesis COMMAND --help` lists a command's options. Every option --some-name can also be given as",
            "LACHESIS_SOME_NAME in the environment or some_name in the TOML file that LACHESIS_CONFIG names.",
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script.

    Exit codes: 0 done, 1 failed, 2 wrong usage or settings, 130 interrupted, 141 who read the output has gone.
    """
    words = list(arguments if arguments is not None else sys.argv[1:])
    name, *rest = words or ["--help"]
    os.umask(0o077)  # rollouts, weights and logs are for who runs this
    sys.excepthook = partial(_print_traceback, words)
    try:
        code = _run(name, rest)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else it is flushed once more at the end
        return PIPE_CLOSED


def _run(name: str, arguments: Sequence[str]) -> int:
    if name in ("-h", "--help", "help"):
        say(*usage().split("\n"))
        return 0
    if name == "--version":
        say(f"lachesis {__version__}")
        return 0
    if name not in COMMANDS:
        meant = did_you_mean(name, COMMANDS) or f"; one of {', '.join(COMMANDS)}"
        return _refuse("lachesis", f"no command {name!r}{meant}", USAGE_ERROR, [name, *arguments])
    try:
        return _load(COMMANDS[name].module)(arguments)
    except ConfigurationError as error:
        return _refuse(f"lachesis {name}", str(error), USAGE_ERROR, arguments)
    except LachesisError as error:
        return _refuse(f"lachesis {name}", str(error), FAILED, arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        if (missing := _missing(error, COMMANDS[name].extra)) is not None:
            return _refuse(f"lachesis {name}", missing, FAILED, arguments)
        if (why := _not_ours(error)) is None:
            raise  # a mistake of ours, whose traceback says where
        return _refuse(f"lachesis {name}", why, FAILED, arguments)


def _missing(error: BaseException, extra: str) -> str | None:
    """Which of the extra's modules is not installed, in a line; None for any other error."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    module = error.name.partition(".")[0]
    if module not in MODULES.get(extra, "").split():
        return None
    return f"{module} is not installed: pip install 'lachesis-rl[{extra}]' brings what this command needs"


def _not_ours(error: BaseException) -> str | None:
    """What Redis or the system refused, in a line; None for any other error. A command has been patient with Redis by then."""
    from redis.exceptions import RedisError  # takes longer than all of --help

    from lachesis.broker.store.redis_errors import describe, trouble

    while isinstance(error, BaseExceptionGroup):  # of task groups; the first error says it
        error = error.exceptions[0]
    if isinstance(error, RedisError):
        return describe(error) if trouble(error) is not None else None
    if isinstance(error, OSError) and error.errno is not None:
        return f"the system refuses{f' {error.filename!r}' if error.filename else ''}: {error.strerror or error}"
    return None


def _refuse(who: str, why: str, code: int, arguments: Sequence[str]) -> int:
    say(*_without_passwords(f"{who}: {why}", arguments).split("\n"), file=sys.stderr)
    return code


def _print_traceback(
    arguments: Sequence[str], kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    text = _without_passwords("".join(traceback.format_exception(kind, error, trace)), arguments)
    say(*text.rstrip("\n").split("\n"), file=sys.stderr)


def _without_passwords(text: str, arguments: Sequence[str]) -> str:
    """The text with what looks like a URL among arguments and variables as it may be shown, wherever it is repeated."""
    from lachesis.broker.store.connection import hide_password  # takes longer than all of --help

    given = [*arguments, *(value for name, value in os.environ.items() if name.upper().startswith("LACHESIS_"))]
    for word in dict.fromkeys(part for one in given for part in (one.partition("=")[2], one)):
        if "://" in word or ":" in word.rpartition("@")[0]:
            for written in (word, str(Path(word))):  # where it was taken for a folder
                text = text.replace(written, hide_password(word))
    return text


def _load(target: str) -> Callable[[Sequence[str]], int]:
    module, _, function = target.partition(":")
    found: Callable[[Sequence[str]], int] = getattr(import_module(module), function or "main")
    return found


if __name__ == "__main__":
    sys.exit(main())
