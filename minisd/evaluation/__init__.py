"""How good is a model of scenes: does a drawn picture show what its prompt asked for?"""

from minisd.evaluation.measure import evaluate, evaluate_model

__all__ = ["evaluate", "evaluate_model"]
