"""How SGLang is started: which interpreter, which device, which options and environment."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lachesis.broker.errors import ConfigurationError

if TYPE_CHECKING:
    from lachesis.inference.settings import AgentSettings
    from lachesis.inference.versions.model_folder import ModelFolder

LAUNCHER = Path(__file__).with_name("launcher.py")
WATCHDOG_S = 300.0  # SGLang's default
CPU_REQUESTS = 128  # sequences at once on a CPU where the settings don't say
CPU_CACHE_TOKENS = 65_536  # upper bound of the KV cache on a CPU, in tokens, unless one context is longer

_ON_CPU = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--disable-overlap-schedule", "--disable-cuda-graph"),
    *("--skip-server-warmup", "--sleep-on-idle"),
)

_CPU_ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_CPU_OMP_THREADS_BIND": "0",  # else it pins itself to cores that others use
    "TORCHDYNAMO_DISABLE": "1",  # else the first request with a penalty compiles for a minute
    "CUDA_VISIBLE_DEVICES": "",
}


def find_python(wanted: str) -> str:
    """The interpreter that has SGLang: the given one, this one, or that of `.venv-sglang` beside this environment."""
    if wanted:
        if not os.access(wanted, os.X_OK):
            raise ConfigurationError(f"sglang_python = {wanted!r}: no such program")
        return wanted
    if importlib.util.find_spec("sglang") is not None:
        return sys.executable
    beside = Path(sys.prefix).parent / ".venv-sglang" / "bin" / "python"
    if os.access(beside, os.X_OK):
        return str(beside)
    raise ConfigurationError(
        f"no SGLang found: neither {sys.executable} nor {beside} has it. Run `make setup`, "
        "pip install 'lachesis-rl[inference]' into an environment of its own, or give --sglang-python PATH"
    )


def find_device(wanted: str) -> str:
    """`cpu` or `cuda`."""
    if wanted != "auto":
        return wanted
    return "cuda" if _cuda_devices() else "cpu"


def _cuda_devices() -> int:
    """How many devices the CUDA driver shows this process, asked without importing torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def watchdog_s(settings: AgentSettings) -> float:
    """Seconds without progress, a pause in place included, after which SGLang ends itself."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--watchdog-timeout", type=float, default=WATCHDOG_S)
    found: float = parser.parse_known_args(shlex.split(settings.sglang_args))[0].watchdog_timeout
    return found


def command_line(settings: AgentSettings, python: str, device: str, port: int) -> list[str]:
    """The launcher with every option that does not depend on the model."""
    options = [
        "--host", settings.host,
        "--port", str(port),
        "--served-model-name", settings.pool,
        "--log-level", "warning",
        "--watchdog-timeout", f"{WATCHDOG_S:g}",
    ]  # fmt: skip
    if device == "cpu":
        options += _ON_CPU
    # -P: the launcher's folder holds modules of ours, which must not shadow what SGLang imports
    return [python, "-P", str(LAUNCHER), *options]


def model_options(settings: AgentSettings, device: str, model: ModelFolder, version: int) -> list[str]:
    """The options that name the model, in the order in which a later one wins; the user's own come last.

    Raises ConfigurationError if the context asked for is longer than the model's.
    """
    context = settings.context_length or model.context_length
    if 0 < model.context_length < context:
        raise ConfigurationError(
            f"context_length = {context}: the model in {model.folder} takes at most {model.context_length} tokens"
        )
    requests = settings.max_running_requests or (CPU_REQUESTS if device == "cpu" else 0)
    dtype: str = settings.dtype
    if dtype == "auto" and device == "cpu" and model.dtype:
        dtype = model.dtype  # SGLang's own `auto` turns float32 into float16
    options = ["--model-path", str(model.folder), "--weight-version", str(version), "--dtype", dtype]
    if settings.context_length:
        options += ["--context-length", str(context)]
    if requests:
        options += ["--max-running-requests", str(requests)]
    if device == "cpu":
        cache = max(context, min(requests * context, CPU_CACHE_TOKENS)) or CPU_CACHE_TOKENS
        options += ["--max-total-tokens", str(cache)]
    return [*options, *shlex.split(settings.sglang_args)]


def environment(device: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """SGLang's environment. The model is always a local folder by then, so nothing may ask the hub; and it needs no Redis."""
    chosen = {
        # else it waits for seconds, with CUDA for a minute, before it admits that it has crashed
        "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0",
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
        **{name: value for name, value in inherited.items() if not name.startswith("LACHESIS_REDIS_URL")},
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    if device == "cpu":
        chosen |= _CPU_ENVIRONMENT
        chosen.setdefault("OMP_NUM_THREADS", "1")
    return chosen
