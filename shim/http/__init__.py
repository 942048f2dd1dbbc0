"""The shim's HTTP, without what a route means: bodies, responses that may be cut off, runs by their URL, whose environment is whose.

Read body.py first.
"""
