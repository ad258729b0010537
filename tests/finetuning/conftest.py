import dataclasses

import pytest
import torch

import cats
from cats.finetuning import Blocks, FinetuneOptions
from tests import models

# Small enough that a run takes a second.
OPTIONS = FinetuneOptions(
    steps=8, batch_size=4, learning_rate=1e-2, rank=4, evaluate_every=2, save_every=4
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tokenizer():
    return models.make_tokenizer()


@pytest.fixture
def ids():
    """Token ids that can be learnt: short numbers over and over."""
    return models.make_ids(rows=24, length=32) % 7


@pytest.fixture
def base(tmp_path):
    """Folder of a dense model, the same in every test."""
    torch.manual_seed(1)
    models.make_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def make(base, ids):
    """Load the model: sparse at 50 %, by another method, or dense."""

    def load(method="cats"):
        model = cats.checkpoint.load_dense(base)
        if method != "dense":
            target = 0.5 if method == "cats" else None
            cats.sparsify_(
                model, cats.calibrate(model, [ids], target_sparsity=target, method=method)
            )
        return model

    return load


@pytest.fixture
def tune(make, ids, tokenizer, tmp_path):
    """Fine-tune into ``tmp_path / name``; keywords change the options."""

    def run(name="run", model=None, method="cats", train=None, options=None, **kwargs):
        from cats.finetuning import finetune

        defaults = {"evaluations": {"held out": Blocks(ids[16:])}, "tokenizer": tokenizer}
        return finetune(
            model or make(method),
            Blocks(ids[:16]) if train is None else train,
            output=tmp_path / name,
            options=dataclasses.replace(OPTIONS, **(options or {})),
            **defaults | kwargs,
        )

    return run
