"""Atropos's Trajectory API over HTTP, translated into the broker's streams."""
