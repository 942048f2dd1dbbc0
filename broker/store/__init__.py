"""Talking to Redis: connections with redis-py's traps closed, Lua scripts, what its errors mean, a server of one's own.

Knows nothing of rollouts. Read connection.py first, then scripts.py.
"""
