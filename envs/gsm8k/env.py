"""GSM8K as an Atropos environment. `python -m lachesis.envs.gsm8k serve` runs it without Lachesis's settings."""

from lachesis.envs.gsm8k import tasks
from lachesis.envs.single_turn import SingleTurnEnv


class Env(SingleTurnEnv):
    """Word problems: an answer that math-verify finds equal scores 1, others 0."""

    name = "gsm8k"
    recipe = tasks.RECIPE
    make_task = staticmethod(tasks.make_task)
