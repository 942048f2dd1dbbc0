"""A posted group's way into the queue: decode, admit, annotate with versions, wait for room, put.

Read intake.py first, which calls each of them; scored_data.py has the routes.
"""
