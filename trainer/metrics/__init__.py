"""What is told of a step: its metrics, to Redis and to trackers, and a few of its rollouts in words.

Read step.py first, then reporter.py.
"""
