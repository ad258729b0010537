"""The CUDA backend of ``cats::packed_gated_mlp``, and models that use it, on a GPU."""

import gc

import pytest
import torch
from transformers import LlamaConfig, Phi3Config

import cats
from cats.fusion import fused_mlps
from cats.ops.packed_mlp import packed_gated_mlp
from cats.ops.packed_mlp.backends import BACKENDS
from cats.ops.quantised import ZeroMode
from cats.weights import QuantisedLinear, nbytes
from tests import models
from tests.ops.packed_cases import Kind, make_mlp
from tests.quantised import quantise_

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("backend", ["cuda", "triton", "dense"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Kind(bits=4, group_size=128, scale_dtype=BF16), BF16),
        (Kind(bits=8, scale_dtype=F32), BF16),
        (Kind(bits=4, group_size=64, mode=ZeroMode.ZEROS), F32),
    ],
)
@pytest.mark.parametrize(("hidden", "neurons"), [(4096, 1037), (1160, 333)])
def test_large_mlps_match_the_reference(hidden, neurons, kind, dtype, backend):
    case = dict(dtype=dtype, device="cuda", sparsity=0.6, bias=True)
    arguments, expected = make_mlp(hidden, neurons, kind, **case)
    for _ in range(3):
        found = packed_gated_mlp(arguments, backend)
        error = (found - expected).double().norm() / expected.double().norm()
        assert error < (2e-3 if dtype == F32 else 1e-2)


def test_one_token_is_left_to_the_kernel_where_any_order_is_allowed():
    arguments, _ = make_mlp(136, 75, Kind(group_size=32), dtype=F32, device="cuda")
    assert BACKENDS.backend_for(arguments) == "cuda"
    assert BACKENDS.backend_for(arguments._replace(router="up")) == "triton"
    torch.use_deterministic_algorithms(True)
    assert BACKENDS.backend_for(arguments) == "triton"


def make_sparse(config=LlamaConfig, **changes):
    sizes = dict(hidden_size=256, intermediate_size=1024, head_dim=64) | changes
    model = models.make_model(config, **sizes)
    quantise_(model, "int4", "layers", group_size=128, scale_dtype=BF16)
    thresholds = cats.calibrate(model, [models.make_ids(8)], target_sparsity=0.5)
    return cats.sparsify_(model, thresholds).cuda()


@pytest.mark.parametrize("config", [LlamaConfig, Phi3Config])
@pytest.mark.parametrize("engine", ["eager", "compiled", "stream", "auto"])
def test_fused_models_give_the_tokens_of_the_plain_one(engine, config):
    model, ids = make_sparse(config), models.make_ids(1, 9).cuda()
    options = dict(max_new_tokens=40, do_sample=False, eos_token_id=None)
    expected = cats.generate(model, ids, engine="eager", **options)
    cats.fuse_(model)
    actual = cats.generate(model, ids, engine=engine, **options)
    models.assert_same_tokens(model, actual, expected, tie=5e-3)
    cats.release(model)
    assert torch.equal(cats.generate(cats.unfuse_(model), ids, engine="eager", **options), expected)


def test_batches_are_decoded_after_the_stream_engine_has_packed():
    model, ids = make_sparse(), models.make_ids(3, 9).cuda()
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None)
    expected = cats.generate(model, ids, engine="eager", **options)
    decoder = cats.Decoder(model)
    assert decoder.engine == "stream"
    models.assert_same_tokens(model, decoder.generate(ids, **options), expected, tie=5e-3)


def test_the_engine_keeps_codes_in_memory_once_and_gives_them_back():
    sizes = dict(hidden_size=2048, intermediate_size=5632, num_attention_heads=16, head_dim=128)
    model, ids = make_sparse(num_key_value_heads=4, **sizes), models.make_ids(1, 5).cuda()

    def used():
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    layers = [m for m in model.modules() if isinstance(m, QuantisedLinear)]
    codes = sum(nbytes(buffer) for layer in layers for buffer in layer.buffers())
    cats.generate(model, ids, engine="eager", max_new_tokens=2)  # what any engine needs
    cats.release(model)
    before = used()
    decoder = cats.Decoder(model, engine="stream")
    assert decoder.engine == "stream"
    assert all(layer.layout is not None for layer in layers)
    assert used() - before < 0.02 * codes + 2**20
    del decoder
    cats.release(model)
    assert all(layer.layout is None for layer in layers)
    assert abs(used() - before) < 2**20


def test_fused_mlps_stay_packed_when_the_engine_is_released():
    model, ids = make_sparse(), models.make_ids(1, 5).cuda()
    cats.fuse_(model)
    cats.generate(model, ids, engine="stream", max_new_tokens=3)
    cats.release(model)
    packed = [m for m in model.modules() if isinstance(m, QuantisedLinear) and m.layout]
    assert packed == [layer for _, mlp in fused_mlps(model) for layer in mlp.quantised_layers]
    cats.generate(model, ids, engine="eager", max_new_tokens=3)
