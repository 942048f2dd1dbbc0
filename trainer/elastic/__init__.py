"""Several replicas that train one policy: one optimizer trajectory, however many there are and who dies.

Read replica.py first, then membership.py and broker/replicas.
"""
