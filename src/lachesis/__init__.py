"""Lachesis: a durable, message-queue-decoupled fabric for reinforcement-learning post-training.

The rooms of the house are folders at the top of the repository; the links beside this file make them the
sub-packages `lachesis.broker`, `lachesis.shim`, … .
"""

__version__ = "0.2.0"
