"""Evaluation of models of scenes: do the pictures show what their prompts describe?"""

from minisd.evaluation.measure import evaluate, evaluate_model

__all__ = ["evaluate", "evaluate_model"]
