"""The command `lachesis`.

Read main.py first; what `lachesis up` does is in up/, the other commands are in commands/.
"""
