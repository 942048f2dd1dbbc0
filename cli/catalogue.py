"""The commands there are, and where the settings of each are."""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    summary: str
    module: str  # has `main(arguments) -> exit code`; imported only when the command is used
    extra: str = ""  # of this package, without which the command can't run


COMMANDS = {
    "up": Command("train here: start and supervise every part, show the progress", "lachesis.cli.up.command", "all"),
    "status": Command(
        "what a run is doing now, who of it is alive, and whether it is healthy", "lachesis.cli.commands.status"
    ),
    "tail": Command(
        "the newest steps and evaluations of a run, its rollouts in words, or who came and went",
        "lachesis.cli.commands.tail",
    ),
    "audit": Command(
        "is every accepted group in exactly one committed step, or still queued?", "lachesis.cli.commands.audit"
    ),
    "trainers": Command(
        "who trains each policy: replicas, what each holds, how fast it is", "lachesis.cli.commands.trainers"
    ),
    "shadow": Command("policies that train on the same batches, side by side", "lachesis.cli.commands.shadow"),
    "token": Command("make, list and revoke the tokens that a run's callers need", "lachesis.cli.commands.token"),
    "redis-users": Command(
        "make Redis's users, one for each role, with passwords", "lachesis.cli.commands.redis_users"
    ),
    "dead": Command("what could not be trained: list, show, requeue, purge", "lachesis.cli.commands.dead", "shim"),
    "pool": Command(
        "which version a pool serves: newest, pin, canary, promote, rollback", "lachesis.cli.commands.pool"
    ),
    "retention": Command(
        "how many bytes of trained batches a run keeps, and who holds them", "lachesis.cli.commands.retention"
    ),
    "archive": Command(
        "write a run's trained batches to an archive before they are freed", "lachesis.cli.commands.archive"
    ),
    "replay": Command("put the groups of an archive, or of another run, into a run", "lachesis.cli.commands.replay"),
    "evaluate": Command("held-out accuracy of what the servers serve now", "lachesis.cli.commands.evaluate", "envs"),
    "shim": Command("the Atropos Trajectory API over Redis Streams", "lachesis.cli.roles:shim", "shim"),
    "trainer": Command(
        "a verl trainer that consumes batches and publishes weight versions", "lachesis.cli.roles:trainer", "trainer"
    ),
    "inference": Command(
        "an SGLang server and the agent that keeps its weights new", "lachesis.cli.roles:inference", "inference"
    ),
    "front-door": Command("the one address of a pool of SGLang servers", "lachesis.cli.roles:front_door", "gateway"),
    "env": Command("an environment: makes rollouts and posts them to the shim", "lachesis.cli.roles:env", "envs"),
    "base-model": Command(
        "make the tiny model that the built-in environment starts from", "lachesis.cli.commands.base_model", "trainer"
    ),
}

# The modules that each extra brings and ours import; one that is missing and not named here is no matter of extras.
MODULES = {
    "shim": "httptools isal simdjson starlette uvicorn uvloop",
    "gateway": "aiohttp httptools starlette uvicorn uvloop",
    "trainer": "huggingface_hub hydra omegaconf ray safetensors tensordict tokenizers torch transformers verl",
    "inference": "aiohttp",
    "envs": "atroposlib datasets math_verify tokenizers torch transformers",
}
MODULES["all"] = " ".join(MODULES.values())

SETTINGS = (
    "lachesis.shim.settings",
    "lachesis.trainer.settings",
    "lachesis.inference.settings",
    "lachesis.envs.settings",
)
