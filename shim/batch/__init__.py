"""`GET /batch`: batches lent to trainers that speak HTTP, and stored groups as the JSON they were posted as.

Read endpoint.py first.
"""
