"""What ``cats bench decode`` is asked to time."""

from __future__ import annotations

from dataclasses import dataclass

from cats.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is timed.

    Attributes:
        model: Name of the model in the results.
        sparsities: Targets of CATS; 0 is the dense model.
        engines: Engines of the decode loop.
        batch: Number of prompts.
        prompt_length: Tokens of each prompt.
        new_tokens: Tokens that are generated; those after the first are timed.
        rounds: How often the loop runs with each engine, in turns with all others.
        generate_rounds: How often transformers' ``generate`` runs, which takes longer.
        read_bytes: Size of the read that gives the memory limit.
        generate: Whether transformers' ``generate`` is timed, on the same models.
        generate_compiled: Whether it is timed with a static cache and compilation too.
        bits: Of the weights: 4 or 8, rounded to nearest; None for 16 or 32.
        group_size: Columns that share a scale; None for a scale per row.
        torch_int4: Whether torch's own int4 operator is timed too, in the engine ``compiled``.
        launches: Whether the kernels of a step are listed, from a run of their own; on a GPU.
        load: Processes that keep processors busy meanwhile; the caller runs them.
    """

    model: str
    sparsities: tuple[float, ...] = (0.0, 0.5, 0.7)
    engines: tuple[str, ...] = ("auto",)
    batch: int = 1
    prompt_length: int = 32
    new_tokens: int = 128
    rounds: int = 5
    generate_rounds: int = 2
    read_bytes: int = 4 * 2**30
    generate: bool = True
    generate_compiled: bool = False
    bits: int | None = None
    group_size: int | None = None
    torch_int4: bool = False
    launches: bool = False
    load: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.prompt_length < 1 or self.new_tokens < 3:
            raise ConfigError("expected batch and prompt >= 1, and new tokens >= 3")
        if self.bits not in (None, 4, 8):
            raise ConfigError(f"bits must be 4 or 8, got {self.bits}")
        if self.torch_int4 and self.bits != 4:
            raise ConfigError("torch's int4 operator is timed with bits = 4 only")
        if self.rounds < 2 or self.generate_rounds < 2:
            raise ConfigError("expected at least 2 rounds")
        if not self.sparsities or not all(0 <= s < 1 for s in self.sparsities):
            raise ConfigError(f"sparsities must lie in [0, 1), got {list(self.sparsities)}")
