import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cats.errors import CatsError, ShapeError, UnsupportedModelError
from cats.ops.quantised import rows as module
from cats.ops.quantised.rows import PackedRows, RowLayout, ZeroMode, pack_rows, unpack_rows

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def random_matrix(layout, rows):
    """Codes, scales, zeros and shifts, as a matrix of this layout has them."""
    stored = layout.columns if layout.bits == 8 else -(-layout.columns // 2)
    codes = torch.randint(0, 256, (rows, stored), dtype=torch.uint8)
    if layout.bits == 4 and layout.columns % 2:
        codes[:, -1] &= 15
    shape = rows, layout.groups
    scales = torch.randn(shape).to(layout.scale_dtype)
    zeros = torch.randint(0, 2**layout.bits, shape, dtype=torch.uint8)
    shifts = torch.randn(shape).to(layout.scale_dtype)
    return (
        codes,
        scales,
        zeros if layout.zero_mode == ZeroMode.ZEROS else None,
        shifts if layout.zero_mode == ZeroMode.SHIFTS else None,
    )


layouts = st.builds(
    RowLayout,
    bits=st.sampled_from([4, 8]),
    columns=st.integers(1, 700),
    group_size=st.sampled_from([0, 16, 32, 64, 128]),
    scale_dtype=st.sampled_from(DTYPES),
    zero_mode=st.sampled_from(ZeroMode),
)


@settings(max_examples=60, deadline=None)
@given(layout=layouts, rows=st.integers(0, 9))
def test_what_is_packed_comes_back(layout, rows):
    codes, scales, zeros, shifts = random_matrix(layout, rows)
    packed = pack_rows(layout, codes, scales, zeros=zeros, shifts=shifts)
    assert packed.shape == (rows, layout.pitch)
    for before, after in zip(
        (codes, scales, zeros, shifts), unpack_rows(layout, packed), strict=True
    ):
        assert (before is None) == (after is None)
        if before is not None:
            assert after.dtype == before.dtype
            assert torch.equal(after, before)


@given(layout=layouts)
def test_pitch_suits_copies_and_banks(layout):
    assert layout.pitch % 32 == 0
    assert layout.pitch % 128 != 0
    assert layout.used_bytes <= layout.pitch < layout.used_bytes + 64
    assert layout.width % layout.unit == 0
    assert 0 <= layout.width - layout.columns < layout.unit


def test_each_byte_of_eight_bits_lies_where_the_products_read_it():
    columns = 200
    layout = RowLayout(bits=8, columns=columns, group_size=0, scale_dtype=torch.float32, zero=77)
    codes = torch.arange(columns, dtype=torch.uint8)[None]
    packed = pack_rows(layout, codes, torch.ones(1, 1))[0]
    for column in range(layout.width):
        unit, inside = divmod(column, 64)
        q, h, t, b = inside // 32, inside // 16 % 2, inside // 4 % 4, inside % 4
        wanted = column if column < columns else 77  # the padding is the zero point
        assert packed[64 * unit + 16 * t + 4 * (2 * q + h) + b] == wanted


def test_each_half_byte_of_four_bits_lies_where_the_products_read_it():
    columns = 131
    layout = RowLayout(bits=4, columns=columns, group_size=32, scale_dtype=torch.float16, zero=8)
    values = torch.randint(0, 16, (columns + 1,), dtype=torch.uint8)
    scales = torch.randn(1, 5).half()
    packed = pack_rows(layout, (values[::2] | values[1::2] << 4)[None], scales)[0]
    for column in range(layout.width):
        unit, inside = divmod(column, 128)
        j, p = inside // 64, inside // 32 % 2
        h, t, b = inside // 16 % 2, inside // 4 % 4, inside % 4
        byte = int(packed[64 * unit + 16 * t + 4 * (2 * j + h) + b])
        assert (byte >> 4 if p else byte & 15) == (values[column] if column < columns else 8)
    stored = packed[128 : 128 + 16].view(torch.float16)
    assert torch.equal(stored[:5], scales[0])
    assert not stored[5:].any()


def test_zeros_and_shifts_follow_the_scales():
    zeros = torch.tensor([[3, 250]], dtype=torch.uint8)
    codes, scales = torch.zeros(1, 64, dtype=torch.uint8), torch.ones(1, 2)
    layout = RowLayout(
        bits=8, columns=64, group_size=32, scale_dtype=torch.float32, zero_mode=ZeroMode.ZEROS
    )
    assert pack_rows(layout, codes, scales, zeros=zeros)[0, 72:74].tolist() == [3, 250]
    layout = RowLayout(
        bits=8, columns=64, group_size=32, scale_dtype=torch.float32, zero_mode=ZeroMode.SHIFTS
    )
    shifts = torch.tensor([[-1.5, 9.0]])
    packed = pack_rows(layout, codes, scales, shifts=shifts)
    assert torch.equal(packed[0, 72:80].view(torch.float32), shifts[0])


def test_large_matrices_are_packed_in_blocks(monkeypatch):
    layout = RowLayout(bits=4, columns=130, group_size=64, scale_dtype=torch.bfloat16, zero=8)
    codes, scales, _, _ = random_matrix(layout, 50)
    whole = pack_rows(layout, codes, scales)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 7 * layout.width)
    assert torch.equal(pack_rows(layout, codes, scales), whole)
    assert torch.equal(unpack_rows(layout, whole)[0], codes)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"bits": 3}, UnsupportedModelError),
        ({"columns": 0}, ShapeError),
        ({"group_size": 8}, UnsupportedModelError),
        ({"scale_dtype": torch.float64}, UnsupportedModelError),
        ({"zero": 16}, ShapeError),
        ({"zero": -1}, ShapeError),
        ({"zero": 8, "zero_mode": ZeroMode.ZEROS}, ShapeError),
    ],
)
def test_layouts_that_kernels_do_not_read_are_refused(change, error):
    with pytest.raises(error):
        RowLayout(**dict(bits=4, columns=64, group_size=32, scale_dtype=torch.half) | change)


@pytest.mark.parametrize(
    "change",
    [
        {"codes": torch.zeros(2, 33, dtype=torch.uint8)},
        {"codes": torch.zeros(2, 32, dtype=torch.int8)},
        {"scales": torch.zeros(2, 3).half()},
        {"scales": torch.zeros(2, 2)},
        {"zeros": torch.zeros(2, 2, dtype=torch.uint8)},
        {"shifts": torch.zeros(2, 2).half()},
    ],
)
def test_tensors_that_do_not_fit_the_layout_are_refused(change):
    layout = RowLayout(bits=4, columns=64, group_size=32, scale_dtype=torch.half)
    tensors = dict(codes=torch.zeros(2, 32, dtype=torch.uint8), scales=torch.zeros(2, 2).half())
    tensors |= change
    codes, scales = tensors.pop("codes"), tensors.pop("scales")
    with pytest.raises(CatsError):
        pack_rows(layout, codes, scales, **tensors)


def test_packed_rows_know_their_shape():
    layout = RowLayout(bits=4, columns=64, group_size=32, scale_dtype=torch.half)
    with pytest.raises(ShapeError, match="packed rows must be"):
        PackedRows(torch.zeros(3, layout.pitch + 1, dtype=torch.uint8), layout, 3)
    with pytest.raises(ShapeError, match="packed rows must be"):
        unpack_rows(layout, torch.zeros(3, layout.pitch + 1, dtype=torch.uint8))
