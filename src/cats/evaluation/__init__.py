"""Evaluation of a model: zero-shot tasks, CATS beside other methods, statistics of activations."""

from cats.evaluation.answers import Answers, Question, Score, paired_difference
from cats.evaluation.inputs import InputCounts
from cats.evaluation.tasks import PAPER8, evaluate_task, task_names
from cats.evaluation.variants import Dense, InCodes, InputThresholds, Sparse, Variant

__all__ = [
    "PAPER8",
    "Answers",
    "Dense",
    "InCodes",
    "InputCounts",
    "InputThresholds",
    "Question",
    "Score",
    "Sparse",
    "Variant",
    "evaluate_task",
    "paired_difference",
    "task_names",
]
