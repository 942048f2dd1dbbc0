"""A posted group's way into the queue: decode, admit, annotate with versions, wait for room, put.

Read scored_data.py first, which calls each of them.
"""
