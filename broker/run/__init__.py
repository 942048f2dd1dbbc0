"""Who takes part in a run, and what is known of it: registrations, environments, tokens, the writer lock, lineage, the logs that people read.

Read registry.py first.
"""
