"""What others see of a step: metrics, trackers, a few rollouts in words.

Read step.py first, then reporter.py.
"""
