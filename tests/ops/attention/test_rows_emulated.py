"""The CUDA kernel of attention of several rows on a CPU, by an emulator."""

import pytest
import torch

from tests.ops.emulator import emulated_kernels, imagine_gpu, needs_emulator

pytestmark = needs_emulator
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CAPACITY = 600


@pytest.fixture
def attention(monkeypatch):
    """Launches on an imaginary GPU of eight multiprocessors."""
    from cats.ops.attention import rows

    imagine_gpu(monkeypatch, multiprocessors=8, shared_bytes=100 * 1024)
    with emulated_kernels(monkeypatch):
        yield rows


class Case:
    """Rows at these positions, in lines of their own, with random keys and values."""

    def __init__(self, positions, *, heads=4, key_heads=2, head=16, rotary=16, dtype=F32):
        rows = len(positions)
        self.heads, self.key_heads, self.head, self.dtype = heads, key_heads, head, dtype
        self.positions = torch.tensor(positions)
        # not the lines that the rows' numbers suggest
        self.lines = torch.arange(rows).flip(0) + 1
        self.active = torch.ones(rows, dtype=torch.int32)
        shape = rows + 2, key_heads, CAPACITY, head
        self.keys, self.values = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        self.qkv = torch.randn(rows, heads + 2 * key_heads, head)
        angles = torch.rand(CAPACITY, rotary // 2) * 6
        self.cosines, self.sines = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        self.norms = None, None

    def run(self, attention, *, window=2**31 - 1, slots=None, softcap=0.0, counters=None):
        """``[rows, heads, head]``."""
        rows, slots = len(self.positions), slots or int(self.positions.max()) + 1
        grid = attention.grid_of(rows, CAPACITY, self.heads, self.key_heads, 8)
        out = torch.full((rows, self.heads * self.head), torch.nan, dtype=self.dtype)
        own = torch.zeros(rows * self.heads, dtype=torch.int32) if counters is None else counters
        partials = torch.full((rows * grid.splits * self.heads * (self.head + 2),), torch.nan)
        launch = attention.launch(
            qkv=self.qkv.flatten(1),
            cosines=self.cosines,
            sines=self.sines,
            q_norm=self.norms[0],
            k_norm=self.norms[1],
            keys=self.keys,
            values=self.values,
            out=out,
            positions=self.positions,
            lines=self.lines,
            active=self.active,
            partials=partials,
            counters=own,
            heads=self.heads,
            window=window,
            slots=slots,
            scale=0.3,
            softcap=softcap,
            epsilon=1e-5,
            weight_offset=1.0,
            multiprocessors=8,
        )
        launch.function.launch(
            launch.arguments,
            blocks=launch.blocks,
            columns=launch.columns,
            stream=0,
            dependent=True,
        )
        assert counters is not None or not own.any()
        self.splits, self.columns = launch.blocks, launch.columns
        self.partials = partials[: rows * self.splits * self.heads * (self.head + 2)]
        return out.view(rows, self.heads, self.head)

    def expected(self, row, *, window=2**31 - 1, softcap=0.0):
        """Output of a row, ``[heads, head]``, and its new key and value, in float64."""
        queries, keys, values = (
            self.qkv[row].double().split([self.heads, self.key_heads, self.key_heads])
        )
        queries, keys = (
            self._turned(t, w, row) for t, w in zip((queries, keys), self.norms, strict=True)
        )
        keys, values = keys.to(self.dtype).double(), values.to(self.dtype).double()
        position, line = int(self.positions[row]), int(self.lines[row])
        first = max(0, position + 1 - window)
        out = []
        for query_head, query in enumerate(queries):
            head = query_head * self.key_heads // self.heads
            seen = [t[line, head, first:position].double() for t in (self.keys, self.values)]
            k, v = (
                torch.cat([old, new[head][None]])
                for old, new in zip(seen, (keys, values), strict=True)
            )
            scores = 0.3 * k @ query
            scores = softcap * (scores / softcap).tanh() if softcap else scores
            out.append(scores.softmax(0) @ v)
        return torch.stack(out), keys, values

    def _turned(self, heads, norm, row):
        if norm is not None:
            heads = heads * (heads.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
            heads = heads * (norm.double() + 1)
        position, size = int(self.positions[row]), self.cosines.shape[1]
        turned, rest = heads[:, :size], heads[:, size:]
        half = torch.cat([-turned[:, size // 2 :], turned[:, : size // 2]], 1)
        turned = turned * self.cosines[position] + half * self.sines[position]
        return torch.cat([turned, rest], 1)

    def check(self, attention, **options):
        keys, values = self.keys.clone(), self.values.clone()
        out = self.run(attention, **options)
        options.pop("slots", None)
        tolerance = {F32: 1e-4, F16: 2e-3, BF16: 2e-2}[self.dtype]
        for row in range(len(self.positions)):
            expected, key, value = self.expected(row, **options)
            place = int(self.lines[row]), slice(None), int(self.positions[row])
            keys[place], values[place] = key.to(self.dtype), value.to(self.dtype)
            torch.testing.assert_close(
                out[row].double(), expected, rtol=tolerance, atol=tolerance, msg=f"row {row}"
            )
        torch.testing.assert_close(self.keys, keys, rtol=tolerance, atol=tolerance)
        assert torch.equal(self.values, values)


@pytest.mark.parametrize(
    ("positions", "sizes"),
    [
        ([0], dict(heads=1, key_heads=1)),
        ([5, 0, 37], dict()),
        ([1, 255, 7, 100], dict(dtype=BF16, head=64, rotary=32)),
        ([*range(16)], dict(heads=6, key_heads=2, dtype=F16)),
        ([250, 3], dict(heads=5, key_heads=1, head=40, rotary=8)),
    ],
)
def test_output_and_new_keys_are_those_of_the_formula(attention, positions, sizes):
    Case(positions, **sizes).check(attention)


@pytest.mark.parametrize("rows", [2, 5])
def test_rows_may_be_split_or_not_in_one_launch(attention, rows):
    case = Case([599, 3, 255, 400, 0][:rows], key_heads=1, heads=2)
    case.check(attention)
    assert case.splits > 1


def test_rows_share_no_counter_and_no_partial_sum(attention):
    # blocks run one after another here, so that a shared one would change no output
    case = Case([599, 590, 580], key_heads=1, heads=2)
    case.run(attention)
    assert case.splits > 1
    assert case.partials.isfinite().all()
    counters = torch.zeros(6, dtype=torch.int32)
    counters[case.columns // 3] = 1000
    out = case.run(attention, counters=counters)
    assert out[1].isnan().any()
    assert out[[0, 2]].isfinite().all()


def test_rows_see_their_own_windows(attention):
    Case([3, 20, 21, 599]).check(attention, window=21)


def test_scores_are_bounded_and_heads_normed(attention):
    case = Case([9, 30])
    case.norms = torch.randn(16), torch.randn(16)
    case.check(attention, softcap=0.7)


@pytest.mark.parametrize("position", [40, 599])
def test_rows_that_are_not_active_write_nothing(attention, position):
    case = Case([position, 9, position, 2], key_heads=1)
    case.active[0] = case.active[2] = 0
    # whatever their places hold
    case.lines[0], case.positions[2] = 10**6, -7
    keys, values = case.keys.clone(), case.values.clone()
    out = case.run(attention, slots=600)
    assert out[0].isnan().all()
    assert out[2].isnan().all()
    for row in (1, 3):
        torch.testing.assert_close(out[row].double(), case.expected(row)[0], rtol=1e-4, atol=1e-4)
        place = int(case.lines[row]), slice(None), int(case.positions[row])
        keys[place], values[place] = case.keys[place], case.values[place]
    assert torch.equal(case.keys, keys)
    assert torch.equal(case.values, values)


def test_nan_of_a_row_stays_in_it(attention):
    case = Case([40, 300, 7])
    alone = case.run(attention)
    case.keys[case.lines[1], :, 12] = torch.nan
    case.qkv[1] = torch.nan
    out = case.run(attention)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], alone[[0, 2]])
