"""What becomes of groups that have left the queue: trained batches until every reader covers them, dead letters, refused posts.

Read trained_batches.py first.
"""
