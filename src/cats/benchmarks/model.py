"""``cats bench model``: prefill and ``model.generate`` of a whole model, dense, sparse and fused.

Random weights of real shapes, thresholds calibrated on the model's own activations.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cats.apply import densify_, sparsify_
from cats.benchmarks.timing import Timing
from cats.calibration import calibrate
from cats.config import CatsConfig
from cats.errors import ConfigError
from cats.fusion import fuse_
from cats.results import Result, environment

NAME = "model"
_LLAMA_2_7B = dict(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096,
)  # fmt: skip
SHAPES: dict[str, dict[str, int]] = {
    "mistral-7b": _LLAMA_2_7B | dict(intermediate_size=14336, num_key_value_heads=8),
    "llama-2-7b": _LLAMA_2_7B,
    "llama-3.2-1b": dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
    ),
    "smollm2-135m": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, max_position_embeddings=8192,
    ),
}  # fmt: skip
VARIANTS = ("dense", "sparse", "fused")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is timed: ``layers`` of the shape's layers, a prompt's prefill, ``new_tokens`` tokens.

    ``caches`` are those of ``generate``: ``"dynamic"`` runs eagerly, ``"static"`` is compiled by
    transformers on a GPU.
    """

    shape: str = "mistral-7b"
    layers: int | None = None
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    sparsity: float = 0.5
    prefill: int = 2048
    new_tokens: int = 128
    caches: tuple[str, ...] = ("dynamic", "static")
    rounds: int = 5

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ConfigError(f"shape must be one of {', '.join(SHAPES)}; got {self.shape!r}")
        if self.rounds < 2 or self.new_tokens < 2 or self.prefill < 1:
            raise ConfigError("rounds and new tokens must be at least 2, prefill at least 1")


def measure(case: Case) -> Iterator[Result]:
    """Time each variant of one model.

    Yields milliseconds of the prefill, and tokens a second of decoding after the first token.
    """
    model = random_model(case)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (4, 512), device=case.device)
    config = calibrate(model, ids.split(1), target_sparsity=case.sparsity)
    where = environment(case.device)

    def result(quantity: str, unit: str, timing: Timing, **settings: str) -> Result:
        return Result(
            benchmark=NAME, quantity=quantity, unit=unit, value=timing.median, low=timing.low,
            high=timing.high, samples=timing.samples,
            settings={
                "shape": case.shape, "layers": model.config.num_hidden_layers,
                "dtype": str(case.dtype).removeprefix("torch."), "sparsity": case.sparsity,
                "prefill": case.prefill, "new_tokens": case.new_tokens, **settings,
            },
            environment=where,
        )  # fmt: skip

    prompt = torch.randint(vocabulary, (1, case.prefill), device=case.device)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    # in turns, so that all meet the same machine; the first round warms up
    for i in range(case.rounds + 1):
        for name in VARIANTS:
            _become(model, name, config)
            for _ in range(2):  # the first call after a change allocates
                took = _seconds(lambda: model(prompt, use_cache=False, logits_to_keep=1))
            if i:
                seconds[name].append(took)
    for name in VARIANTS:
        timing = Timing.of([1e3 * s for s in seconds[name]])
        yield result("prefill", "ms", timing, variant=name)
    for cache in case.caches:
        for name in VARIANTS:
            torch.compiler.reset()
            _become(model, name, config)
            rates = _decode_rates(model, ids[:1, :32], case, cache)
            yield result("decode", "tokens/s", Timing.of(rates), variant=name, cache=cache)


def random_model(case: Case) -> Any:
    """A Llama model of the case's shape with random weights of standard deviation 0.02."""
    import transformers

    shape = dict(SHAPES[case.shape])
    shape["num_hidden_layers"] = case.layers or shape["num_hidden_layers"]
    library: Any = transformers
    with torch.device(case.device):
        model = library.AutoModelForCausalLM.from_config(
            library.LlamaConfig(**shape), dtype=case.dtype
        )
    return model.eval()


def _become(model: nn.Module, variant: str, config: CatsConfig) -> None:
    densify_(model)
    if variant != "dense":
        sparsify_(model, config)
    if variant == "fused":
        fuse_(model)


def _decode_rates(model: Any, prompt: Tensor, case: Case, cache: str) -> list[float]:
    def generate(tokens: int) -> Callable[[], object]:
        return lambda: model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
            max_new_tokens=tokens, min_new_tokens=tokens, cache_implementation=cache,
        )  # fmt: skip

    for _ in range(2):
        _seconds(generate(case.new_tokens))
    first = statistics.median(_seconds(generate(1)) for _ in range(case.rounds))
    return [
        (case.new_tokens - 1) / (_seconds(generate(case.new_tokens)) - first)
        for _ in range(case.rounds)
    ]


def _seconds(run: Callable[[], object]) -> float:
    with torch.no_grad():
        _synchronize()
        start = time.perf_counter()
        run()
        _synchronize()
        return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
