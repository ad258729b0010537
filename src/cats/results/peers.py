"""Records of ``cats bench peer``: our decode loop and llama.cpp on one GGUF file."""

from __future__ import annotations

from typing import Literal

from cats.results.result import Found, MayBeFound, Result

# The programs that generate: ours, llama.cpp through a package, and its own benchmark program.
OWN, PEER, PEER_BENCH = "cats", "cyllama", "llama-bench"


class PeerResult(Result):
    """Base of what is measured of one file, load and number of threads.

    Attributes:
        model: Name of the model.
        kind: How most of its matrices are stored, such as ``"Q4_0"``.
        threads: Of each program.
        load: Processes that keep processors busy meanwhile.
    """

    benchmark: Literal["peer"] = "peer"
    model: str
    kind: str
    threads: int
    load: int


class PeerBandwidth(PeerResult):
    """How fast the memory is read by as many threads, in the same run; the fastest of some ways."""

    quantity: Literal["read_bandwidth"] = "read_bandwidth"
    unit: Literal["GB/s"] = "GB/s"


class PeerProgramResult(PeerResult):
    """Base of what one program takes.

    Attributes:
        program: One of :data:`OWN`, :data:`PEER` and :data:`PEER_BENCH`.
        release: Of the program.
        variant: Our engine; empty for others.
        sparsity: The target; 0 for dense.
        prompt_length: Tokens of the prompt.
    """

    program: str
    release: str
    variant: str
    sparsity: float
    prompt_length: int


class PeerTokenTime(PeerProgramResult):
    """One token after the first.

    Attributes:
        bytes: Of the weights and the cache that a token reads, on average, as the file stores them;
            0 where it was not counted.
        limit_ms: Time in which the memory could deliver them.
        peer_ms: Median of llama.cpp through the package, in turns with it; None where it did not
            run.
        dense_ms: Median of our dense loop, in turns with it; None where it did not run.
        agreed: Share of the new tokens before the first that is another one than llama.cpp's, of
            our dense loop.
    """

    quantity: Literal["time"] = "time"
    unit: Literal["ms"] = "ms"
    new_tokens: int
    bytes: Found
    limit_ms: Found
    peer_ms: MayBeFound = None
    dense_ms: MayBeFound = None
    agreed: MayBeFound = None

    @property
    def tokens_per_second(self) -> float:
        return 1e3 / self.value

    @property
    def over_peer(self) -> float | None:
        """Speed over llama.cpp's."""
        return None if self.peer_ms is None else self.peer_ms / self.value

    @property
    def over_dense(self) -> float | None:
        """Speed over our dense loop's."""
        return None if self.dense_ms is None else self.dense_ms / self.value


class PeerPrefillTime(PeerProgramResult):
    """Until the first token of a prompt; ``peer_ms`` is llama.cpp's, in turns with it."""

    quantity: Literal["prefill"] = "prefill"
    unit: Literal["ms"] = "ms"
    peer_ms: MayBeFound = None


class PeerMemory(PeerProgramResult):
    """In memory after a generation, above what the interpreter with its libraries had before.

    Attributes:
        file_bytes: Size of the file.
    """

    quantity: Literal["resident"] = "resident"
    unit: Literal["B"] = "B"
    file_bytes: Found
