"""The kernels of several rows, compiled for every generation, and on a GPU."""

import pytest
import torch

from cats.decode.rows.modules import ModuleRows
from tests.decode.test_stream import needs_gpu, needs_nvrtc
from tests.decode.test_stream_rows_emulated import run_rows, sparse_model
from tests.models import FAMILIES, make_ids
from tests.thorough import usual

ATTENTION = dict(
    HEAD=64,
    ROTARY=32,
    QUERIES=4,
    UNSPLIT_SLOTS=256,
    SPLIT_SLOTS=64,
    MAX_SPLITS=64,
    HEAD_NORM=1,
    SOFTCAP=1,
)


@needs_nvrtc
@pytest.mark.parametrize(
    "capability", usual([(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], [(8, 0), (9, 0)])
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_compile_for_every_generation(capability, dtype):
    from cats.ops.cuda.compiler import compile_kernel
    from cats.ops.linear import rows as linear
    from cats.ops.mlp.cuda import rows as mlp

    number, limit = int(dtype is torch.float16), 99 * 1024
    sizes = dict(activation="silu", neurons=100, multiprocessors=2, shared_limit=limit)
    kernels = {
        "attention/attention_rows.cu": ATTENTION | dict(DTYPE=number, HEADS=2),
        "choice/choose_rows.cu": dict(DTYPE=2),
        "embedding/embedding_rows.cu": dict(DTYPE=number, WIDTH=256),
        "linear/linear_rows.cu": linear.macros(256, dtype, 16, shared_limit=limit),
        "mlp/cuda/mlp_rows.cu": mlp.macros(256, dtype, 4, **sizes),
        "rms_norm/norm_rows.cu": dict(DTYPE=number, WIDTH=256, WARPS=4),
    }
    for source, macros in kernels.items():
        assert compile_kernel(source, macros, capability)


@needs_gpu
@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("sampled", [False, True])
def test_rows_on_a_gpu_give_the_tokens_of_the_modules(config, sampled):
    from cats.decode.stream.row_engine import StreamRows

    sizes = dict(head_dim=64, hidden_size=64, intermediate_size=160)
    model = sparse_model(config, torch.float16, **sizes)[0].cuda()
    prompts = [make_ids(1, length, seed=i)[0] for i, length in enumerate((9, 300, 3, 40, 250))]
    options = dict(do_sample=True, temperature=0.3, seed=3) if sampled else {}
    with torch.inference_mode():
        engine = StreamRows(model, 6, 512, rows=5)
        actual = run_rows(engine, model, prompts, 12, **options)
        expected = run_rows(ModuleRows(model, 6, 512), model, prompts, 12, **options)
    # a rounding may decide between two tokens, and what follows is another text
    same = sum(a == b for a, b in zip(actual, expected, strict=True))
    assert same >= 3, (actual, expected)
