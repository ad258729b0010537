"""Traces leave a model as it was, and are used only where they agree with it."""

import threading
import time

import pytest
import torch
from torch import nn

# torch has no public name for it
from torch._subclasses.fake_tensor import FakeTensor
from transformers import LlamaConfig, Phi3Config

import cats
from cats.decode import eager
from cats.decode.marks import Marks
from cats.decode.tracing import Exclusion, disagreement, shadow_of
from tests.decode.test_rotary import longrope
from tests.models import make_ids, make_model

GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


class Storing(nn.Module):
    """Keeps a table that grows with the text, and counts its calls."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.table = torch.zeros(0)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        if len(self.table) < 64:
            self.table = torch.linspace(1, 2, 64)
        self.calls += 1
        return self.inner(x) * self.table[0]


class Unequal(nn.Module):
    """Decides by the length of what it is given, which a trace sees once."""

    def __init__(self, inner, limit):
        super().__init__()
        self.inner, self.limit = inner, limit
        self.lengths = {}

    def forward(self, x, *args, **kwargs):
        cache = kwargs.get("past_key_values", kwargs.get("cache"))
        length = x.shape[1] + (0 if cache is None else cache.get_seq_length())
        if isinstance(length, int) and length > self.limit:
            x = -x
        return self.inner(x, *args, **kwargs)


def expected_tokens(model, ids, count):
    model.generation_config.eos_token_id = None
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **GREEDY)


def state_of(model):
    return {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor | int | float | str | None)
    }


@pytest.mark.filterwarnings("ignore:.*cannot be traced")
@pytest.mark.parametrize("make", [make_model, longrope], ids=["llama", "phi3"])
def test_model_is_left_without_fake_tensors(make):
    model = make()
    cats.generate(model, make_ids(1, 9), engine="eager", max_new_tokens=5, **GREEDY)
    tensors = [t for t in state_of(model).values() if isinstance(t, torch.Tensor)]
    tensors += [*model.parameters(), *model.buffers()]
    assert not any(isinstance(t, FakeTensor) for t in tensors)
    expected_tokens(model, make_ids(1, 60), 5)  # the model itself can be used


def test_forward_that_stores_a_tensor_runs_module_by_module_and_says_so():
    model, ids = make_model(), make_ids(1, 9)
    model.model.layers[0].mlp = Storing(model.model.layers[0].mlp)
    expected = expected_tokens(model, ids, 20)
    called = int(model.model.layers[0].mlp.calls)
    with pytest.warns(UserWarning, match=r"stores .*mlp\.(table|calls)"):
        actual = cats.generate(model, ids, engine="eager", max_new_tokens=20, **GREEDY)
    assert torch.equal(actual, expected)
    assert int(model.model.layers[0].mlp.calls) == 2 * called


@pytest.mark.parametrize("limit", [12, 128])
def test_model_that_changes_with_the_length_gives_its_own_tokens(limit):
    model, ids = make_model(), make_ids(1, 9)
    model.config.some_limit = limit
    model.model.layers[0] = Unequal(model.model.layers[0], limit)
    expected = expected_tokens(model, ids, limit + 20)
    with pytest.warns(UserWarning, match="differ"):
        actual = cats.generate(model, ids, engine="eager", max_new_tokens=limit + 20, **GREEDY)
    assert torch.equal(actual, expected)


def test_wrong_trace_is_not_used(monkeypatch):
    model, ids = make_model(), make_ids(1, 9)
    real = eager.trace_unmasked

    def wrong(model, state):
        graph = real(model, state)
        node = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.silu.default)
        node.target = torch.ops.aten.relu.default
        graph.recompile()
        return graph

    monkeypatch.setattr(eager, "trace_unmasked", wrong)
    with pytest.warns(UserWarning, match="differ"):
        actual = cats.generate(model, ids, engine="eager", max_new_tokens=9, **GREEDY)
    assert torch.equal(actual, expected_tokens(model, ids, 9))


def test_shadow_shares_weights_and_keeps_what_is_stored_to_itself():
    model = make_model(Phi3Config)
    before = Marks.of(model)
    shadow = shadow_of(model)
    assert all(a is b for a, b in zip(model.parameters(), shadow.parameters(), strict=True))
    shadow.model.layers[0].mlp.stored = 7
    shadow.model.rotary_emb.register_buffer("inv_freq", torch.ones(1))
    after = Marks.of(model)
    assert before.structure == after.structure
    assert before.content == after.content


def test_module_that_cannot_be_copied_runs_untraced():
    model, ids = make_model(LlamaConfig), make_ids(1, 9)
    model.model.layers[0].mlp.lock = threading.Lock()
    with pytest.warns(UserWarning, match="cannot be traced"):
        actual = cats.generate(model, ids, engine="eager", max_new_tokens=9, **GREEDY)
    assert torch.equal(actual, expected_tokens(model, ids, 9))


def test_one_thread_traces_alone():
    exclusion, log = Exclusion(), []
    running = threading.Barrier(3)

    def run():
        with exclusion.running(), exclusion.running():
            running.wait()
            time.sleep(0.05)
            log.append("run")

    def trace():
        with exclusion.tracing(), exclusion.tracing(), exclusion.running():
            log.append("trace")

    def late():
        with exclusion.running():
            log.append("late")

    runners = [threading.Thread(target=run) for _ in range(2)]
    for thread in runners:
        thread.start()
    running.wait()
    tracer = threading.Thread(target=trace)
    tracer.start()
    while not exclusion.waiting:
        time.sleep(0.001)
    last = threading.Thread(target=late)  # comes while one waits to trace
    last.start()
    for thread in (*runners, tracer, last):
        thread.join()
    assert log == ["run", "run", "trace", "late"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_flipped_token_is_forgiven_and_a_wrong_step_is_not(dtype):
    table = torch.randn(50, 20)
    tokens = torch.tensor([[7]])

    def own():
        return table[tokens[:, 0]]

    def flipped():
        out = own().clone()
        return out if int(tokens) != 7 else -out

    compare = dict(tokens=tokens, dtype=dtype)
    assert disagreement(own, own, computed="alike", **compare) is None
    assert disagreement(own, flipped, computed="alike", **compare) is None
    assert disagreement(own, lambda: -own(), computed="otherwise", **compare) is not None
    assert disagreement(own, lambda: own() * torch.nan, computed="otherwise", **compare) is not None
    assert int(tokens) == 7
    table[7:, 3] = torch.nan  # of the model itself
    assert disagreement(own, own, computed="alike", **compare) is None
