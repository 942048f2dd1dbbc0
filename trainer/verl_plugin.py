"""A CPU platform and engine for verl, through its public registries.

verl ships accelerators only. Loaded as an entry point of the group `verl.plugins` (or by VERL_USE_EXTERNAL_MODULES in
processes that verl starts itself), this module makes `VERL_PLATFORM=cpu` a platform like any other. It is never chosen
by detection, so it can't take a job away from an accelerator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry


def _device_module() -> ModuleType:
    """torch.cpu, plus what verl calls on torch.<device> for statistics and seeds."""
    module = ModuleType("torch.cpu (for verl)")
    for name in dir(torch.cpu):
        if not name.startswith("__"):
            setattr(module, name, getattr(torch.cpu, name))
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(module, name, lambda *_, **__: 0)
    for name in ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "set_device"):
        setattr(module, name, lambda *_, **__: None)
    extra: dict[str, Any] = {
        "mem_get_info": lambda *_: (0, 0),
        "get_device_name": lambda *_: "CPU",
        "device_count": lambda: 1,
        "is_available": lambda: True,
        "manual_seed": torch.manual_seed,
        "manual_seed_all": torch.manual_seed,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    }
    for name, value in extra.items():
        setattr(module, name, value)
    return module


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    device_name = "cpu"
    vendor_name = "cpu"
    device_module = cached_property(lambda self: _device_module())

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False  # only by name

    def current_device(self) -> str:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        """There is one."""

    def synchronize(self, device_index: int | None = None) -> None:
        """Nothing runs asynchronously."""

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """The allocator is the C library's."""

    def empty_cache(self) -> None:
        """There is no cache."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "LACHESIS_CPU_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        """No device profiler."""

    def profiler_stop(self) -> None:
        """No device profiler."""

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        return {}

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


def register_cpu_engine() -> None:
    """Let verl's FSDP engine run on this platform; harmless to repeat. Imports verl's engines, which takes seconds."""
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    if "cpu" in EngineRegistry._engines["language_model"]["fsdp2"]:
        return

    @EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")
    class CPUFSDPEngineWithLMHead(FSDPEngineWithLMHead):
        """verl's own, on gloo."""

        def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
            # verl offloads what only runs forward to pinned memory, which is an accelerator's; here it is in memory anyway
            forward_only = self.engine_config.forward_only
            self.engine_config.forward_only = False
            try:
                built: torch.nn.Module = super()._build_fsdp_module(module)
            finally:
                self.engine_config.forward_only = forward_only
            return built
