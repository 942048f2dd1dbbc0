"""Trained batches in files, and out of them into a run again.

Read segments.py (the format) first, then archiver.py and replay.py.
"""
