"""The life of a group up to a committed step: PUT, FORM, LEASE, COMMIT. A file a verb, its Lua beside it.

Read queue.py first; what may come in is in admission.py, which groups make a batch in selection.py.
"""
