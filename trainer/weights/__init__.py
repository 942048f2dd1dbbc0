"""Weights on disk and at URLs: published versions and checkpoints. One that can be found is complete.

Read versions.py and checkpoint.py; publisher.py writes beside training.
"""
