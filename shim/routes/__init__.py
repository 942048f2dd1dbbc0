"""The other routes: registrations, status, and the description of them all.

Read registration.py first.
"""
