"""Evaluation of models of scenes: do the pictures show what their prompts describe? `measure.py` does it."""
