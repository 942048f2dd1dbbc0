"""Sums of tensors over the replicas of one epoch, by gloo or NCCL, over connections that are made anew for each.

Read base.py first.
"""
