"""The front door: one address of a pool of SGLang servers.

Read app.py first, then routes.py and proxy.py.
"""
