"""Measurements: minisd beside diffusers, presets, training, throughput. `command.py` is the command, torch comes later."""
