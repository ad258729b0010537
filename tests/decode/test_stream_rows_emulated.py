"""The chain of a step of several rows on a CPU, by an emulator of CUDA."""

import copy

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, Qwen2Config

import cats
from cats.benchmarks.timing import Timing
from cats.decode.forward import prefill
from cats.decode.request import Request
from cats.decode.rows.lines import Line
from cats.decode.rows.modules import ModuleRows
from cats.decode.rows.progress import Progress
from cats.decode.rows.row import Row, Ticket
from cats.decode.state import State
from cats.decode.stream.spec import read_spec
from cats.errors import BackendError, UnsupportedModelError
from tests.decode.test_stream import GREEDY, head_sizes
from tests.models import FAMILIES, make_ids, make_model
from tests.ops.emulator import needs_emulator

pytestmark = needs_emulator
CAPACITY = 64
ENDLESS = dict(eos_token_id=None)
# By how much logits may differ, as a share: the kernels round the input of each matrix.
TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.fixture
def rows_module(chain_module):
    from cats.decode.stream import rows

    return rows


def sparse_model(config, dtype=torch.float16, sparsity=0.5, **changes):
    """A sparse model in 16 bits, and the same numbers in float32."""
    from cats.decode.stream.layout import lay_out_down

    model = make_model(config, **changes)
    if sparsity:
        cats.sparsify_(model, cats.calibrate(model, [make_ids(8)], target_sparsity=sparsity))
    model.to(dtype)
    exact = copy.deepcopy(model).float()
    lay_out_down(read_spec(model), [])
    return model, exact


class Conversations:
    """Texts of different lengths in lines of one cache, and a chain that runs their last tokens."""

    def __init__(self, rows_module, model, exact, lengths, *, size=None, capacity=CAPACITY):
        from cats.decode.stream.rotary import RotaryTables
        from cats.decode.stream.row_buffers import RowBuffers

        self.exact, spec = exact, read_spec(model)
        self.texts = [make_ids(1, length, seed=i)[0].tolist() for i, length in enumerate(lengths)]
        size = size or len(lengths)
        shape = size + 1, spec.key_heads, capacity, spec.head_size
        self.cache = [torch.full(shape, torch.nan, dtype=spec.dtype) for _ in 2 * spec.layers]
        tokens = torch.full((size + 1,), -1)
        self.buffers = RowBuffers.of(spec, size, tokens, capacity=capacity, multiprocessors=2)
        # not the lines that the rows' numbers suggest; the places of other rows hold nonsense
        self.lines = [size - row for row in range(len(lengths))]
        self.buffers.lines.fill_(10**6)
        self.buffers.positions.fill_(-7)
        for row, (text, line) in enumerate(zip(self.texts, self.lines, strict=True)):
            self._remember(text[:-1], line)
            self.buffers.lines[row], self.buffers.positions[row] = line, len(text) - 1
            self.buffers.active[row], tokens[line] = 1, text[-1]
        scale = spec.hidden_size**0.5 if "Gemma" in type(exact).__name__ else 1.0
        self.chain = rows_module.RowChain(
            spec,
            self.buffers,
            self.cache,
            RotaryTables(spec, capacity),
            size,
            embedding_scale=scale,
            multiprocessors=2,
        )

    def _remember(self, text, line):
        if not text:
            return
        # which keeps all slots of sliding layers, where a cache of transformers does not
        state = State(self.exact, self.exact.config, 1, len(text))
        prefill(self.exact, state, torch.tensor([text]), 0)
        for buffer, stored in zip(self.cache, state.cache.buffers(), strict=True):
            buffer[line, :, : len(text)] = stored[0].to(buffer.dtype)

    def expected(self, row):
        return self.exact(torch.tensor([self.texts[row]])).logits[0, -1]


def check(conversations, dtype=torch.float16, **options):
    with torch.inference_mode():
        logits = conversations.chain.run(CAPACITY)
        for row in range(len(conversations.texts)):
            expected = conversations.expected(row)
            error = (logits[row] - expected).norm() / expected.norm()
            assert error < TOLERANCE[dtype], f"row {row}: {error:.1e}"


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.__name__)
def test_rows_of_different_lengths_are_those_of_the_model(rows_module, config):
    # a window that two of the texts leave behind, where the family has one
    sizes = dict(sliding_window=16) if hasattr(config(), "sliding_window") else {}
    model, exact = sparse_model(config, **sizes)
    with torch.inference_mode():
        conversations = Conversations(rows_module, model, exact, [37, 1, 20], size=4)
    check(conversations)


@pytest.mark.parametrize("rows", [1, 2, 8, 16])
def test_any_number_of_rows_is_that_of_the_model(rows_module, rows):
    model, exact = sparse_model(LlamaConfig, torch.bfloat16, **head_sizes(4, 2, 16))
    with torch.inference_mode():
        lengths = [1 + 7 * row % 50 for row in range(rows)]
        conversations = Conversations(rows_module, model, exact, lengths)
    check(conversations, torch.bfloat16)


@pytest.mark.parametrize("sparsity", [0, 0.9])
def test_dense_and_very_sparse_rows_are_those_of_the_model(rows_module, sparsity):
    model, exact = sparse_model(LlamaConfig, sparsity=sparsity)
    with torch.inference_mode():
        conversations = Conversations(rows_module, model, exact, [5, 30])
    check(conversations)


@pytest.mark.parametrize("config", [Qwen2Config, Gemma2Config])
def test_greedy_tokens_are_those_of_single_texts(rows_module, config):
    model, exact = sparse_model(config)
    with torch.inference_mode():
        conversations = Conversations(rows_module, model, exact, [9, 30, 3], size=4)
        buffers, ties = conversations.buffers, 0
        for step in range(6):
            conversations.chain.run_greedily(CAPACITY)
            for row, text in enumerate(conversations.texts):
                scores, token = conversations.expected(row), int(buffers.chosen[step, row])
                ties += token != int(scores.argmax())
                assert scores.max() - scores[token] < 1e-2
                text.append(token)
                assert buffers.tokens[conversations.lines[row]] == token
    assert ties <= 2
    assert buffers.step == 6
    assert buffers.positions.tolist() == [14, 35, 8, -7]


def test_a_row_that_is_not_finite_harms_no_other(rows_module):
    model, exact = sparse_model(LlamaConfig)
    with torch.inference_mode():
        conversations = Conversations(rows_module, model, exact, [9, 30, 3])
        alone = conversations.chain.run(CAPACITY).clone()
        conversations.cache[1][conversations.lines[1], :, 4] = torch.nan
        logits = conversations.chain.run(CAPACITY)
    assert logits[1].isnan().all()
    torch.testing.assert_close(logits[[0, 2]], alone[[0, 2]], rtol=1e-4, atol=1e-4)


def test_fewer_rows_use_the_first_buffers(rows_module):
    model, exact = sparse_model(LlamaConfig)
    with torch.inference_mode():
        conversations = Conversations(rows_module, model, exact, [9, 30, 3, 14])
        whole = conversations.chain.run(CAPACITY).clone()
        chain = rows_module.RowChain(
            read_spec(model),
            conversations.buffers,
            conversations.cache,
            conversations.chain._rotary,
            2,
            embedding_scale=1.0,
            multiprocessors=2,
        )
        torch.testing.assert_close(chain.run(CAPACITY), whole[:2], rtol=1e-4, atol=1e-4)


def test_contexts_that_are_split_give_the_logits_of_the_model(rows_module):
    model, exact = sparse_model(LlamaConfig)
    with torch.inference_mode():
        conversations = Conversations(rows_module, model, exact, [400, 20], capacity=512)
        logits = conversations.chain.run(512)
        for row in range(2):
            expected = conversations.expected(row)
            assert (logits[row] - expected).norm() / expected.norm() < 5e-3


def test_float32_is_refused_with_the_reason(rows_module):
    model, exact = sparse_model(LlamaConfig, torch.float32)
    with torch.inference_mode(), pytest.raises(UnsupportedModelError, match="float32"):
        Conversations(rows_module, model, exact, [3, 5])


@pytest.fixture
def row_engine(rows_module, monkeypatch):
    """Engines whose steps run at once, instead of in CUDA graphs."""
    from cats.decode.stream import row_engine

    monkeypatch.setattr(row_engine, "captured", lambda step, device: step)
    return row_engine


def run_rows(engine, model, prompts, steps, **options):
    """New tokens of each prompt, the first row in the last line."""
    rows = []
    for number, prompt in enumerate(prompts):
        settings = GREEDY | dict(max_new_tokens=steps + 1) | options
        request = Request.of(model, model.config, prompt[None], None, settings)
        line = Line(engine.lines - 1 - number, engine.capacity)
        rows.append(
            Row(Ticket(request, Progress()), line, number, device=engine.device, vocabulary=257)
        )
    chosen = []
    for row in rows:
        chosen.append(engine.prefill(row, len(row.ids)).tolist())
        row.reached(len(row.ids))
        row.start()
    for _ in range(steps):
        for tokens, token in zip(chosen, engine.step(rows).tolist(), strict=True):
            tokens.append(token)
        for row in rows:
            row.start()
    return chosen


def counted(owner, name, calls):
    method = getattr(owner, name)

    def call(*args):
        calls.append(name)
        return method(*args)

    return call


@pytest.mark.parametrize("sampled", [False, True])
def test_an_engine_gives_the_tokens_of_the_modules(row_engine, monkeypatch, sampled):
    model, _ = sparse_model(LlamaConfig)
    prompts = [make_ids(1, length, seed=i)[0] for i, length in enumerate((9, 20, 3))]
    options = dict(do_sample=True, seed=3) if sampled else {}
    with torch.inference_mode():
        engine = row_engine.StreamRows(model, 4, CAPACITY, rows=3)
        by_modules = ModuleRows(model, 4, CAPACITY)
        calls = []
        for name in ("run", "choose"):
            monkeypatch.setattr(engine._steps, name, counted(engine._steps, name, calls))
        uploads = engine._steps._uploads
        actual = run_rows(engine, model, prompts, 5, **options)
        assert calls == 5 * ["run" if sampled else "choose"]
        assert actual == run_rows(by_modules, model, prompts, 5, **options)
        # private: places are told to the device once, since positions move on there
        if not sampled:
            assert engine._steps._uploads == uploads + 1
        engine.forget()
        assert run_rows(engine, model, prompts, 1, **options) == [row[:2] for row in actual]
    assert calls == calls[:5]


def test_rows_may_come_and_go(row_engine):
    model, exact = sparse_model(LlamaConfig)
    with torch.inference_mode():
        engine = row_engine.StreamRows(model, 4, CAPACITY, rows=4)
        lengths = (9, 20, 3, 30)
        texts = {
            line: make_ids(1, length, seed=line)[0].tolist() for line, length in enumerate(lengths)
        }
        for line, text in texts.items():
            engine.single(line, torch.tensor(text[:-1]), 0)
            engine._tokens[line] = text[-1]
        # more changes than there are places from which the device copies them
        for lines in ([2, 0], [0, 3, 1], [1], *4 * ([3, 1, 0, 2], [1, 0, 2], [0, 2, 3])):
            tokens = engine._steps.choose(lines, [len(texts[line]) - 1 for line in lines])
            for line, token in zip(lines, tokens.tolist(), strict=True):
                scores = exact(torch.tensor([texts[line]])).logits[0, -1]
                assert scores.max() - scores[token] < 1e-2
                texts[line].append(token)


def test_kernels_that_differ_from_the_model_are_refused(row_engine, monkeypatch):
    model, _ = sparse_model(LlamaConfig)
    scale = row_engine.embedding_scale
    monkeypatch.setattr(row_engine, "embedding_scale", lambda *a: -scale(*a))
    with pytest.raises(UnsupportedModelError, match="differs from the model"):
        row_engine.StreamRows(model, 4, CAPACITY, rows=2)


def test_sessions_run_the_kernels_where_they_are_asked_for(row_engine, monkeypatch):
    from cats.decode.rows import engines

    monkeypatch.setattr(engines, "gpu_refusal", lambda device: None)
    calls = []
    choose = row_engine.KernelSteps.choose
    monkeypatch.setattr(row_engine.KernelSteps, "choose", lambda *a: calls.append(1) or choose(*a))
    model, _ = sparse_model(LlamaConfig)
    prompts = [make_ids(1, length, seed=i)[0].tolist() for i, length in enumerate((9, 20))]
    tokens = {}
    for engine in ("modules", "stream"):
        with cats.Sessions(model, rows=2, context=CAPACITY, engine=engine) as sessions:
            opened = [sessions.open(prompt, max_new_tokens=4, **ENDLESS) for prompt in prompts]
            tokens[engine] = [session.result(60).tokens for session in opened]
        assert bool(calls) == (engine == "stream")
    assert tokens["stream"] == tokens["modules"]
    # in place, but not a tensor of inference mode, whose writes are not seen
    down = model.model.layers[0].mlp.down_proj.weight
    assert down.t().is_contiguous()
    assert not down.is_inference()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.float(), "float32"),
        (lambda model: model.register_forward_hook(print), "forward hooks"),
    ],
)
def test_sessions_say_why_kernels_cannot_run(row_engine, monkeypatch, change, reason):
    from cats.decode.rows import engines

    monkeypatch.setattr(engines, "gpu_refusal", lambda device: None)
    model, _ = sparse_model(LlamaConfig)
    change(model)
    with pytest.raises(BackendError, match=f"stream cannot run rows of this model: .*{reason}"):
        cats.Sessions(model, rows=2, context=CAPACITY, engine="stream")


def test_more_rows_than_kernels_take_are_refused(row_engine):
    with pytest.raises(UnsupportedModelError, match="up to 16 rows"):
        row_engine.StreamRows(sparse_model(LlamaConfig)[0], 17, CAPACITY, rows=17)


def test_times_of_steps(row_engine, monkeypatch):
    from tests.decode import time_stream_rows

    monkeypatch.setattr(time_stream_rows, "read_bandwidth", lambda *a, **k: Timing.once(1e-3))
    monkeypatch.setattr(time_stream_rows, "StreamRows", row_engine.StreamRows)
    model, _ = sparse_model(LlamaConfig)
    often = dict(repeats=1, steps=2)
    lines = list(time_stream_rows.measure(model, [1, 2], 9, capacity=64, device="cpu", **often))
    assert [line["rows"] for line in lines] == [1, 2]
    assert all(line["ms"] > 0 and line["share"] > 0 for line in lines)
