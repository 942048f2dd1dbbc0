"""The built-in Atropos environment. `python -m lachesis.envs.arithmetic serve` runs it without Lachesis's settings."""

from lachesis.envs.arithmetic import tasks
from lachesis.envs.single_turn import SingleTurnEnv


class Env(SingleTurnEnv):
    """Short arithmetic: right answers score 1, others 0."""

    name = "arithmetic"
    recipe = tasks.RECIPE
    make_task = staticmethod(tasks.make_task)
