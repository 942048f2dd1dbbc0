"""The command line as a person meets it: help, errors in one line, exit codes, status and audit on a real Redis."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from commands import lachesis
from rich.console import Console

from lachesis.broker import Broker, EmbeddedRedis
from lachesis.cli.catalogue import COMMANDS
from lachesis.cli.commands.status import StatusSettings
from lachesis.cli.main import main
from lachesis.cli.options import all_names, parse
from lachesis.cli.up.progress import View, sparkline
from lachesis.cli.up.settings import UpSettings

EXPLAIN_ALL = """
import sys
from lachesis.cli.catalogue import COMMANDS; from lachesis.cli.main import main
for command in COMMANDS:
    try:
        main([command, "--help"])
    except SystemExit as end:
        assert not end.code, command
    heavy = {"torch", "verl", "transformers", "sglang", "atroposlib"} & set(sys.modules)
    assert not heavy, (command, heavy)
"""


def test_every_command_explains_itself_without_loading_torch() -> None:
    done = subprocess.run([sys.executable, "-c", EXPLAIN_ALL], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert [name for name in COMMANDS if f"usage: lachesis {name}" not in done.stdout] == []


@pytest.mark.parametrize("command", ["up", "tail"])
def test_help_waits_for_no_client_of_redis(command: str) -> None:
    code = f"""
import sys
from lachesis.cli.main import main
try:
    main(["{command}", "--help"])
finally:
    print("imported:", *sorted({{"redis", "numpy", "zstandard", "anyio"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "imported:")


def test_a_command_is_a_process_with_an_exit_code() -> None:
    """As a shell starts it; the other tests fork theirs from a process that has imported it."""
    command = [sys.executable, "-m", "lachesis.cli.main", "frobnicate"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lachesis: no command 'frobnicate'; one of up, status")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["frobnicate"], 2, "no command 'frobnicate'"),
        (["audit", "--redis-url", "redis://127.0.0.1:1/0"], 1, "no Redis answers at redis://127.0.0.1:1/0"),
        (["audit", "--redis-url", "nonsense"], 2, "redis_url = 'nonsense'"),
        (["status"], 2, "which Redis? Give --redis-url"),
        (["status", "--redis-url", "redis://localhost", "--embedded"], 2, "exclude each other"),
        (["up", "--env", "chess"], 2, "--env = 'chess': known environments are"),
        (["up", "--model", "./nowhere"], 2, "--model = './nowhere': no such folder"),
        (["up", "--gpus", "99"], 2, "--gpus = 99: this machine has"),
        (["up", "--steps", "-1"], 2, "--steps = '-1'"),
        (["up", "--nonsense"], 2, "unrecognized arguments: --nonsense"),
        (["status", "--run", "no/slash", "--embedded"], 2, "run = 'no/slash'"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: list[str], code: int, says: str, tmp_path: Path) -> None:
    done = lachesis(*arguments, cwd=tmp_path)
    assert done.returncode == code
    lines = [line for line in done.stderr.splitlines() if not line.startswith("usage:")]
    assert len(lines) == 1
    assert says in lines[0]


def test_a_model_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = lachesis("up", "--model", str(tmp_path), "--env", "arithmetic", cwd=tmp_path)
    assert done.returncode == 2
    assert "holds no tokenizer" in done.stderr
    assert not (tmp_path / ".lachesis").exists()


def test_an_occupied_port_is_named_and_nothing_stays_behind(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = lachesis("up", "--shim-port", str(port), "--front-door-port", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert f"another program listens on 127.0.0.1:{port}" in done.stderr
    assert not (tmp_path / ".lachesis" / "redis").exists()


@pytest.mark.anyio
async def test_status_and_audit_of_an_empty_run(broker: Broker) -> None:
    await broker.enlist()
    where = ("--redis-url", broker.url, "--run", broker.keys.run)
    done = lachesis("status", *where, "--json")
    assert json.loads(done.stdout)["queue"]["groups"] == 0
    assert json.loads(done.stdout)["redis"]["append_only"]
    assert "keeps an append-only file" in lachesis("status", *where).stdout
    done = lachesis("audit", *where, "--json")
    assert (done.returncode, json.loads(done.stdout)["clean"]) == (0, True)


@pytest.mark.anyio
async def test_a_setting_has_one_name_everywhere(broker: Broker, shared_redis: EmbeddedRedis, tmp_path: Path) -> None:
    for run in ("from-toml", "from-flag"):
        await broker.for_run(run).enlist()
    (tmp_path / "lachesis.toml").write_text(f'redis_url = "{shared_redis.url}"\nrun = "from-toml"\nport = 1\n')
    assert json.loads(lachesis("status", "--json", cwd=tmp_path).stdout)["run"] == "from-toml"
    flag = lachesis("status", "--json", "--run", "from-flag", cwd=tmp_path)
    assert json.loads(flag.stdout)["run"] == "from-flag"


def test_overrides_keep_their_commas_and_may_stand_before_and_after_options() -> None:
    words = ["a=[b,c]", "--steps", "3", "d={e:1,f:2}", "--fresh", 'g="h,i"', "+j='k,l'"]
    settings = parse(UpSettings, "up", words)
    assert settings.overrides == ["a=[b,c]", "d={e:1,f:2}", 'g="h,i"', "+j='k,l'"]
    assert (settings.steps, settings.fresh) == (3, True)
    assert parse(UpSettings, "up", []).overrides == []


def test_a_setting_with_another_name_on_the_command_line_has_a_variable_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LACHESIS_JSON", "1")
    monkeypatch.setenv("JSON", "not ours")
    assert parse(StatusSettings, "status", []).json_output


def test_help_takes_no_heavy_imports_and_all_settings_have_one_name() -> None:
    names = all_names()
    assert {"redis_url", "shim_port", "json", "overrides", "keep_bytes", "sglang_python", "max_deliveries"} <= names
    assert "json_output" not in names


def test_the_view_shows_what_a_person_asks_for() -> None:
    view = View(
        title="t", steps=10, step=3, reward=0.5, lag=1, queue=4, tokens_per_s=1234.0, wait_share=0.07, version=3
    )
    assert view.line() == "step 3/10  reward 0.500  lag 1  queue 4  1234 tokens/s  trainer wait 7%  version 3"
    view.scores, view.warnings = {"sums": 0.5, "words": 0.25}, ["pool main: pinned to version 2"]
    assert view.line().endswith("version 3  sums 0.500  words 0.250  WARNING pool main: pinned to version 2")


def test_the_panel_gives_every_row_a_line_of_its_own() -> None:
    view = View(title="t", steps=10, step=3, reward=0.5, parts={"shim": "running"})
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(view.panel())
    lines = [line.strip("│ ") for line in console.export_text().splitlines()]
    assert lines[1].startswith("starting  step 3/10")
    assert set(lines[2]) <= set("━╸╺ ")
    assert lines[3].split() == ["reward", "lag", "queue", "tokens/s", "trainer", "wait", "version"]
    assert lines[4].split()[:2] == ["0.500", "0"]


def test_the_panel_shows_the_curve_of_held_out_accuracy_and_what_is_wrong_now() -> None:
    view = View(title="t", steps=10, held_out=[(0, 0.25), (4, 0.5), (8, 1.0)], warnings=["s0: version 3 is gone"])
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(view.panel())
    shown = console.export_text()
    assert "held-out  0.250 (version 0)  ▃▅█  1.000 (version 8)" in shown
    assert "! s0: version 3 is gone" in shown


def test_sparkline_averages_into_its_width() -> None:
    assert sparkline([0.0, 1.0]) == "▁█"
    assert len(sparkline([0.5] * 100, width=20)) == 20
