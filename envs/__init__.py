"""Environments: arithmetic, which needs no download, and gsm8k.

Read task.py first, then single_turn.py.
"""
