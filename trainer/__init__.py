"""verl as a consumer of batches: groups to tensors, the training loop, checkpoints, publishing.

Read loop.py first, the training loop, then build.py, which wires it; elastic/ is what one of several replicas does instead.
"""
