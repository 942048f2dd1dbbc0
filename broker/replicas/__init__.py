"""Who trains a policy together: joining, the groups each claims of the open step, and the vote that commits it.

Read members.py; every transition is one script beside it, fenced by generation and epoch.
"""
