"""Weights on disk and at URLs: published versions and checkpoints, complete or absent.

Read versions.py and checkpoint.py; publisher.py writes beside training.
"""
