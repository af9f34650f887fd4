"""Measurements of minisd: beside diffusers, with presets, in training; `command.py` is the command for them."""
