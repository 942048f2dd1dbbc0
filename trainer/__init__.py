"""verl as a consumer of batches: groups to tensors, the training loop, checkpoints, publishing.

Read loop.py first, the training loop; then solo.py and elastic/replica.py, its two trainers, and build.py, which wires them.
"""
