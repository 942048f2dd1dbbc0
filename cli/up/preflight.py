"""What `lachesis up` checks before anything is started: everything that is known to fail later, and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lachesis.broker.errors import ConfigurationError
from lachesis.envs.registry import entry

if TYPE_CHECKING:
    from lachesis.cli.up.plan import Plan
    from lachesis.cli.up.settings import UpSettings


def check(settings: UpSettings, plan: Plan, overrides: Sequence[str]) -> Sequence[str]:
    """Raise ConfigurationError for problems, a model, an environment or overrides that can't work. Imports no torch.

    Returns verl's trackers that the overrides name.
    """
    from lachesis.inference.agent.sglang_args import find_python
    from lachesis.trainer.config.compose import compose_config
    from lachesis.trainer.config.model import max_positions
    from lachesis.trainer.config.plan import check_config, longest_sequence, make_plan
    from lachesis.trainer.config.tracking_backends import check_backends

    find_python(settings.sglang_python)
    folder = Path(plan.model)
    if settings.data:  # else it may have to be fetched, which comes last
        entry(plan.env).task(settings.data)
    config = compose_config(overrides, device="cuda" if plan.gpus else "cpu")
    check_config(config)
    if plan.tiny:
        from lachesis.envs.arithmetic.base_model import POSITIONS

        _check_length(plan, POSITIONS)
        longest_sequence(config, POSITIONS)
    elif folder.is_dir():
        _check_length(plan, max_positions(folder))
        make_plan(config, settings)
    task = entry(plan.env).task(settings.data or None)
    if task.chat and folder.is_dir() and not _has_chat_template(folder):
        raise ConfigurationError(
            f"--model = {plan.model_name!r}: its tokenizer has no chat template, which {plan.env}'s prompts need"
        )
    return check_backends(config.lachesis.tracking)


def _check_length(plan: Plan, positions: int) -> None:
    if plan.recipe.context_length > positions:
        raise ConfigurationError(
            f"--model = {plan.model_name!r}: takes at most {positions} tokens, and {plan.env} needs "
            f"{plan.recipe.context_length}; give another --model, or another --env"
        )


def _has_chat_template(folder: Path) -> bool:
    if any(folder.glob("chat_template*")) or (folder / "additional_chat_templates").is_dir():
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False
