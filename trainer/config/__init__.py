"""The trainer's Hydra configuration: trainer.yaml extends verl's ppo_trainer. How it is composed, checked and resolved.

Read trainer.yaml first, then compose.py and plan.py.
"""
