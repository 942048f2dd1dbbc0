"""Environments: arithmetic, which needs no download, and gsm8k."""
