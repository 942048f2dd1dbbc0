"""One policy-gradient step, from verl's parts: log-probs, off-policy correction, advantages, loss.

Read learner.py first.
"""
