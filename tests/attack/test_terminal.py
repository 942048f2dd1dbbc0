"""What environments, trainers, servers and posts are called, and what they wrote, does nothing on an operator's terminal."""

from __future__ import annotations

import ast
import asyncio
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import commands
import msgspec
import pytest
from queued import put

from lachesis.broker import Broker
from lachesis.broker.records.registrations import ArchiverStatus, EnvConfig, EnvRecord, TrainerConfig
from lachesis.broker.records.steps import LedgerEntry
from lachesis.broker.records.versions import ServerStatus
from lachesis.broker.retention.dead_letters import compressed
from lachesis.cli import terminal
from lachesis.cli.terminal import visible
from lachesis.cli.up.progress import Display, View

CLI = Path(terminal.__file__).parent
HOSTILE = "[/x]boom\x1b]0;PWNED\x07\x1b[2J\nFORGED row\r\u202egnp\u2028x\x9b1m\x7f"
ACTIVE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


# -- all of the command line prints through one module ------------------------------------------------------------------


def unsafe(source: str) -> Iterator[str]:
    """Ways past it: a print or a Console of one's own, and what reads a string as Rich's markup whatever the console says."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in ("from_markup", "write_through", "print_json", "input"):
            yield node.attr
        if isinstance(node, ast.Attribute) and ast.unparse(node) in (
            "sys.stdout.write",
            "sys.stderr.write",
            "os.write",
        ):
            yield ast.unparse(node)
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name.rpartition(".")[2] in ("Console", "get_console", "pprint") or name in ("print", "rich.print"):
            yield name
        if name in ("Live", "Progress", "Status") and "console" not in given:
            yield f"{name} without console"
        if name == "Panel" and not all(given.get(part, "Text(").startswith("Text(") for part in ("title", "subtitle")):
            yield "Panel with markup in its title"
        if name.endswith("Column") and name.startswith("Text") and given.get("markup") != "False":
            yield f"{name} with markup"
        if given.get("markup") == "True":
            yield f"{name} with markup"


def test_commands_print_in_no_other_way() -> None:
    files = [file for file in sorted(CLI.rglob("*.py")) if file.name != "terminal.py"]
    assert len(files) > 20
    assert {file.name: found for file in files if (found := list(unsafe(file.read_text())))} == {}


@pytest.mark.parametrize(
    "source",
    ["print(x)", "Console()", "rich.console.Console()", "Live(x)", "Panel(x, title=name)", "Text.from_markup(x)",
     "TextColumn('{x}')", "sys.stdout.write(x)", "c.print(x, markup=True)"],
)  # fmt: skip
def test_that_check_can_fail(source: str) -> None:
    assert list(unsafe(source))


# -- what they print ----------------------------------------------------------------------------------------------------


def test_text_is_spelled_out() -> None:
    assert visible("a\x1b[2J\n\u202e\x9b") == "a\\x1b[2J\\x0a\\u202e\\x9b"
    assert visible("a\n\r", keep="\n") == "a\n\\x0d"
    assert visible("gsm8k · 環境 [ok] 100 %") == "gsm8k · 環境 [ok] 100 %"


async def hostile(broker: Broker) -> str:
    """A run in which every name and text that somebody else gives is hostile. Returns the id of a refused post."""
    redis, keys, text = broker.redis, broker.keys, HOSTILE
    await broker.registry.register_trainer(TrainerConfig(text, text, 4, 64, text, 1, 0, 9))
    await put(broker, *range(4))
    await broker.queue.subscribe("main")
    await broker.queue.lease_or_form("main", text, 4, lapse_s=60)
    config = EnvConfig(max_token_length=64, desired_name=text, weight=1.0, group_size=2)
    env = EnvRecord(0, f"{text}_0", config)
    await redis.hset(keys.envs, "0", msgspec.json.encode(env))
    server = ServerStatus(text, "main", text, text, 0, -1, 4e9, last_error=text, rule=text, checksum=text)
    await redis.hset(keys.pools, text, msgspec.json.encode(server))
    archiver = ArchiverStatus(text, text, text, 1, 0.0)
    await redis.hset(
        keys.state, mapping={"archiver": msgspec.json.encode(archiver), f"dropped:{text}": 1, f"covered:{text}": 1}
    )
    await redis.hset(keys.trainers, f"http:{text}", "4e9")
    await redis.hset(keys.tokens, text, json.dumps({"name": text, "role": "admin", "sha256": "", "created_at": 1.0}))
    await redis.xadd(
        keys.weights("main"),
        {"version": 1, "step": 1, "uri": text, "manifest_sha256": text, "bytes": 1, "dtype": text, "parent": 0},
        id="1-1",
    )
    entry = msgspec.structs.asdict(LedgerEntry(1, ("g0",), replica=text, at=1.0)) | {"gids": f"g0 {text}"}
    await redis.xadd(keys.ledger("main"), entry, id="1-0")
    await redis.xgroup_create(keys.batches, text)
    for kind in ("step", "eval", "update", text):
        await broker.journal.metric(
            kind, {"step": 1, "num_steps": 9, "reward": 1.0, f"env_score/{text}": 1.0, "env_score/b": 0.5, text: text}
        )
    example = dict.fromkeys(
        (
            "step",
            "score",
            "advantage",
            "v_min",
            "v_max",
            "env",
            "env_name",
            "gid",
            "row",
            "tokens",
            "prompt",
            "response",
        ),
        text,
    )
    await broker.journal.metric("example", example)
    await broker.journal.control(text, text, text)
    for stream in (keys.dead, keys.refused):
        await redis.xadd(stream, {"gid": text, "reason": text, "deliveries": 1, "detail": text})
    await redis.xadd(
        keys.refused, {"gid": "refused-x", "reason": "invalid", "deliveries": 0, "detail": text, "kept": 9, "size": 9}
    )
    await redis.set(keys.blob("refused-x"), compressed(text.encode()))
    return "refused-x"


SHOWN = (
    ("status",),
    ("tail",),
    ("tail", "--examples"),
    ("tail", "--control"),
    ("audit",),
    ("trainers",),
    ("shadow", "--once"),
    ("token", "list"),
    ("dead", "list"),
    ("dead", "show", "refused-x"),
    ("dead", "requeue", "--all"),
    ("pool", "list"),
    ("retention",),
    ("replay", "--from-run", "{other}", "--dry-run"),
)


@pytest.mark.anyio
async def test_no_command_passes_on_what_acts_on_a_terminal(broker: Broker) -> None:
    await hostile(broker)
    other = broker.for_run(f"{broker.keys.run}-empty")
    await other.queue.subscribe("main")
    where = ("--redis-url", broker.url, "--run")
    for command in SHOWN:
        run = other.keys.run if command[0] == "replay" else broker.keys.run
        arguments = [word.format(other=broker.keys.run) for word in command]
        for more in ([], ["--json"]) if command[1:2] != ("requeue",) and command[0] != "replay" else ([],):
            done = await asyncio.to_thread(commands.lachesis, *arguments, *more, *where, run)
            assert "Traceback" not in done.stderr, (command, done.stderr[-2000:])
            said = done.stdout + done.stderr
            assert not ACTIVE.search(said), (command, more, said)
            assert (
                not any(line.lstrip(" │").startswith("FORGED") for line in said.splitlines()) or "--examples" in command
            ), said
            if more and command[0] != "tail":
                assert "PWNED" in json.dumps(json.loads(done.stdout))
            elif more:
                assert all(json.loads(line) for line in done.stdout.splitlines())
            elif command[0] not in ("audit", "replay"):
                assert "PWNED" in said, command


def test_the_live_display_shows_it_as_itself(capsys: pytest.CaptureFixture[str]) -> None:
    view = View(
        title=HOSTILE, steps=9, step=1, parts={HOSTILE: HOSTILE}, warnings=[HOSTILE], scores={HOSTILE: 1.0, "b": 0.5}
    )
    screen = terminal.console(width=400, highlight=True)
    screen.file, screen._force_terminal = (written := io.StringIO()), True
    Display(view, console=screen).note(HOSTILE)
    screen.print(view.panel())
    plain = Display(view)
    plain.note(HOSTILE)
    plain.say(HOSTILE)
    plain.refresh()
    styles = re.sub(r"\x1b\[[0-9;]*m", "", written.getvalue())
    for text in (styles, capsys.readouterr().out):
        assert "PWNED" in text
        assert not ACTIVE.search(text), ascii(text)
