import pytest
import torch

from cats.errors import FormatError, ModelMismatchError
from cats.integrations.vllm.activation import SparseActAndMul
from cats.integrations.vllm.block import FORMS, Form, Sparsity
from cats.integrations.vllm.loading import ThresholdLoading

LAYERS = ["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp"]
TWO = Form(tensors=("threshold", "product_threshold"))


def make(layers=LAYERS, *, form=FORMS["cats"], mlps=LAYERS, absent=()):
    acts = {
        f"{name}.act_fn": SparseActAndMul(form, "silu", size=4, rank=0, ranks=1) for name in layers
    }
    sparsity = Sparsity(label="cats-50", form=form, mlps=frozenset(mlps))
    return ThresholdLoading(sparsity, acts, absent_layers=absent, source="model"), acts


def load(loading, acts, weights):
    """As vLLM's loader: a weight goes to the parameter of its name."""
    taken = []
    for name, tensor in loading.renamed(weights):
        parent, _, tail = name.rpartition(".")
        if parent in acts:
            parameter = getattr(acts[parent], tail)
            parameter.weight_loader(parameter, tensor)
        taken.append(name)
    return taken


def stored(layers=LAYERS, child="act_fn", names=("threshold",)):
    return [(f"{m}.{child}.{n}", torch.rand(4)) for m in layers for n in names]


def test_thresholds_reach_the_activation_of_another_name():
    loading, acts = make()
    weights = [("model.embed.weight", torch.ones(1)), *stored(child="activation_fn")]
    names = load(loading, acts, weights)
    assert names == ["model.embed.weight", *(f"{name}.act_fn.threshold" for name in LAYERS)]
    loading.check()
    assert loading.dense_mlps() == []
    for act, (_, tensor) in zip(acts.values(), weights[1:], strict=True):
        assert torch.equal(act.threshold, tensor)


def test_mlps_that_the_checkpoint_leaves_dense_are_named():
    loading, acts = make(mlps=LAYERS[1:])
    load(loading, acts, stored(LAYERS[1:]))
    loading.check()
    assert loading.dense_mlps() == ["model.layers.0.mlp.act_fn"]


def test_layers_of_another_process_are_not_expected():
    loading, acts = make(LAYERS[:2], absent=["model.layers.2"])
    load(loading, acts, stored())
    loading.check()


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (stored(LAYERS[:2]), FormatError, "1 MLPs are missing, such as model.layers.2.mlp"),
        ([*stored(), *stored(["model.layers.7.mlp"])], ModelMismatchError, "3 MLPs of 4, not .*7"),
        ([*stored(), *stored(["vision.mlp"])], ModelMismatchError, "3 MLPs of 4"),
    ],
)
def test_threshold_that_is_lost_is_an_error(weights, error, message):
    loading, acts = make()
    load(loading, acts, weights)
    with pytest.raises(error, match=message):
        loading.check()


def test_checkpoint_without_thresholds_is_refused():
    loading, acts = make(mlps=[])
    load(loading, acts, [])
    with pytest.raises(FormatError, match="no thresholds are stored"):
        loading.check()


def test_every_tensor_of_the_method_is_needed():
    loading, acts = make(form=TWO)
    weights = stored(names=TWO.tensors)
    load(loading, acts, weights)
    loading.check()
    loading, acts = make(form=TWO)
    load(loading, acts, weights[:-1])
    with pytest.raises(FormatError, match=r"model\.layers\.2\.mlp\.act_fn\.product_threshold"):
        loading.check()
