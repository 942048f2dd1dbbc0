"""What `lachesis up` starts: decided from the settings before anything runs, then one command line per part."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lachesis.broker.errors import ConfigurationError, did_you_mean
from lachesis.broker.records.keys import check_name
from lachesis.broker.weights.model_files import TOKENIZER_FILES
from lachesis.cli.up.settings import TINY, UpSettings
from lachesis.cli.up.supervisor import Part
from lachesis.envs.registry import entry
from lachesis.envs.registry import names as env_names
from lachesis.trainer.settings import quoted

if TYPE_CHECKING:
    from lachesis.envs.task import Recipe

Listener: TypeAlias = socket.socket
PYTHON = (sys.executable, "-P")  # what lies in the current folder is no module
# what this process was told of a Redis itself, taken from its children
NO_REDIS = {"LACHESIS_REDIS_URL": "", "LACHESIS_REDIS_URL_FILE": "", "LACHESIS_EMBEDDED": "false"}


@dataclass(frozen=True)
class Plan:
    """What will be trained, on what, for how long."""

    env: str
    recipe: Recipe
    model: str  # a folder, or a name that the Hugging Face hub knows
    model_name: str
    tiny: bool
    steps: int
    gpus: Sequence[int]

    @property
    def device(self) -> str:
        return f"{len(self.gpus)} GPU{'s' if len(self.gpus) > 1 else ''}" if self.gpus else "CPU"


def plan(settings: UpSettings) -> Plan:
    """Decide; raises ConfigurationError for what can't work."""
    check_name("run", settings.run)
    tiny = settings.model == TINY
    name = settings.env or ("arithmetic" if tiny else "gsm8k")
    if name not in env_names():
        raise ConfigurationError(
            f"--env = {name!r}: known environments are {', '.join(env_names())}{did_you_mean(name, env_names())}"
        )
    recipe = entry(name).recipe()
    model = settings.model
    if tiny:
        model = str(settings.state_dir / "models" / f"tiny-{settings.seed}")
    elif (folder := Path(settings.model)).is_dir():
        model = str(check_model_folder(folder.absolute()))
    elif settings.model.startswith((".", "/", "~")) or settings.model.count("/") > 1:
        raise ConfigurationError(f"--model = {settings.model!r}: no such folder")
    return Plan(
        env=name,
        recipe=recipe,
        model=model,
        model_name=settings.model,
        tiny=tiny,
        steps=settings.steps or recipe.steps,
        gpus=_gpus(settings.gpus),
    )


def check_model_folder(folder: Path) -> Path:
    """The folder, if it holds a model and its tokenizer."""
    if not (folder / "config.json").is_file():
        raise ConfigurationError(
            f"--model = {str(folder)!r}: holds no config.json, so it is not a Hugging Face model folder"
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigurationError(
            f"--model = {str(folder)!r}: holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}); "
            "save it there with AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)"
        )
    return folder


def _gpus(wanted: int) -> Sequence[int]:
    if wanted == 0:
        return ()
    found = 0
    if shutil.which("nvidia-smi"):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        found = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    if wanted > found:
        raise ConfigurationError(f"--gpus = {wanted}: this machine has {found}; --gpus 0 trains on the CPU")
    return range(found if wanted < 0 else wanted)


def trainer_overrides(settings: UpSettings, plan: Plan) -> list[str]:
    """What the trainer is told in Hydra's words; the user's own come last, and win."""
    ours = {
        "lachesis.num_steps": plan.steps,
        "lachesis.batch_size": plan.recipe.batch_size,
        "lachesis.max_token_len": plan.recipe.max_token_len,
        "lachesis.seed": settings.seed,
        **plan.recipe.trainer,
    }
    words = [f"actor_rollout_ref.model.path={quoted(plan.model)}", *(f"{key}={value}" for key, value in ours.items())]
    return [*words, *settings.overrides]


class Processes:
    """Command lines. The trainer has the first GPU and the SGLang servers share the others; one GPU is shared by all."""

    def __init__(
        self, settings: UpSettings, plan: Plan, redis_url: str, home: Path, shim: Listener, door: Listener
    ) -> None:
        self._settings, self._plan, self._home, self._shim, self._door = settings, plan, home, shim, door
        self._run = ("--run", settings.run, "--state-dir", str(settings.state_dir))
        self._redis = {**NO_REDIS, "LACHESIS_REDIS_URL": redis_url}  # `ps` shows arguments

    def _part(
        self,
        name: str,
        *arguments: str,
        role: str = "",
        gpus: Sequence[int] = (),
        inherit: Sequence[int] = (),
        redis: bool = True,
    ) -> Part:
        told = self._redis if redis else NO_REDIS
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), **told}
        return Part(
            name=name,
            argv=(*PYTHON, "-m", "lachesis.cli.main", role or name, *arguments),
            log=self._home / "logs" / f"{name}.log",
            env={"OMP_NUM_THREADS": "1", **visible} if not self._plan.gpus else visible,
            inherit=inherit,
        )

    def base_model(self) -> Part:
        arguments = ("--out", self._plan.model, "--seed", str(self._settings.seed))
        return self._part("base-model", *arguments, redis=False)

    def shim(self) -> Part:
        return self._part("shim", *self._run, "--fd", str(self._shim.fileno()), inherit=[self._shim.fileno()])

    def front_door(self) -> Part:
        return self._part("front-door", *self._run, "--fd", str(self._door.fileno()), inherit=[self._door.fileno()])

    def inference(self, index: int) -> Part:
        name = f"inference-{index}"
        arguments = [*self._run, "--server", name, "--port", "0", "--model", self._plan.model]
        arguments += ["--context-length", str(self._plan.recipe.context_length)]
        if self._settings.sglang_python:
            arguments += ["--sglang-python", self._settings.sglang_python]
        gpus = self._plan.gpus
        others = gpus[1:] or gpus
        return self._part(name, *arguments, role="inference", gpus=[others[index % len(others)]] if others else ())

    def trainer(self) -> Part:
        words = trainer_overrides(self._settings, self._plan)
        return self._part("trainer", *self._run, *words, gpus=self._plan.gpus[:1])

    def track(self) -> Part:
        """Tells the trackers of the last evaluation, which comes after the trainer's end."""
        part = self._part("track")
        return replace(part, argv=(*PYTHON, "-m", "lachesis.trainer.metrics.late_evaluation", self._settings.run))

    def env(self) -> Part:
        shim, door = self._shim.getsockname()[1], self._door.getsockname()[1]
        arguments = [
            self._plan.env,
            "--shim-url", f"http://127.0.0.1:{shim}",
            "--front-door-url", f"http://127.0.0.1:{door}",
            "--model", self._plan.model,
            "--seed", str(self._settings.seed),
        ]  # fmt: skip
        if self._settings.data:
            arguments += ["--data", self._settings.data]
        return self._part("env", *arguments, redis=False)
