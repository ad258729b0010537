import pytest
import torch

from cats.recipes import Progress
from tests import models


class Recorder(Progress):
    """Records the calls of a recipe."""

    def __init__(self):
        self.lines = []
        self.tracked = []

    def say(self, text):
        self.lines.append(text)

    def track(self, items, text):
        self.tracked.append((text, len(items)))
        yield from items


@pytest.fixture
def progress():
    return Recorder()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.make_model()


@pytest.fixture
def tokenizer():
    return models.make_tokenizer()


@pytest.fixture
def text():
    return "It is a truth universally acknowledged. " * 60
