"""Calls for ``compute-sanitizer python -m tests.ops.sanitize_cuda``: the MLP, and whole tokens.

With ``--every-lane`` each lane of a warp arrives at a barrier. racecheck needs it: it follows
arrivals lane by lane, and does not see that ``__syncwarp`` orders what the other lanes did.
"""

import sys

import torch
from transformers import Gemma3TextConfig, LlamaConfig

import cats
from cats.decode.stream import chain
from cats.decode.stream.engine import StreamEngine
from cats.ops.cuda import function
from tests.models import make_ids, make_model
from tests.ops.cases import TOLERANCE, make_inputs, reference_in_double

SHAPES = [(64, 257, torch.bfloat16, 1), (576, 600, torch.float16, 2), (1032, 300, torch.float32, 1)]


def main() -> None:
    if "--every-lane" in sys.argv:
        plain = function.compile_kernel
        function.compile_kernel = lambda name, defines, capability: plain(
            name, {**defines, "EVERY_LANE_ARRIVES": 1}, capability
        )
    for in_order in (False, True):
        torch.use_deterministic_algorithms(in_order)
        for D, F, dtype, batch in SHAPES:
            inputs = make_inputs(
                D, F, dtype=dtype, device=torch.device("cuda"), batch=batch, bias=True,
                product_sparsity=0.3,
            )  # fmt: skip
            for _ in range(2):
                out = torch.ops.cats.gated_mlp(*inputs.args(), "cuda")
            expected = reference_in_double(inputs)
            torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])
    torch.use_deterministic_algorithms(False)
    chain._BURDEN_BYTES, chain._EARLY_BYTES = 0, 1  # pace early requests, as behind large matrices
    for config in (LlamaConfig, Gemma3TextConfig):
        for dtype in (torch.float32, torch.bfloat16):
            model = make_model(config).to("cuda", dtype)
            StreamEngine(model)  # probes each layer and a token
            # the choice on the GPU; attention in a window of which most is empty
            cats.generate(model, make_ids(1, 5).cuda(), max_new_tokens=3, engine="stream")


if __name__ == "__main__":
    main()
