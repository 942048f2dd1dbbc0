"""The environment's process as a user has it: it waits for the shim, stops when told, and says what is missing."""

from __future__ import annotations

import json
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ports import free_port

from lachesis.broker.errors import ConfigurationError
from lachesis.envs.main import run
from lachesis.envs.settings import EnvSettings

pytestmark = pytest.mark.slow

RUN = """
import atexit, sys
atexit.register(lambda: print("torch is", sys.modules.get("torch"), file=sys.stderr))
from lachesis.envs.main import run
from lachesis.envs.settings import EnvSettings
sys.exit(run(EnvSettings(_cli_parse_args=sys.argv[1:])))
"""


class Process:
    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self._arriving: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._arriving.put(line)
        self._arriving.put(None)

    def wait_for(self, text: str) -> None:
        while True:
            line = self._arriving.get(timeout=60)
            assert line is not None, "".join(self.lines)
            self.lines.append(line)
            if text in line:
                return

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(120)
        while (line := self._arriving.get(timeout=120)) is not None:
            self.lines.append(line)
        return code


@contextmanager
def started(*arguments: str) -> Iterator[Process]:
    process = Process(*arguments)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait()


class Shim(BaseHTTPRequestHandler):
    """Tells every environment to wait for its trainer, and keeps what it was asked."""

    asked: queue.Queue[str]

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        body = json.dumps({"status": "wait for trainer to start"}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.asked.put(self.path)

    do_GET = do_POST = answer

    def log_message(self, *_: object) -> None:
        pass


def test_it_waits_for_the_shim_in_one_line_and_stops_when_told(model_folder: Path) -> None:
    port = free_port()
    url = f"http://x:secret@127.0.0.1:{port}/runs/a/"
    arguments = ("arithmetic", "--shim-url", url, "--model", str(model_folder))
    with started(*arguments) as process:
        process.wait_for("waiting for the shim")
        asked: queue.Queue[str] = queue.Queue()
        handler = type("Handler", (Shim,), {"asked": asked})
        with ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            process.wait_for("making rollouts")
            paths = {asked.get(timeout=120) for _ in range(3)}
            assert "/runs/a/register-env" in paths
            assert process.stop() == 0
            server.shutdown()
        output = "".join(process.lines)
        assert output.count("waiting for the shim") == 1
        assert "secret" not in output
        assert "DEBUG" not in output
        assert "Traceback" not in output
        assert "stopped" in output
        assert "torch is None" in output  # importing it would be most of the time until the first rollout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_at_once_while_its_imports_are_under_way(number: int, model_folder: Path) -> None:
    script = RUN.replace(
        "sys.exit", "import threading, os; threading.Timer(0.3, os.kill, (os.getpid(), %d)).start(); sys.exit"
    )
    command = [sys.executable, "-c", script % number, "arithmetic", "--model", str(model_folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_it_names_what_is_missing() -> None:
    with pytest.raises(ConfigurationError, match=r"'chess': known ones are arithmetic, gsm8k"):
        run(EnvSettings(name="chess", model="m"))
    with pytest.raises(ConfigurationError, match=r"which tokenizer\? Give --model"):
        run(EnvSettings(name="arithmetic"))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer (none of tokenizer.json"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "has no chat template, which gsm8k's prompts need"),
    ],
    ids=["tokenizer", "chat template"],
)
def test_a_model_that_it_cannot_use_is_refused_at_once(
    spoil: Callable[[Path], None], says: str, model_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    spoil(folder)
    problems = tmp_path / "problems"
    problems.write_text("".join(f'{{"question": "{n} + 1?", "answer": "#### {n + 1}"}}\n' for n in range(50)))
    command = [
        sys.executable,
        "-m",
        "lachesis.cli.main",
        "env",
        "gsm8k",
        "--data",
        str(problems),
        "--model",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)  # no shim is there to wait for
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_atropos_own_command_line_knows_it() -> None:
    script = (
        "import runpy, sys; sys.modules['torch'] = None; "  # spares seconds
        "runpy.run_module('lachesis.envs.arithmetic', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run([sys.executable, "-c", script, "serve", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for flag in ("--env.rollout_server_url", "--openai.base_url", "--env.seed", "--env.data"):
        assert flag in done.stdout
