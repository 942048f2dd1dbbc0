"""Atropos's Trajectory API over HTTP, translated into the broker's streams. Stateless: any number may serve a run.

Read routes/table.py first, then intake/intake.py and batch/endpoint.py; app.py joins all.
"""
