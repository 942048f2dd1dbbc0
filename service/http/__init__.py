"""What the shim and the front door share of HTTP: which connections they keep, and who may call.

Read connections.py and access.py.
"""
