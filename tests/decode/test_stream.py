import copy
import gc
import importlib.util

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

import cats
from cats.decode.forward import prefill
from cats.decode.state import State
from cats.decode.stream.spec import read_spec
from cats.errors import BackendError, UnsupportedModelError
from cats.weights import mask_inputs_, unmask_inputs_
from tests import models
from tests.models import FAMILIES, assert_same_tokens, make_ids, make_model
from tests.thorough import usual

GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
HAS_NVRTC = importlib.util.find_spec("cuda") is not None
needs_nvrtc = pytest.mark.skipif(not HAS_NVRTC, reason="cuda-bindings is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CAPABILITIES = [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]


# --- what is read from a model


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.__name__)
def test_every_family_has_the_common_form(config):
    spec = read_spec(make_model(config))
    assert len(spec.layers) == 2
    assert (spec.heads, spec.key_heads, spec.head_size) == (2, 1, 8)
    layer = spec.layers[0]
    assert (layer.attention_post_norm is not None) == (config in (Gemma2Config, Gemma3TextConfig))
    assert (layer.q_norm is not None) == (config in (Qwen3Config, Gemma3TextConfig))
    assert layer.weight_offset == ("Gemma" in config.__name__)
    assert not layer.mlp.thresholds.any()


def test_thresholds_of_a_sparse_model_are_read():
    model = make_model()
    cats.sparsify_(model, cats.calibrate(model, [make_ids(8)], target_sparsity=0.5))
    sparse = [layer.mlp.thresholds for layer in read_spec(model).layers]
    cats.fuse_(model)
    fused = [layer.mlp.thresholds for layer in read_spec(model).layers]
    assert all(t.all() for t in sparse)
    assert all(torch.equal(a, b) for a, b in zip(sparse, fused, strict=True))


def test_layer_of_another_form_is_named():
    model = make_model()
    model.model.layers[1].self_attn.q_proj = nn.Sequential(model.model.layers[1].self_attn.q_proj)
    with pytest.raises(UnsupportedModelError, match="q_proj is Sequential"):
        read_spec(model)
    model = make_model()
    model.model.layers[0].input_layernorm = nn.LayerNorm(16)
    with pytest.raises(UnsupportedModelError, match="LayerNorm"):
        read_spec(model)


def test_thresholds_on_up_or_on_products_are_refused():
    model = make_model()
    cats.sparsify_(model, cats.calibrate(model, [make_ids(8)], target_sparsity=0.5))
    read_spec(model)
    act = model.model.layers[1].mlp.act_fn
    act.router = "up"
    with pytest.raises(UnsupportedModelError, match="on up or on products"):
        read_spec(model)
    act.router = "gate"
    mask_inputs_(model.model.layers[1].mlp.down_proj, torch.zeros(models.F))
    with pytest.raises(UnsupportedModelError, match="on up or on products"):
        read_spec(model)
    unmask_inputs_(model.model.layers[1].mlp.down_proj)
    mask_inputs_(model.model.layers[0].self_attn.o_proj, torch.zeros(16))
    with pytest.raises(UnsupportedModelError, match="o of layer 0 drops small inputs"):
        read_spec(model)


def test_engine_is_an_error_without_kernels(monkeypatch):
    monkeypatch.setattr("cats.ops.cpu.unavailable", lambda: "the build failed")
    with pytest.raises(BackendError, match="stream cannot run: the CPU kernels are not available"):
        cats.generate(make_model(), make_ids(1, 4), engine="stream", max_new_tokens=2)


# --- compiled for every generation, without a GPU


@needs_nvrtc
@pytest.mark.parametrize("capability", usual(CAPABILITIES, [(8, 0), (9, 0)]))
@pytest.mark.parametrize("dtype", [0, 1, 2])
def test_kernels_compile_for_each_generation(capability, dtype):
    from cats.ops.cuda.compiler import compile_kernel

    assert compile_kernel("embedding/embedding.cu", dict(DTYPE=dtype, WIDTH=64), capability)
    assert compile_kernel("choice/choose.cu", dict(DTYPE=2, TRACE=1), capability)
    for normed in (0, 1):
        for width, parts in ((40, 1), (4096, 2)):
            shape = dict(DTYPE=dtype, WIDTH=width, NORMED=normed, PARTS=parts)
            defines = shape | dict(WARPS=8, STAGES=2, EARLY_PARTS=4)
            assert compile_kernel("linear/linear.cu", defines, capability)
    for head, heads, queries in ((64, 3, 3), (96, 1, 1), (128, 4, 4), (256, 4, 8)):
        shape = dict(DTYPE=dtype, HEAD=head, ROTARY=head, HEADS=heads, QUERIES=queries)
        splits = dict(UNSPLIT_SLOTS=256, SPLIT_SLOTS=64, MAX_SPLITS=64)
        defines = shape | splits | dict(HEAD_NORM=1, SOFTCAP=1, TRACE=1)
        assert compile_kernel("attention/attention.cu", defines, capability)


@needs_nvrtc
@pytest.mark.parametrize("capability", usual(CAPABILITIES, [(9, 0)]))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mlp_of_the_residual_stream_compiles_for_each_generation(capability, dtype):
    from cats.ops.cuda.compiler import compile_kernel
    from cats.ops.mlp.cuda.variant import variant_for

    limit = {8: 99, 12: 99}.get(capability[0], 227) * 1024
    for hidden in (576, 4096):
        variant = variant_for(hidden, dtype, 1, "silu", shared_limit=limit, residual=True)
        assert variant is not None
        assert compile_kernel("mlp/cuda/gated_mlp.cu", variant.defines(), capability)


# --- on a GPU


def gpu_model(config=LlamaConfig, *, sparsity=0.5, fuse=True, dtype=torch.float32, **changes):
    model = make_model(config, **changes).to("cuda", dtype)
    if sparsity:
        ids = make_ids(8).cuda()
        cats.sparsify_(model, cats.calibrate(model, [ids], target_sparsity=sparsity))
        if fuse:
            cats.fuse_(model)
    return model


def head_sizes(heads, key_heads, head_dim):
    """Options of a configuration with these heads."""
    return dict(
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_dim,
        hidden_size=16 * heads,
    )


def assert_tokens_of_transformers(model, ids, count):
    """In float32, the logits of each step agree, and so do the tokens, up to a near tie."""
    model.generation_config.eos_token_id = None
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **GREEDY
    )
    decoder = cats.Decoder(model, engine="stream")
    actual = decoder.generate(ids, max_new_tokens=count, **GREEDY)
    assert decoder.engine == "stream"
    with torch.no_grad():
        logits = model(expected).logits[0]
    step_logits = decoder.logits(expected, prompt_length=ids.shape[1])[0]
    torch.testing.assert_close(step_logits, logits[ids.shape[1] :], rtol=1e-3, atol=2e-3)
    assert_same_tokens(model, actual, expected, tie=1e-3)


@needs_gpu
@pytest.mark.parametrize("sparsity", [0, 0.5])
@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.__name__)
def test_tokens_of_every_family_are_those_of_transformers(config, sparsity):
    model, ids = gpu_model(config, sparsity=sparsity), make_ids(1, 7).cuda()
    assert_tokens_of_transformers(model, ids, 300)


@needs_gpu
@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_stay_close_to_the_models(config, dtype):
    model = gpu_model(config, dtype=dtype)
    ids = make_ids(1, 100).cuda()
    actual = cats.Decoder(model, engine="stream").logits(ids, prompt_length=20).log_softmax(-1)
    with torch.no_grad():
        expected = model(ids).logits[:, 20:].float().log_softmax(-1)
    divergence = (expected.exp() * (expected - actual)).sum(-1)
    assert divergence.mean() < 2e-2


@needs_gpu
@pytest.mark.parametrize("config", [MistralConfig, Gemma2Config, Gemma3TextConfig])
@pytest.mark.parametrize("window", [16, 80, 270])
def test_tokens_past_the_sliding_window_are_those_of_transformers(config, window):
    model, ids = gpu_model(config, sliding_window=window), make_ids(1, 12).cuda()
    assert_tokens_of_transformers(model, ids, 300)


@needs_gpu
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (7, 1), (16, 2)])
def test_heads_of_all_sizes_give_the_tokens_of_transformers(head_dim, heads, key_heads):
    model = gpu_model(**head_sizes(heads, key_heads, head_dim))
    ids = make_ids(1, 40).cuda()
    assert_tokens_of_transformers(model, ids, 100)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (6, 2), (8, 2)])
def test_layers_after_many_tokens_are_those_of_the_model(heads, key_heads, dtype):
    from cats.decode.stream.chain import Chain
    from cats.decode.stream.layout import lay_out_down
    from cats.decode.stream.probe import probe

    sizes = head_sizes(heads, key_heads, 128)
    model = gpu_model(sparsity=0, dtype=dtype, max_position_embeddings=32_768, **sizes)
    spec = read_spec(model)
    lay_out_down(spec, [])
    probe(model, spec, Chain, lengths=(1, 1001, 9000, 30_000))


@needs_gpu
def test_scaled_rotary_gives_the_tokens_of_transformers():
    factors = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
    scaled = dict(rope_type="llama3", rope_theta=1e4, original_max_position_embeddings=64)
    model, ids = gpu_model(rope_parameters=scaled | factors), make_ids(1, 12).cuda()
    assert_tokens_of_transformers(model, ids, 300)


CHOICES = ("random", "none possible", "equals", "NaN")


def choice(kind, vocabulary):
    """Logits ``[V]``, and the token that a greedy choice takes."""
    logits = torch.randn(vocabulary)
    token = int(logits.argmax())
    if kind == "none possible":
        logits.fill_(-torch.inf)
        token = 0
    elif kind == "equals":
        logits.fill_(0)
        logits[[100, 200, vocabulary - 1]] = 1.0
        token = 100
    elif kind == "NaN":
        logits[[50, 250]] = torch.nan
        token = 50
    return logits, token


def check_greedy_choices(model):
    """Runs the end of a token on each kind of logits; the last of them ends the row.

    Returns:
        The chain and its conversation.
    """
    from cats.decode.stream.chain import Chain

    device, vocabulary = model.device, model.config.vocab_size
    state = State(model, model.config, 1, 256)
    with torch.inference_mode():
        prefill(model, state, make_ids(1, 1).to(device), 0)
        state.eos = torch.tensor([3, 50], device=device)
        chain = Chain(read_spec(model), state)
        for number, kind in enumerate(CHOICES):
            logits, token = choice(kind, vocabulary)
            chain.buffers.logits.copy_(logits)
            chain.choose(7)
            assert int(state.tokens) == int(state.chosen[number]) == token
            assert int(state.slots) == int(state.positions) == int(state.step) == number + 1
            assert bool(state.finished) == (kind == CHOICES[-1])
        chain.choose(7)
        assert int(state.tokens) == int(state.chosen[len(CHOICES)]) == 7  # the row has ended


@needs_gpu
@pytest.mark.parametrize("vocabulary", [257, 70_001])
def test_greedy_choice_is_the_first_of_the_largest(vocabulary):
    check_greedy_choices(gpu_model(sparsity=0, vocab_size=vocabulary))


@needs_gpu
def test_row_ends_at_any_of_the_tokens_that_end_it():
    model, ids = gpu_model(), make_ids(1, 9).cuda()
    options = dict(engine="stream", max_new_tokens=30, do_sample=False, pad_token_id=7)
    free = cats.generate(model, ids, eos_token_id=None, **options)[0, 9:].tolist()
    end = free[10]
    never = next(token for token in range(257) if token not in free)
    ended = cats.generate(model, ids, eos_token_id=[never, end], **options)[0, 9:]
    assert ended.tolist() == free[: free.index(end) + 1]


@needs_gpu
def test_model_of_another_formula_runs_in_the_compiled_engine_and_says_why():
    class Tripled(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.weight, self.eps = norm.weight, norm.variance_epsilon

        def forward(self, x):
            return 3 * nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)

    model = gpu_model(sparsity=0)
    model.model.layers[1].input_layernorm = Tripled(model.model.layers[1].input_layernorm)
    with pytest.raises(BackendError, match="Tripled"):
        cats.generate(model, make_ids(1, 4).cuda(), engine="stream", max_new_tokens=2)
    model = gpu_model(sparsity=0)
    attention = model.model.layers[1].self_attn

    class Doubled(type(attention)):
        def forward(self, *args, **kwargs):
            out, weights = super().forward(*args, **kwargs)
            return 2 * out, weights

    attention.__class__ = Doubled
    with pytest.raises(BackendError, match="layer 1"):
        cats.generate(model, make_ids(1, 4).cuda(), engine="stream", max_new_tokens=2)


@needs_gpu
def test_padded_batch_takes_another_engine():
    model, ids = gpu_model(), make_ids(2, 9).cuda()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    decoder = cats.Decoder(model)
    actual = decoder.generate(ids, attention_mask=mask, max_new_tokens=20, **GREEDY)
    expected = cats.generate(
        model, ids, attention_mask=mask, engine="compiled", max_new_tokens=20, **GREEDY
    )
    assert torch.equal(actual, expected)
    assert (decoder.engine_for(1), decoder.engine_for(2)) == ("stream", "compiled")
    with pytest.raises(BackendError, match="one row"):
        cats.generate(model, ids, engine="stream", max_new_tokens=20, **GREEDY)


@needs_gpu
def test_conversations_on_two_gpus_do_not_disturb_each_other():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    first = gpu_model()
    models, ids = [first, copy.deepcopy(first).to("cuda:1")], make_ids(1, 9)
    streams = [
        cats.Decoder(model, engine=engine).stream(ids.to(model.device), max_new_tokens=60, **GREEDY)
        for engine in ("stream", "compiled")
        for model in models
    ]
    # a token of each in turn
    steps = [[int(token) for token in tokens] for tokens in zip(*streams, strict=True)]
    expected, *others = (
        torch.tensor([[*ids[0], *tokens]]).cuda() for tokens in zip(*steps, strict=True)
    )
    assert expected.shape == (1, 69)
    for actual in others:
        assert_same_tokens(first, actual, expected, tie=1e-3)


@needs_gpu
def test_weight_written_right_before_a_step_is_seen():
    model, ids = gpu_model(sparsity=0), make_ids(1, 9).cuda()
    decoder = cats.Decoder(model, engine="stream")
    steps = decoder.stream(ids, max_new_tokens=40, **GREEDY)
    for _ in range(4):
        next(steps)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.data.mul_(0)  # each layer leaves the residual stream as it is
    seen = [int(next(steps)) for _ in range(5)]
    token = seen[1]  # a step was under way
    with torch.no_grad():
        for next_token in seen[2:]:
            hidden = model.model.norm(model.model.embed_tokens.weight[token])
            token = int(model.lm_head(hidden).argmax())
            assert token == next_token


@needs_gpu
def test_dense_model_gets_its_memory_layout_back():
    model, ids = gpu_model(sparsity=0), make_ids(1, 9).cuda()
    before = {name: (p.stride(), p.detach().clone()) for name, p in model.named_parameters()}
    options = dict(engine="stream", max_new_tokens=9, **GREEDY)
    first = cats.generate(model, ids, **options)
    cats.release(model)
    for name, p in model.named_parameters():
        assert p.stride() == before[name][0]
        assert torch.equal(p, before[name][1])
    assert torch.equal(cats.generate(model, ids, **options), first)


@needs_gpu
def test_fused_model_keeps_its_layout_when_released():
    model, ids = gpu_model(sparsity=0), make_ids(1, 9).cuda()
    options = dict(engine="stream", max_new_tokens=9, **GREEDY)
    cats.generate(model, ids, **options)
    cats.sparsify_(model, cats.calibrate(model, [make_ids(8).cuda()], target_sparsity=0.5))
    cats.fuse_(model)
    first = cats.generate(model, ids, **options)
    cats.release(model)
    with torch.no_grad():
        model(ids[:, :1])  # a single token, by the kernel
    assert torch.equal(cats.generate(model, ids, **options), first)


@needs_gpu
def test_weights_that_are_replaced_during_a_stream_do_not_harm_it():
    model, ids = gpu_model(sparsity=0), make_ids(1, 9).cuda()
    expected = cats.generate(model, ids, engine="stream", max_new_tokens=60, **GREEDY)[0, 9:]
    stream = cats.Decoder(model, engine="stream").stream(ids, max_new_tokens=60, **GREEDY)
    actual = [int(next(stream)) for _ in range(3)]
    for p in model.parameters():
        p.data = torch.randn_like(p)
    actual += [int(token) for token in stream]
    assert actual == expected.tolist()


@needs_gpu
@pytest.mark.parametrize("engine", ["stream", "auto"])
@pytest.mark.parametrize("prompt", [30, 40, 55])
def test_text_past_the_original_context_gives_the_tokens_of_transformers(engine, prompt):
    from tests.decode.test_rotary import longrope, reference

    ids = make_ids(1, prompt).cuda()
    expected = reference(lambda: longrope().cuda(), ids, 25)
    model = longrope().cuda()
    decoder = cats.Decoder(model, engine=engine)
    for _ in range(2 if engine == "stream" else 1):
        actual = decoder.generate(ids, max_new_tokens=25, **GREEDY)
        assert_same_tokens(model, actual, expected, tie=1e-3)


@needs_gpu
def test_without_memory_for_the_probe_another_engine_runs(monkeypatch):
    from cats.decode.stream import engine as stream_engine

    def full(*_):
        raise torch.cuda.OutOfMemoryError("none left")

    monkeypatch.setattr(stream_engine, "probe", full)
    model = gpu_model(sparsity=0)
    strides = [p.stride() for p in model.parameters()]
    assert cats.Decoder(model).engine == "compiled"
    assert [p.stride() for p in model.parameters()] == strides
    with pytest.raises(BackendError, match="out of memory"):
        cats.generate(model, make_ids(1, 4).cuda(), engine="stream", max_new_tokens=2)


@needs_gpu
def test_without_memory_for_a_graph_each_token_runs_without_it(monkeypatch):
    from cats.decode.stream import engine as stream_engine

    def full(*_):
        raise BackendError("out of memory while a step was captured")

    monkeypatch.setattr(stream_engine, "capture", full)
    model, ids = gpu_model(sparsity=0), make_ids(1, 9).cuda()
    with pytest.warns(UserWarning, match="goes on with eager"):
        actual = cats.generate(model, ids, max_new_tokens=9, **GREEDY)
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, **GREEDY)
    assert_same_tokens(model, actual, expected, tie=1e-3)


@needs_gpu
@pytest.mark.parametrize("engine", ["stream", "compiled", "eager"])
def test_memory_stays_flat_over_many_conversations(engine):
    model, ids = gpu_model(fuse=True), make_ids(1, 5).cuda()

    def used(calls):
        for _ in range(calls):
            cats.generate(model, ids, engine=engine, max_new_tokens=4, **GREEDY)
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    before = used(40)
    assert used(200) - before < 200 * 1024  # less than one workspace per conversation
