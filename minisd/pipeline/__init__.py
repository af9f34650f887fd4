"""The public `StableDiffusion` class and its supporting modules."""
