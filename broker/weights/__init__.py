"""A version's way from a trainer to the servers: the stream of versions, their manifests and differences, what each pool is to serve.

Read versions.py first, then pools.py.
"""
