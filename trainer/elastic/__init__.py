"""Several replicas that train one policy: one optimizer trajectory, however many there are and who dies.

Read loop.py, its loop, first; then membership.py and broker/replicas.
"""
