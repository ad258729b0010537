"""Records of speed: one type for each kind of number, with its fields, their types and its unit."""

from __future__ import annotations

from typing import Annotated, Literal

from cats.results.result import FOUND, Found, FoundCount, MayBeFound, Number, Result

# Of an MLP: what is not ours, and the kernels that the authors of CATS published.
DENSE_MLPS = ("dense_eager", "dense_merged", "dense_compiled")
PAPER_MLP = "paper"
# Of a layer: its launches in their order, and what is traced of a warp, in the order of trace.cuh.
LAUNCHES = ("q, k, v", "attention", "output projection", "MLP")
EVENTS = ("start", "input", "last", "end")


class _MLP(Result):
    """Of ``cats bench mlp``, one shape."""

    benchmark: Literal["mlp"] = "mlp"
    hidden_size: int
    intermediate_size: int
    dtype: str
    batch: int


class MLPBandwidth(_MLP):
    """How fast the memory is read; ``bytes`` is the size of the read."""

    quantity: Literal["read_bandwidth"] = "read_bandwidth"
    unit: Literal["GB/s"] = "GB/s"
    bytes: FoundCount


class MLPTime(_MLP):
    """One call of an MLP.

    Attributes:
        variant: A backend, or one of ``DENSE_MLPS``.
        neighbour: What runs between two calls: ``"none"`` or ``"rmsnorm"``.
        sparsity: The target.
        kept_share: Of the neurons, in [0, 1].
        limit_us: Time in which the memory could deliver the bytes.
        copies: Sets of weights that the calls go through, so that no cache holds them.
        calls: In one timed pass.
    """

    quantity: Literal["time"] = "time"
    unit: Literal["us"] = "us"
    variant: str
    neighbour: str
    sparsity: float
    kept_share: Found
    limit_us: Found
    copies: FoundCount
    calls: FoundCount

    @property
    def limit(self) -> float:
        return self.limit_us


class _Decode(Result):
    """Of ``cats bench decode``: one model, prompt and number of tokens."""

    benchmark: Literal["decode"] = "decode"
    model: str
    batch: int
    prompt_length: int
    new_tokens: int
    dtype: str


class DecodeBandwidth(_Decode):
    """How fast the memory is read, in the same run."""

    quantity: Literal["read_bandwidth"] = "read_bandwidth"
    unit: Literal["GB/s"] = "GB/s"


class _DecodeVariant(_Decode):
    """One way to generate (``variant``) at one target."""

    variant: str
    sparsity: float


class TokenTime(_DecodeVariant):
    """One token after the first.

    Attributes:
        bytes: That a token reads, on average.
        limit_ms: Time in which the memory could deliver them.
        dense_ms: Of the fastest dense loop that was timed in turns; None where there was none.
        kl: Divergence of each step from the model's modules; the four from here on are of our own
            loop alone.
        kl_of_rounding: Divergence of the modules a token at a time from the modules at once.
        same_choice: Share of equal choices.
        sparsity_error: Sparsity above that of the modules.
    """

    quantity: Literal["time"] = "time"
    unit: Literal["ms"] = "ms"
    realized_sparsity: Found
    bytes: Found
    limit_ms: Found
    dense_ms: MayBeFound = None
    kl: MayBeFound = None
    kl_of_rounding: MayBeFound = None
    same_choice: MayBeFound = None
    sparsity_error: MayBeFound = None

    @property
    def limit(self) -> float:
        return self.limit_ms

    @property
    def tokens_per_second(self) -> float:
        """Of all rows of the batch."""
        return self.rate(self.value)

    def rate(self, milliseconds: float) -> float:
        """Tokens per second of all rows, where a step takes so long."""
        return self.batch * 1e3 / milliseconds

    @property
    def speedup(self) -> float | None:
        """Over the fastest dense loop that was timed in turns with it, in one run."""
        return None if self.dense_ms is None else self.dense_ms / self.value


class FirstTokenTime(_DecodeVariant):
    """Until the first token; ``dense_ms`` is that of the fastest dense loop of the run."""

    quantity: Literal["time_to_first_token"] = "time_to_first_token"
    unit: Literal["ms"] = "ms"
    dense_ms: MayBeFound = None


class StartUpTime(_DecodeVariant):
    """From the first call to its third token, with the graphs that were compiled for it."""

    quantity: Literal["start_up"] = "start_up"
    unit: Literal["s"] = "s"
    compilations: FoundCount


class PeakMemory(_DecodeVariant):
    """Of the device; ``over_dense_weights`` is the share above the dense model's weights."""

    quantity: Literal["peak_memory"] = "peak_memory"
    unit: Literal["B"] = "B"
    over_dense_weights: Found


class LaunchTime(_DecodeVariant):
    """All calls of one kernel in a step: their number and their share of the step's time."""

    quantity: Literal["launch"] = "launch"
    unit: Literal["us"] = "us"
    kernel: str
    calls: Annotated[Number, FOUND]
    share: Found


class _Model(Result):
    """Of ``cats bench model``; ``prefill`` is the length of the prompt."""

    benchmark: Literal["model"] = "model"
    shape: str
    layers: int
    dtype: str
    sparsity: float
    prefill: int
    new_tokens: int
    variant: str


class PrefillTime(_Model):
    """One pass over the prompt."""

    quantity: Literal["prefill"] = "prefill"
    unit: Literal["ms"] = "ms"


class GenerateRate(_Model):
    """Tokens per second of ``model.generate`` after the first one, with this cache."""

    quantity: Literal["decode"] = "decode"
    unit: Literal["tokens/s"] = "tokens/s"
    cache: str


class Moment(Result):
    """When an event of a launch happens: the median warp, the first (``low``) and the last
    (``high``), after the end of the layer before."""

    benchmark: Literal["timeline"] = "timeline"
    quantity: Literal["moment"] = "moment"
    unit: Literal["us"] = "us"
    model: str
    dtype: str
    sparsity: float
    context: int
    launch: str
    event: str
