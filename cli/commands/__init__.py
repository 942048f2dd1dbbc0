"""A file a command: its settings, and `main(arguments)`.

Read audit.py, a short one, first.
"""
