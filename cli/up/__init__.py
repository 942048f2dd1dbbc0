"""`lachesis up`: what it starts, in which order, and what it shows.

Read plan.py first, then run.py.
"""
