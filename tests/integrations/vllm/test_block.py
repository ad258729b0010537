import pytest

import cats
from cats.errors import ConfigError, FormatError
from cats.integrations.vllm.block import FORMS, Sparsity
from cats.methods import METHODS
from tests import models


def block(**changes):
    model = models.make_model()
    cats.sparsify_(model, cats.calibrate(model, [models.make_ids()], target_sparsity=0.5))
    return model.config.cats | changes


def test_block_of_a_sparse_model_is_read():
    sparsity = Sparsity.of(block(), "model")
    assert sparsity.label == "cats-50"
    assert sparsity.form == FORMS["cats"]
    assert sparsity.mlps == {"model.layers.0.mlp", "model.layers.1.mlp"}


@pytest.mark.parametrize("name", FORMS)
def test_known_methods_are_what_the_library_calls_so(name):
    form, method = FORMS[name], METHODS[name]
    assert form.router == method.router
    assert set(form.tensors) == method.tensors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "later"}, ConfigError, "sparse by the method 'later', and this release runs"),
        ({"router": "up"}, ConfigError, "compares 'up', the method 'cats' compares 'gate'"),
        ({"version": 2}, FormatError, "format version 2"),
    ],
)
def test_block_that_means_something_else_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        Sparsity.of(block(**changes), "model")


def test_block_without_a_field_is_refused():
    whole = block()
    del whole["router"]
    with pytest.raises(FormatError, match="lacks 'router'"):
        Sparsity.of(whole, "model")
