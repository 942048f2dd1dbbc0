"""Every command with inputs that can't work: one line that says what is wrong, an exit code that is not 0, never a traceback."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from lachesis.broker import EmbeddedRedis, connect_blocking
from lachesis.cli.catalogue import COMMANDS
from lachesis.cli.main import main

RUN = "wrong-inputs"


@pytest.fixture(scope="module")
def redis_url(shared_redis: EmbeddedRedis) -> str:
    """A Redis with one run that nothing was told of yet."""
    with connect_blocking(shared_redis.url, RUN) as broker:
        broker.call(broker.broker.enlist)
    return shared_redis.url


@pytest.fixture
def refusing() -> Iterator[int]:
    """A port that something listens on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


class Case(NamedTuple):
    """`{redis}`, `{run}`, `{port}` and `{tmp}` stand for the fixtures' values."""

    arguments: str
    says: str
    environment: Mapping[str, str] = {}
    toml: str = ""
    code: int = 2


THERE = "--redis-url {redis} --run {run}"
TYPO = "--redis-url {redis} --run wrong-input"  # of a run that there is
NAMED = "--run = 'wrong-input': no such run; there"
UP = "up --shim-port 0 --front-door-port 0"

CASES = [
    Case("frobnicate", "no command 'frobnicate'; one of up, status"),
    Case("statu", "no command 'statu'; did you mean 'status'?"),
    # names that no command knows
    Case("status --jsn", "unrecognized arguments: --jsn; did you mean '--json'?"),
    Case("up --stepz 3", "unrecognized arguments: --stepz; did you mean '--steps'?"),
    Case(
        "up", "LACHESIS_STEPZ: no command has such a setting; did you mean 'LACHESIS_STEPS'?", {"LACHESIS_STEPZ": "5"}
    ),
    Case(
        "up",
        "shim_prot in lachesis.toml: no command has such a setting; did you mean 'shim_port'?",
        toml="shim_prot = 1",
    ),
    Case("status", "trainer in lachesis.toml: no command has such a setting", toml="[trainer]\nsteps = 1"),
    # files and variables that can't be read
    Case("up", "lachesis.toml: not TOML", toml="steps = = 3"),
    Case("status", "lachesis.toml: not TOML", toml="run = 'ÿ\0'"),
    Case("up", "steps in lachesis.toml = 'abc'", toml="steps = 'abc'"),
    Case("up", "LACHESIS_STEPS = 'abc'", {"LACHESIS_STEPS": "abc"}),
    Case("up", "LACHESIS_CONFIG = '/nope.toml': no such file", {"LACHESIS_CONFIG": "/nope.toml"}),
    Case("up", "overrides", {"LACHESIS_OVERRIDES": "a=1"}),
    # up: before anything is started
    Case("up --run a/b", "run = 'a/b'"),
    Case("up --env arithmetics", "known environments are arithmetic, gsm8k; did you mean 'arithmetic'?"),
    Case("up --model /nope", "--model = '/nope': no such folder"),
    Case("up --gpus 99", "--gpus = 99: this machine has"),
    Case("up --steps x", "--steps = 'x'"),
    Case("up --env gsm8k --data /nope.jsonl", "data = '/nope.jsonl': no such file"),
    Case("up --data x", "data = 'x': arithmetic makes its problems and takes no file"),
    Case("up --env gsm8k --data {tmp}/problems", "--model = 'tiny': takes at most 128 tokens, and gsm8k needs 1024"),
    Case("up --sglang-python /nope", "sglang_python = '/nope': no such program"),
    Case("up lachesis.batchsize=3 --steps 3", "did you mean 'lachesis.batch_size'?"),
    Case("up +lachesis.nosuch=1", "lachesis.nosuch: no such setting, so nothing would read it"),
    Case("up lachesis.tracking=[file,tensorbord]", "no backend 'tensorbord'"),
    Case(
        "up trainer.logger=[console,tensorboard]",
        "trainer.logger: not read by this trainer; lachesis.tracking takes its place",
    ),
    Case("up lachesis.max_token_len=129", "lachesis.max_token_len = 129: must be from 1 to 128"),
    Case("up notanoverride", "notanoverride: not read by this trainer"),
    Case("up --shim-port {port} --front-door-port 0", "--shim-port = {port}: another program listens"),
    Case(f"{UP} --state-dir {{tmp}}/file", "--state-dir = '{tmp}/file': can't be made"),
    Case(f"{UP} --state-dir /proc/nope", "--state-dir = '/proc/nope': can't be made"),
    Case(f"{UP} --redis-url redis://127.0.0.1:1", "no Redis answers at redis://127.0.0.1:1", code=1),
    Case("redis-users", "--to is missing"),
    Case("redis-users --to {tmp}/nothing --run a/b", "run = 'a/b'"),
    Case("redis-users --to {tmp}/nothing --address u:p@h", "--address: must be redis://HOST:PORT/0"),
    Case("redis-users --to {tmp}/nothing --address redis://h:x/0", "--address: must be redis://HOST:PORT/0"),
    Case("redis-users --to {tmp}/nothing --address redis://h:1/x", "--address: must be redis://HOST:PORT/0"),
    Case("redis-users --to {tmp}/file", "--to = '{tmp}/file/redis': can't be made"),
    Case("status", "sglang_python in {tmp}/there/lachesis.toml: a file that nobody named", toml="sglang_python = '/x'"),
    Case("up", "overrides in {tmp}/there/lachesis.toml: a file that nobody named", toml="overrides = ['a=1']"),
    # a run that there isn't
    *(
        Case(f"{command} {TYPO}", NAMED)
        for command in (
            *("status", "tail", "tail --control", "audit", "trainers", "shadow --once", "retention", "dead list"),
            *(
                "dead requeue --all",
                "token list",
                "token revoke x",
                "pool list",
                "pool newest",
                "archive --to x --once",
            ),
            "archive --stop",
        )
    ),
    Case("replay --redis-url {redis} --from-run wrong-input", "--from-run = 'wrong-input': no such run; there"),
    *(
        Case(f"{command} --state-dir {{tmp}}/nothing", "--state-dir = '{tmp}/nothing': no run here")
        for command in ("status", "tail --embedded", "audit", "pool list")
    ),
    Case("status", "which Redis? Give --redis-url"),
    Case("status --redis-url redis://127.0.0.1:1", "no Redis answers", code=1),
    Case("status --redis-url nonsense", "redis_url = 'nonsense'"),
    # a policy or a pool that there isn't
    *(
        Case(
            f"{command} {THERE} --policy mian",
            "--policy = 'mian': run 'wrong-inputs' has no such policy; there are main",
        )
        for command in ("status", "audit", "trainers", "pool newest", "archive --once --to x", "replay --archive x")
    ),
    Case(f"pool list {THERE} --pool a:b", "pool = 'a:b'"),
    Case(f"pool pin 3 {THERE} --pool mian", "--pool = 'mian': no server is in such a pool"),
    Case(
        f"pool pin 3 {THERE}",
        "version = 3: policy 'main' has not published it; it has none yet; there are 0 (0 is the base model)",
    ),
    Case(f"pool pin {THERE}", "the following arguments are required: VERSION"),
    Case(f"pool pin x {THERE}", "VERSION = 'x'"),
    Case(f"pool canary 3 --share 2 {THERE}", "--share = '2'"),
    Case(f"pool rollback {THERE}", "has no canary to promote or roll back"),
    Case("pool pn 3", "no such action: 'pn'; one of list, newest, pin, canary, promote, rollback"),
    Case(f"tail --lines -1 {THERE}", "--lines = '-1'"),
    Case(f"tail --examples --control {THERE}", "exclude each other"),
    Case(f"shadow --remove x {THERE}", "remove = 'x': not a shadow"),
    Case(f"token create {THERE}", "--role is missing: what its holder may do: environment, trainer, or admin"),
    Case(f"token create --role king {THERE}", "--role = 'king'"),
    Case(f"token create --role admin --name= {THERE}", "--name = ''"),
    Case(f"token revoke nobody {THERE}", "no token named 'nobody'"),
    Case(
        f"dead list --reason stael {THERE}",
        "--reason = 'stael': must be one of deliveries, invalid, lost, oversized, stale, unreadable, untrainable",
    ),
    Case(f"dead show nosuch {THERE}", "nosuch", code=1),
    Case(f"dead purge {THERE}", "which ones?"),
    Case(f"dead purge --all --older-than 3x {THERE}", "--older-than = '3x'"),
    Case(f"dead purge --all --older-than= {THERE}", "--older-than = '': give a value, or leave it out for all"),
    Case(f"dead purge --all --reason= {THERE}", "--reason = '': give a value, or leave it out for all"),
    Case(f"dead requeue --all --reason= {THERE}", "--reason = ''"),
    Case(f"retention --keep-bytes lots {THERE}", "--keep-bytes = 'lots'"),
    Case(f"retention --keep-bytes -1 {THERE}", "--keep-bytes = '-1'"),
    Case(f"archive {THERE}", "give either --to DIR-OR-URL, or --stop"),
    Case(f"archive --once --to nosuch://x {THERE}", "nosuch"),
    Case(f"archive --once --to {{tmp}}/file {THERE}", "archive = '{tmp}/file': can't write there"),
    Case(f"replay --archive {{tmp}}/nothing {THERE}", "there are no segments"),
    Case(f"replay --archive {{tmp}} --steps 5:2 {THERE}", "--steps = '5:2'"),
    Case("base-model --out /proc/nope/x", "--out = '/proc/nope': can't be made"),
    Case("base-model --out {tmp}/file", "--out = '{tmp}/file': is there, and is no model"),
    Case("base-model --seed -1", "--seed = '-1'"),
    Case(f"base-model --seed {1 << 63}", f"--seed = '{1 << 63}'"),
    Case("evaluate --env chess", "environment 'chess'"),
    Case("evaluate --front-door-url http://127.0.0.1:1", "gave no answer", code=1),
    Case("evaluate --front-door-url 127.0.0.1:1", "--front-door-url = '127.0.0.1:1'"),
    Case("evaluate --front-door-url http://[::1", "must be http://HOST:PORT"),
    Case("evaluate --front-door-url http://h:99999", "--front-door-url = 'http://h:99999': must be"),
    Case("evaluate --limit 0", "--limit = '0'"),
    Case("env", "the following arguments are required: NAME"),
    Case("env chess --model x", "environment 'chess'"),
    Case("env arithmetic --model /nope", "--model = '/nope': no such folder"),
    Case("env arithmetic --model {tmp}", "--model = '{tmp}': holds no tokenizer"),
    Case(
        "env arithmetic --model /nope --shim-url localhost:8000", "--shim-url = 'localhost:8000': must be http://HOST"
    ),
    Case("env arithmetic --model /nope --front-door-url http://h:x", "--front-door-url = 'http://h:"),
    Case("env gsm8k --data /nope.jsonl --model gpt2", "data = '/nope.jsonl': no such file"),
    Case(f"shim --port {{port}} {THERE}", "another program listens there"),
    Case(f"shim --fd 99 {THERE}", "fd = 99: not an open socket"),
    Case(f"front-door --fd 99 {THERE}", "fd = 99: not an inherited socket"),
    Case(f"shim --policy a:b {THERE}", "policy = 'a:b'"),
    Case(f"shim --tls-cert {{tmp}}/file {THERE}", "--tls-cert and --tls-key need each other"),
    Case(f"front-door --port {{port}} {THERE}", "{port}"),
    Case(f"front-door --pool a:b {THERE}", "pool = 'a:b'"),
    Case(f"front-door --port 0 --upstream nonsense {THERE}", "--upstream = 'nonsense'"),
    Case(f"front-door --port 0 --upstream http:///v1 {THERE}", "--upstream = 'http:///v1': must be http://HOST:PORT"),
    Case(f"inference --device tpu {THERE}", "--device = 'tpu'"),
    Case(f"inference --sglang-python /nope {THERE}", "sglang_python = '/nope': no such program"),
    Case(f"inference --sglang-args ' {THERE}", '--sglang-args = "\'"'),
    Case(f"trainer {THERE} lachesis.nosuch=1", "lachesis.nosuch: no such setting"),
    Case(f"trainer lachesis.batch_size=0 {THERE} lachesis.seed=1", "lachesis.batch_size = 0: must be a whole number"),
    Case(f"trainer actor_rollout_ref.model.path=/nope {THERE}", "'/nope': no such folder"),
    Case(f"trainer {THERE}", "which model?"),
    Case(
        f"trainer --like-run {THERE}", "run 'wrong-inputs' has kept no configuration of policy 'main'; it has none yet"
    ),
    Case("trainer --cfg jb", "--cfg = 'jb'"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: (case.arguments + "".join(case.environment) + case.toml)[:70])
def test_a_wrong_input_is_one_line_and_not_a_success(
    case: Case,
    redis_url: str,
    refusing: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    values = {"redis": redis_url, "run": RUN, "port": refusing, "tmp": tmp_path}
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "problems").write_text(
        "".join(f'{{"question": "{n} + 1?", "answer": "#### {n + 1}"}}\n' for n in range(50))
    )
    there = tmp_path / "there"
    there.mkdir()
    if case.toml:
        (there / "lachesis.toml").write_bytes(case.toml.encode("latin-1"))
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(there)
    before = set(there.iterdir())

    try:
        code = main([word.format(**values) for word in case.arguments.split()])
    except SystemExit as ended:  # argparse's way
        code = ended.code if isinstance(ended.code, int) else 1

    shown, told = capfd.readouterr()
    lines = [line for line in told.splitlines() if ": settings from " not in line]
    assert (code, shown) == (case.code, ""), told
    assert len(lines) == 1, told
    assert case.says.format(**values) in lines[0]
    assert set(there.iterdir()) == before, "who is refused leaves nothing behind"
    assert not (tmp_path / "nothing").exists()


def test_the_table_has_every_command() -> None:
    assert {case.arguments.split()[0] for case in CASES} >= set(COMMANDS)
