"""Ways to start a trainer's ranks other than torchrun: Ray, in ray.py."""
