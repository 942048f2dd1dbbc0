"""The environments Lachesis brings along. Adding one is a package with tasks.py and env.py, and a line here."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lachesis.broker.errors import ConfigurationError, did_you_mean
from lachesis.envs.task import Recipe, Task

MODULES = {"arithmetic": "lachesis.envs.arithmetic", "gsm8k": "lachesis.envs.gsm8k"}


@dataclass(frozen=True)
class Entry:
    """One environment; its heavy parts are imported when asked for."""

    name: str

    def recipe(self) -> Recipe:
        recipe: Recipe = import_module(f"{MODULES[self.name]}.tasks").RECIPE
        return recipe

    def task(self, data: str | None = None) -> Task:
        """The problems; `data` names a file of them, for tasks that take one."""
        task: Task = import_module(f"{MODULES[self.name]}.tasks").make_task(data)
        return task

    def env_class(self) -> Any:
        """The Atropos environment, a class made from single_turn.SingleTurnEnv. Imports atroposlib."""
        return import_module(f"{MODULES[self.name]}.env").Env


def names() -> list[str]:
    return sorted(MODULES)


def entry(name: str) -> Entry:
    """Raises ConfigurationError for a name that is not known."""
    if name not in MODULES:
        raise ConfigurationError(
            f"environment {name!r}: known ones are {', '.join(names())}{did_you_mean(name, MODULES)}"
        )
    return Entry(name)
