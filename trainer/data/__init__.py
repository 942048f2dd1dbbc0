"""Groups, as environments post them, to the tensors of one step. Pure: no verl, no Redis, no randomness.

Read collate.py first.
"""
