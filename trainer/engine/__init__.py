"""verl's engine in this process, alone or as one of several ranks: the model, its optimizer, its weights as tensors.

Read verl_engine.py first.
"""
