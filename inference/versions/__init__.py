"""Which version a server should load next, fetched and verified before it is.

Read watcher.py first, then verify.py.
"""
