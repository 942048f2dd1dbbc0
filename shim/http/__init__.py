"""The shim's HTTP, whatever a route is for: bodies, responses that may be cut off, which run a URL means, who may call.

Read body.py first.
"""
