"""The work of the commands, callable from Python: long runs made of the library's parts.

A recipe takes a loaded model and texts as strings, tells a :class:`Progress` what it is doing, and
returns a dataclass. It writes files only into a folder or file that is an argument.
"""

from typing import TYPE_CHECKING

from cats.lazy import exports

if TYPE_CHECKING:
    from cats.recipes.calibration import Calibration, calibrate
    from cats.recipes.counting import count
    from cats.recipes.demo_results import Demonstration
    from cats.recipes.demonstration import demonstrate
    from cats.recipes.description import Architecture, architecture
    from cats.recipes.evaluation import (
        Perplexities,
        ask_tasks,
        compare_perplexities,
        measure_perplexities,
    )
    from cats.recipes.generation import Answer, answer
    from cats.recipes.max_loss import LargestSparsity, largest_sparsity
    from cats.recipes.progress import Progress
    from cats.recipes.quantisation import Quantisation, quantise
    from cats.recipes.recipe import Recipe
    from cats.recipes.reproduction import reproduce
    from cats.recipes.text import split
    from cats.recipes.training import Prepared, prepare_
    from cats.recipes.training_data import TrainingData

__all__ = [
    "Answer",
    "Architecture",
    "Calibration",
    "Demonstration",
    "LargestSparsity",
    "Perplexities",
    "Prepared",
    "Progress",
    "Quantisation",
    "Recipe",
    "TrainingData",
    "answer",
    "architecture",
    "ask_tasks",
    "calibrate",
    "compare_perplexities",
    "count",
    "demonstrate",
    "largest_sparsity",
    "measure_perplexities",
    "prepare_",
    "quantise",
    "reproduce",
    "split",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "Answer": "cats.recipes.generation",
        "Architecture": "cats.recipes.description",
        "Calibration": "cats.recipes.calibration",
        "Demonstration": "cats.recipes.demo_results",
        "LargestSparsity": "cats.recipes.max_loss",
        "Perplexities": "cats.recipes.evaluation",
        "Prepared": "cats.recipes.training",
        "Progress": "cats.recipes.progress",
        "Quantisation": "cats.recipes.quantisation",
        "Recipe": "cats.recipes.recipe",
        "TrainingData": "cats.recipes.training_data",
        "answer": "cats.recipes.generation",
        "architecture": "cats.recipes.description",
        "ask_tasks": "cats.recipes.evaluation",
        "calibrate": "cats.recipes.calibration",
        "compare_perplexities": "cats.recipes.evaluation",
        "count": "cats.recipes.counting",
        "demonstrate": "cats.recipes.demonstration",
        "largest_sparsity": "cats.recipes.max_loss",
        "measure_perplexities": "cats.recipes.evaluation",
        "prepare_": "cats.recipes.training",
        "quantise": "cats.recipes.quantisation",
        "reproduce": "cats.recipes.reproduction",
        "split": "cats.recipes.text",
    },
)
