"""The kernels under compute-sanitizer: ``python -m tests.ops.sanitize_cuda TOOL``.

Runs itself under the tool, with calls of the MLP and whole tokens. For racecheck, every lane of
a warp arrives at a barrier: the tool follows arrivals lane by lane, and does not see that
``__syncwarp`` orders the work of the other lanes.
"""

import subprocess
import sys
from pathlib import Path

import torch
from transformers import Gemma3TextConfig, LlamaConfig

import cats
from cats.decode.stream.engine import StreamEngine
from cats.decode.stream.row_engine import StreamRows
from cats.ops.cuda import function
from cats.ops.linear import cuda as linear
from cats.ops.linear import quantised as quantised_linear
from cats.ops.mlp.cuda import quantised as quantised_mlp
from tests.models import make_ids, make_model
from tests.ops.cases import TOLERANCE, make_inputs, reference_in_double
from tests.quantised import quantise_

# Only our kernels: libraries of torch wait in ways that synccheck reports as errors.
KERNELS = [
    "gated_mlp",
    "embedding",
    "linear",
    "attention",
    "choose",
    "quantised",
    "quantised_mlp",
    "attention_rows",
    "choose_rows",
    "embedding_rows",
    "linear_rows",
    "mlp_rows",
    "norm_rows",
]
_OURS = [option for name in KERNELS for option in ("--kernel-name", f"kne={name}")]
OPTIONS = {
    # cuda-bindings looks for functions that the driver may not have, which are errors of the API
    "memcheck": ["--report-api-errors", "no"],
    # all kernels: with a filter, the tool ends with an error of its own at the first other kernel
    "racecheck": [],
    # nvcc notes the number of barriers in a module, NVRTC does not; with too few, launches fail
    "synccheck": [*_OURS, "--num-cuda-barriers", "65536"],
}
SHAPES = [(64, 257, torch.bfloat16, 1), (576, 600, torch.float16, 2), (1032, 300, torch.float32, 1)]
# Config, dtype, and how the linear layers are quantised: kind and group size, or None.
MODELS = [
    (LlamaConfig, torch.float32, None),
    (LlamaConfig, torch.bfloat16, None),
    (Gemma3TextConfig, torch.float32, None),
    (Gemma3TextConfig, torch.bfloat16, None),
    (LlamaConfig, torch.bfloat16, ("int4", 32)),
    (LlamaConfig, torch.bfloat16, ("int8 rows", None)),
    (LlamaConfig, torch.float16, ("int4 zeros", 64)),
    (Gemma3TextConfig, torch.float32, ("int4 shifts", 32)),
]
# Those whose tokens run as rows.
ROWS = [(LlamaConfig, torch.bfloat16), (Gemma3TextConfig, torch.float16)]


def make_case(config, dtype, quantised):
    """One of :data:`MODELS`, on the CPU."""
    if quantised is None:
        return make_model(config).to(dtype)
    kind, group_size = quantised
    model = make_model(config, hidden_size=64, intermediate_size=160).to(dtype)
    return quantise_(model, kind, group_size=group_size)


def sanitize(tool: str) -> subprocess.CompletedProcess[str]:
    """Run the calls under a tool; its status is not 0 where it finds something."""
    sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "7", *OPTIONS[tool]]
    return subprocess.run(
        [*sanitizer, sys.executable, "-m", __spec__.name, "--calls", tool],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[2],
    )


def calls(every_lane: bool) -> None:
    if every_lane:
        compile_kernel = function.compile_kernel
        function.compile_kernel = lambda name, defines, capability: compile_kernel(
            name, {**defines, "EVERY_LANE_ARRIVES": 1}, capability
        )
    for in_order in (False, True):
        torch.use_deterministic_algorithms(in_order)
        for D, F, dtype, batch in SHAPES:
            options = dict(batch=batch, bias=True, product_sparsity=0.3)
            inputs = make_inputs(D, F, dtype=dtype, device=torch.device("cuda"), **options)
            for _ in range(2):
                out = torch.ops.cats.gated_mlp(*inputs.args(), "cuda")
            expected = reference_in_double(inputs)
            torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(False)  # racecheck reports hazards inside it
    # few early requests, as for long rows; private, since only tests change it
    for module in (linear, quantised_linear, quantised_mlp):
        module._EARLY_BYTES = 128
    for case in MODELS:
        model = make_case(*case).cuda()
        StreamEngine(model)  # probes each layer and a token
        # the choice on the GPU; attention in a window of which most is empty
        cats.generate(model, make_ids(1, 5).cuda(), max_new_tokens=3, engine="stream")
        cats.release(model)
    for config, dtype in ROWS:
        model = make_model(config, hidden_size=64, intermediate_size=160, head_dim=64)
        with torch.inference_mode():
            # compares steps of 1, 2 and 3 rows of different lengths with the model's own
            engine = StreamRows(model.to(dtype).cuda(), 4, 512, rows=3)
            engine._steps.choose([0, 1, 2], [0, 5, 9])  # private: no row has run a prompt


if __name__ == "__main__":
    if "--calls" in sys.argv:
        calls(every_lane=sys.argv[-1] == "racecheck")
    else:
        run = sanitize(sys.argv[-1])
        print(run.stdout, end="")
        sys.exit(run.returncode)
