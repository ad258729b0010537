"""The CUDA kernel of linear layers of several tokens on a CPU, by an emulator."""

import pytest
import torch

from cats.benchmarks.timing import Timing
from cats.errors import UnsupportedModelError
from cats.ops.cuda import rows_input
from tests.ops.emulator import EmulatedFunction, emulated_kernels, imagine_gpu, needs_emulator

pytestmark = needs_emulator
BF16, F16 = torch.bfloat16, torch.float16


@pytest.fixture
def linear(monkeypatch):
    """Launches on an imaginary GPU of two multiprocessors."""
    from cats.ops.linear import rows

    imagine_gpu(monkeypatch, multiprocessors=2, shared_bytes=120 * 1024)
    with emulated_kernels(monkeypatch):
        yield rows


def run(linear, weights, x, *, biases=None, add=None, copy=None, counters=None, **options):
    """``[tokens, all rows]``, float32."""
    out = torch.full((len(x), sum(map(len, weights))), torch.nan)
    launches = linear.launches(
        weights,
        biases or [None] * len(weights),
        x=x,
        out=out,
        add=add,
        copy=copy,
        counters=counters,
        multiprocessors=2,
        **options,
    )
    for launch in launches:
        launch.function.launch(launch.arguments, blocks=launch.blocks, stream=0, dependent=True)
    return out


def matrix(rows, width, dtype):
    return torch.randn(rows, width).to(dtype) / width**0.5


def close(out, expected):
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "width", "rows", "dtype"),
    [
        (1, 8, (1, 1, 1), BF16),
        (2, 40, (13, 3, 29), F16),
        (4, 256, (70,), BF16),
        (4, 328, (9, 8), F16),
        (8, 576, (33, 7), BF16),
        (8, 4360, (17,), F16),
        (16, 520, (21, 24), BF16),
        (16, 2304, (10,), F16),
    ],
)
def test_output_is_that_of_torch(linear, tokens, width, rows, dtype):
    weights = [matrix(count, width, dtype) for count in rows]
    biases = [torch.randn(count).to(dtype) if i != 1 else None for i, count in enumerate(rows)]
    x, add = torch.randn(tokens, width).to(dtype), torch.randn(tokens, sum(rows))
    copy = torch.full_like(add, torch.nan)
    out = run(linear, weights, x, biases=biases, add=add, copy=copy)
    bias = torch.cat(
        [torch.zeros(n) if b is None else b for b, n in zip(biases, rows, strict=True)]
    )
    close(out, x.double() @ torch.cat(weights).double().t() + bias.double() + add.double())
    assert torch.equal(copy, out)


@pytest.mark.parametrize("counted", [False, True])
def test_every_row_is_taken_once_however_they_are_dealt_out(linear, counted):
    # among the last runs, which are dealt out in halves, is one without a second half
    weights, x = [matrix(515, 64, BF16), matrix(3, 64, BF16)], torch.randn(2, 64).to(BF16)
    counters = torch.zeros(2, dtype=torch.int32) if counted else None
    out = run(linear, weights, x, counters=counters)
    close(out, x.double() @ torch.cat(weights).double().t())
    assert not counted or counters[0] > 0


def test_the_copy_is_zero_where_nothing_is_added(linear):
    copy = torch.full((2, 9), torch.nan)
    run(linear, [matrix(9, 64, BF16)], torch.randn(2, 64).to(BF16), copy=copy)
    assert not copy.any()


def test_output_may_replace_what_is_added(linear):
    weight, x, stream = matrix(40, 64, BF16), torch.randn(4, 64).to(BF16), torch.randn(4, 40)
    expected = x.double() @ weight.double().t() + stream.double()
    (launch,) = linear.launches([weight], [None], x=x, out=stream, add=stream, multiprocessors=2)
    launch.function.launch(launch.arguments, blocks=launch.blocks, stream=0, dependent=True)
    close(stream, expected)


def test_output_may_be_a_part_of_wider_rows(linear):
    weight, x, wide = matrix(12, 64, BF16), torch.randn(4, 64).to(BF16), torch.zeros(4, 20)
    (launch,) = linear.launches([weight], [None], x=x, out=wide[:, 3:15], multiprocessors=2)
    launch.function.launch(launch.arguments, blocks=launch.blocks, stream=0, dependent=True)
    close(wide[:, 3:15], x.double() @ weight.double().t())
    assert not wide[:, :3].any()
    assert not wide[:, 15:].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_harms_no_other(linear, bad):
    weight, x = matrix(19, 72, BF16), torch.randn(8, 72).to(BF16)
    alone = run(linear, [weight], x)
    x[3, 5] = bad
    out = run(linear, [weight], x)
    assert not out[3].isfinite().any()
    others = torch.arange(8) != 3
    assert torch.equal(out[others], alone[others])


@pytest.mark.parametrize(("few", "many"), [(1, 8), (2, 16)])
def test_output_of_a_token_does_not_depend_on_the_others(linear, few, many):
    weight, x = matrix(19, 136, BF16), torch.randn(many, 136).to(BF16)
    counters = torch.zeros(2, dtype=torch.int32)
    out = run(linear, [weight], x, counters=counters)
    assert torch.equal(run(linear, [weight], x[:few].clone()), out[:few])


def test_sixteen_tokens_of_long_rows_are_two_launches(linear):
    weight, x = matrix(9, 4608, BF16), torch.randn(16, 4608).to(BF16)
    launches = linear.launches([weight], [None], x=x, out=torch.empty(16, 9), multiprocessors=2)
    assert len(launches) == 2
    close(run(linear, [weight], x), x.double() @ weight.double().t())


@pytest.mark.parametrize(
    ("dtype", "width", "reason"),
    [
        (torch.float32, 64, "only bfloat16 and float16"),
        (BF16, 60, "multiple of 16 bytes"),
        (BF16, 20000, "too long for 2 tokens"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(linear, dtype, width, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        run(linear, [torch.zeros(3, width, dtype=dtype)], torch.zeros(2, width, dtype=dtype))


def test_chunks_that_do_not_fit_are_refused(linear, monkeypatch):
    imagine_gpu(monkeypatch, multiprocessors=2, shared_bytes=48 * 1024)
    with pytest.raises(UnsupportedModelError, match="two chunks"):
        run(linear, [matrix(9, 2048, BF16)], torch.zeros(2, 2048, dtype=BF16))


def test_a_chunk_may_have_sixteen_rows(linear, monkeypatch):
    monkeypatch.setattr(rows_input, "ROWS_OF_CHUNK", 16)
    weights, x = [matrix(45, 136, BF16), matrix(5, 136, BF16)], torch.randn(8, 136).to(BF16)
    counters = torch.zeros(2, dtype=torch.int32)
    out = run(linear, weights, x, counters=counters)
    close(out, x.double() @ torch.cat(weights).double().t())


def test_a_ring_of_two_chunks_is_enough(linear):
    weight, x = matrix(45, 136, BF16), torch.randn(4, 136).to(BF16)
    out = torch.full((4, 45), torch.nan)
    (launch,) = linear.launches([weight], [None], x=x, out=out, multiprocessors=2)
    defines = launch.function.defines | {"CHUNKS": 2, "EARLY_CHUNKS": 1, "PARTS": 3}
    size = dict(threads=launch.function.threads, shared_bytes=launch.function.shared_bytes)
    function = EmulatedFunction(0, "linear/linear_rows.cu", defines, **size)
    function.launch(launch.arguments, blocks=launch.blocks, stream=0, dependent=True)
    close(out, x.double() @ weight.double().t())


def test_times_of_several_tokens(linear, monkeypatch):
    from tests.ops.linear import time_rows

    monkeypatch.setattr(time_rows, "read_bandwidth", lambda *a, **k: Timing.once(1e-3))
    bench = time_rows.Bench(
        torch.device("cpu"), rounds=2, chain=2, rotated_bytes=10_000, read_bytes=1000
    )
    settings = [time_rows.SETTINGS[0], time_rows.SETTINGS[6]]
    lines = list(bench.measure(time_rows.Shape("tiny", (20, 5, 5), 64), (1, 4), settings))
    first, second = (setting.name for setting in settings)
    assert [(line["kernel"], line["tokens"]) for line in lines] == [
        (first, 1),
        (first, 4),
        (second, 1),
        (second, 4),
        ("linear", 1),
    ]
    assert all(line["us"] > 0 and line["share"] > 0 for line in lines)
