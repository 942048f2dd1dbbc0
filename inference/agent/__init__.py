"""The agent beside one SGLang server: starts it, keeps its weights new, starts it again.

Read agent.py first, then update.py.
"""
