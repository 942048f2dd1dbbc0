"""What is decided before SGLang starts, and what a user is told who asks for the impossible."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import roles
from published import make_model

from lachesis.broker import ConfigurationError, EmbeddedRedis, connect_blocking
from lachesis.inference.agent import agent
from lachesis.inference.agent import sglang_args as command
from lachesis.inference.agent.sglang_process import ServerFailed
from lachesis.inference.settings import AgentSettings
from lachesis.inference.versions.model_folder import download, read_model_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "base")


def value_of(option: str, options: list[str]) -> str:
    return options[len(options) - options[::-1].index(option)]


def test_on_a_cpu_the_models_own_type_and_a_bounded_cache_are_used(base: Path) -> None:
    model = read_model_folder(base)

    options = command.model_options(AgentSettings(), "cpu", model, 7)

    assert value_of("--dtype", options) == "float32"
    assert value_of("--weight-version", options) == "7"
    assert value_of("--max-total-tokens", options) == str(128 * 512)
    assert "--context-length" not in options


def test_on_cuda_sglang_chooses_and_the_users_options_come_last(base: Path) -> None:
    settings = AgentSettings(context_length=64, sglang_args="--mem-fraction-static 0.4 --dtype float16")

    options = command.model_options(settings, "cuda", read_model_folder(base), 0)

    assert value_of("--dtype", options) == "float16"
    assert value_of("--context-length", options) == "64"
    assert options[-4:] == ["--mem-fraction-static", "0.4", "--dtype", "float16"]
    assert "--max-total-tokens" not in options
    assert "SGLANG_USE_CPU_ENGINE" not in command.environment("cuda", {})


def test_a_context_beyond_the_models_is_refused(base: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"context_length = 1024: .* at most 512 tokens"):
        command.model_options(AgentSettings(context_length=1024), "cpu", read_model_folder(base), 0)


def test_the_interpreter_with_sglang_is_found_beside_this_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    with pytest.raises(ConfigurationError, match=r"no SGLang found: .*--sglang-python"):
        command.find_python("")

    python = tmp_path / ".venv-sglang" / "bin" / "python"
    python.parent.mkdir(parents=True)
    shutil.copy("/bin/true", python)
    assert command.find_python("") == str(python)
    assert command.find_python(sys.executable) == sys.executable
    with pytest.raises(ConfigurationError, match="no such program"):
        command.find_python("/nowhere/python")


def test_a_model_of_the_hub_is_found_in_its_cache(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "hub" / "models--organisation--name"
    snapshot = Path(shutil.copytree(base, cached / "snapshots" / ("0" * 40)))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    assert download("organisation/name", sys.executable) == snapshot
    with pytest.raises(ConfigurationError, match="not to be had from the hub"):
        download("organisation/other", sys.executable)


def settings(redis: EmbeddedRedis, folder: Path, **more: object) -> AgentSettings:
    return AgentSettings.model_validate({"redis_url": redis.url, "run": "command", "state_dir": folder, **more})


def test_an_occupied_port_is_named(
    shared_redis: EmbeddedRedis, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "PORT_S", 0.0)
    with roles.listener() as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"port = {port}: another program listens"):
            agent.run(settings(shared_redis, tmp_path, port=port, model=str(base), sglang_python="/bin/false"))


def test_a_model_without_tokenizer_is_named_at_once(shared_redis: EmbeddedRedis, base: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(base, tmp_path / "model"))
    (model / "tokenizer.json").unlink()

    with pytest.raises(ConfigurationError, match="no tokenizer"):
        agent.run(settings(shared_redis, tmp_path, model=str(model), sglang_python="/bin/false"))


def test_an_sglang_that_never_starts_is_given_up(
    shared_redis: EmbeddedRedis, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'ImportError: no torch here' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(agent, "SERVER_BACKOFF_S", (0.0,))

    with pytest.raises(ServerFailed, match="failed 3 times and was never ready: ImportError: no torch here"):
        agent.run(settings(shared_redis, tmp_path, model=str(base), sglang_python=str(broken)))
    with connect_blocking(shared_redis.url, "command") as blocking:
        assert blocking.call(blocking.broker.registry.servers) == []
