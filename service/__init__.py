"""What the process of every role shares: settings, logs, ports, and of HTTP who may call and how much a peer may send.

Read settings.py first.
"""
