"""Benchmarks: minisd against diffusers, presets, training, throughput; `command.py` is their command."""
