"""The trainer's Hydra configuration: trainer.yaml extends verl's ppo_trainer."""
