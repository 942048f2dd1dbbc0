"""verl as a consumer of batches: groups to tensors, the training loop, checkpoints, publishing.

Read run.py first, the training loop, then build.py, which wires it; elastic/ is the loop of one of several replicas.
"""
