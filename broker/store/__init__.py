"""Talking to Redis: connections that outlive a restart of it, Lua scripts, what its errors mean, and a server of one's own.

Knows nothing of rollouts. Read connection.py first, then scripts.py.
"""
