"""Atropos's Trajectory API over HTTP, translated into the broker's streams. Stateless: any number may serve a run.

Read app.py first, the table of routes; then intake/scored_data.py and batch/endpoint.py.
"""
