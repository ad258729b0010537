"""Records of speed: one type for each kind of number, with its fields, their types and its unit.

Fields stand in the order of the files: a base class adds those that come first.
"""

from __future__ import annotations

from typing import Annotated, Literal

from cats.results.result import (
    FOUND,
    Found,
    FoundCount,
    MayBeFound,
    ModelResult,
    Number,
    Result,
)

# Variants of an MLP that are not ours: dense baselines, and the design of the paper's kernels.
DENSE_MLPS = ("dense_eager", "dense_merged", "dense_compiled")
PAPER_MLP = "paper"
# The dense baseline over int4 codes: torch's own operator.
TORCH_INT4 = "dense_torch_int4"
# The launches of a layer in their order, and the events of a warp in the order of trace.cuh.
LAUNCHES = ("q, k, v", "attention", "output projection", "MLP")
EVENTS = ("start", "input", "last", "end")


def in_codes(bits: int | None, group_size: int | None) -> str:
    """How weights are quantised, in words that follow a name; empty where they are not."""
    if bits is None:
        return ""
    return f", int{bits}" + (f" in groups of {group_size}" if group_size else "")


class _MLP(Result):
    """Of ``cats bench mlp``, one shape.

    Attributes:
        bits: Of the quantised weights; None where they have the dtype.
        group_size: Columns that share a scale; None for a scale per row.
    """

    benchmark: Literal["mlp"] = "mlp"
    hidden_size: int
    intermediate_size: int
    dtype: str
    batch: int
    bits: int | None = None
    group_size: int | None = None


class MLPBandwidth(_MLP):
    """How fast the memory is read; ``bytes`` is the size of the read."""

    quantity: Literal["read_bandwidth"] = "read_bandwidth"
    unit: Literal["GB/s"] = "GB/s"
    bytes: FoundCount


class MLPTime(_MLP):
    """One call of an MLP.

    Attributes:
        variant: A backend, one of ``DENSE_MLPS`` (which read weights in the dtype, also where the
            others read codes), or ``TORCH_INT4``.
        neighbour: What runs between two calls: ``"none"`` or ``"rmsnorm"``.
        sparsity: The target.
        kept_share: Share of the neurons that are kept, in [0, 1].
        limit_us: Time in which the memory could deliver the bytes.
        copies: Number of sets of weights. The calls go through all, so that no cache holds them.
        calls: Number of calls in one timed pass.
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


class DecodeResult(Result):
    """Base of what ``cats bench decode`` measures: one model, prompt and number of tokens.

    Attributes:
        bits: Of the quantised weights; None where they have the dtype.
        group_size: Columns that share a scale; None for a scale per row.
        load: Processes that kept processors busy meanwhile.
    """

    benchmark: Literal["decode"] = "decode"
    model: str
    batch: int
    prompt_length: int
    new_tokens: int
    dtype: str
    bits: int | None = None
    group_size: int | None = None
    load: int = 0

    @property
    def model_and_bits(self) -> str:
        """The model, how its weights are quantised, and what else ran."""
        beside = f", beside {self.load} busy processes" if self.load else ""
        return self.model + in_codes(self.bits, self.group_size) + beside


class DecodeBandwidth(DecodeResult):
    """How fast the memory is read, in the same run."""

    quantity: Literal["read_bandwidth"] = "read_bandwidth"
    unit: Literal["GB/s"] = "GB/s"


class DecodeVariantResult(DecodeResult):
    """Base of what is measured of one way to generate (``variant``) at one target."""

    variant: str
    sparsity: float


class TokenTime(DecodeVariantResult):
    """One token after the first.

    Attributes:
        bytes: Bytes that a token reads, on average.
        limit_ms: Time in which the memory could deliver them.
        dense_ms: Time of the fastest dense loop that was timed in turns with it; None without one.
        kl: Divergence of each step from the model's modules. This and the fields below are None
            for loops that are not ours.
        kl_of_rounding: Divergence of the modules that run token by token from one pass of them.
        same_choice: Share of steps with the same likeliest token.
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
        """Of all rows of the batch together."""
        return self.rate(self.value)

    def rate(self, milliseconds: float) -> float:
        """Tokens per second of all rows, if a step takes this time."""
        return self.batch * 1e3 / milliseconds

    @property
    def speedup(self) -> float | None:
        """Over the fastest dense loop that was timed in turns with it; None without one."""
        return None if self.dense_ms is None else self.dense_ms / self.value


class FirstTokenTime(DecodeVariantResult):
    """Until the first token; ``dense_ms`` is that of the fastest dense loop of the run."""

    quantity: Literal["time_to_first_token"] = "time_to_first_token"
    unit: Literal["ms"] = "ms"
    dense_ms: MayBeFound = None


class StartUpTime(DecodeVariantResult):
    """From the first call to its third token, with the graphs that were compiled for it."""

    quantity: Literal["start_up"] = "start_up"
    unit: Literal["s"] = "s"
    compilations: FoundCount


class PeakMemory(DecodeVariantResult):
    """Of the device; ``over_dense_weights`` is the share above the dense model's weights."""

    quantity: Literal["peak_memory"] = "peak_memory"
    unit: Literal["B"] = "B"
    over_dense_weights: Found


class LaunchTime(DecodeVariantResult):
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


class Moment(ModelResult):
    """When an event of a launch happens, after the end of the layer before.

    ``value`` is that of the median warp, ``low`` of the first and ``high`` of the last one.
    """

    benchmark: Literal["timeline"] = "timeline"
    quantity: Literal["moment"] = "moment"
    unit: Literal["us"] = "us"
    sparsity: float
    context: int
    launch: str
    event: str


class SessionsResult(ModelResult):
    """Base of what ``cats bench sessions`` measures: sessions that come at random times.

    Attributes:
        engine: Of :class:`cats.Sessions`.
        sessions: How many came.
        seconds: Within how many they came.
        rows: How many decoded together at most.
        longest_wait: Seconds for which prompts may delay other sessions.
        seed: Of times and lengths.
    """

    benchmark: Literal["sessions"] = "sessions"
    sparsity: float
    engine: str
    sessions: int
    seconds: float
    rows: int
    shortest_prompt: int
    longest_prompt: int
    fewest_tokens: int
    most_tokens: int
    longest_wait: float
    seed: int


class SessionsRate(SessionsResult):
    """Tokens of all sessions, over the time in which at least one was open.

    Attributes:
        full_rate: The same where all of them were opened at once.
        share: The rate over that one.
    """

    quantity: Literal["rate"] = "rate"
    unit: Literal["tokens/s"] = "tokens/s"
    full_rate: Found
    share: Found


class SessionsWait(SessionsResult):
    """Base of the waits of many sessions: their percentiles 90 and 99, and the longest one."""

    p90: Found
    p99: Found
    longest: Found


class FirstTokenWait(SessionsWait):
    """From the call to the first token of a session; also while it waits for a line."""

    quantity: Literal["first_token"] = "first_token"
    unit: Literal["ms"] = "ms"


class TokenGap(SessionsWait):
    """Between two tokens of a session."""

    quantity: Literal["gap"] = "gap"
    unit: Literal["ms"] = "ms"


class SessionLatency(SessionsWait):
    """From the call to the last token of a session."""

    quantity: Literal["latency"] = "latency"
    unit: Literal["s"] = "s"


class _Costs(ModelResult):
    """Of ``cats bench costs``; ``weights`` is the hash of the model."""

    benchmark: Literal["costs"] = "costs"
    weights: str


class TokenCost(_Costs):
    """One token of the dense model, through ``cats.generate``."""

    quantity: Literal["token"] = "token"
    unit: Literal["ms"] = "ms"


class MaskTime(_Costs):
    """All MLPs of a model for one token, with one mask that drops a share of its entries.

    Attributes:
        mask: ``"gate"`` (its inputs), ``"rows"``, ``"columns"`` or ``"none"``.
        dropped: The share.
    """

    quantity: Literal["mlps"] = "mlps"
    unit: Literal["ms"] = "ms"
    mask: str
    dropped: float


class SeveralGPUs(Result):
    """Tokens per second of one piece of work on one or more GPUs of one machine.

    Attributes:
        task: The step of ``benchmarks/several_gpus.py``.
        variant: How the work was shared.
        gpus: How many GPUs worked.
        same_as_one: Whether the result is that of one GPU, bit for bit.
        difference: Largest relative difference from one GPU.
    """

    benchmark: Literal["several_gpus"] = "several_gpus"
    quantity: Literal["rate"] = "rate"
    unit: Literal["tokens/s"] = "tokens/s"
    task: str
    variant: str
    gpus: int
    same_as_one: Annotated[bool | None, FOUND] = None
    difference: MayBeFound = None
