"""Times of steps of several rows: ``python -m tests.decode.time_stream_rows --output PATH``.

A model of the shape of Mistral-7B or Llama-3.2-1B with random weights in bfloat16. For each number
of rows the milliseconds of a greedy step of the kernels, and the share of the best read at which
the bytes of its weights came; then the time of a step module by module. Rows have different
lengths. Kernels are compared with the model before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import cats
from cats.benchmarks.timing import read_bandwidth
from cats.decode.rows.modules import ModuleRows
from cats.decode.stream.row_engine import StreamRows

SHAPES = {
    "mistral": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32768,
    ),
    "llama-1b": dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
    ),
}
_READ_BYTES = 4 * 2**30


def make_model(shape: str, layers: int | None, device: str) -> LlamaForCausalLM:
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096)
    config.num_hidden_layers = layers or config.num_hidden_layers
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def step_seconds(step, positions, *, device, repeats, steps):
    """Median seconds of a step, over several runs of some steps each."""
    lines, samples = list(range(len(positions))), []
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        for i in range(steps):
            step(lines, [position + i for position in positions])
        synchronize()
        samples.append((time.perf_counter() - start) / steps)
    return statistics.median(samples[1:])


def measure(
    model, rows, position, *, capacity, device, read_bytes=_READ_BYTES, repeats=7, steps=16
):
    """A result for each number of rows, of which the last is the largest."""
    seconds = read_bandwidth(torch.device(device), size=read_bytes, rounds=5).median
    embedding = model.get_input_embeddings().weight.nbytes
    size = sum(p.nbytes for p in model.parameters()) - embedding
    with torch.inference_mode():
        engine = StreamRows(model, rows[-1], capacity, rows=rows[-1])
        modules = ModuleRows(model, rows[-1], capacity)
        for count in rows:
            places = [position + 3 * row for row in range(count)]
            tokens = torch.zeros(count, dtype=torch.int64, device=device)

            def by_modules(lines, at, tokens=tokens):
                modules.logits(lines, at, tokens, max(at) + 1)

            often = dict(device=device, repeats=repeats, steps=steps)
            # private: without the rows of sessions
            kernels = step_seconds(engine._steps.choose, places, **often)
            eager = step_seconds(by_modules, places, **often | dict(repeats=1))
            yield {
                "rows": count,
                "ms": kernels * 1e3,
                "share": size / read_bytes * seconds / kernels,
                "ms_of_modules": eager * 1e3,
                "tokens_per_s": count / kernels,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shape", default="mistral", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--sparsity", type=float, default=0.0)
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--position", type=int, default=150)
    options = parser.parse_args()
    model = make_model(options.shape, options.layers, "cuda")
    if options.sparsity:
        ids = torch.randint(1000, (4, 64), device="cuda")
        cats.sparsify_(model, cats.calibrate(model, [ids], target_sparsity=options.sparsity))
    about = {
        "shape": options.shape,
        "layers": model.config.num_hidden_layers,
        "sparsity": options.sparsity,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("a") as file:
        for line in measure(model, options.rows, options.position, capacity=512, device="cuda"):
            print(json.dumps(about | line), file=file, flush=True)
            print(*(f"{name} {value:.4g}" for name, value in line.items()), flush=True)


if __name__ == "__main__":
    main()
