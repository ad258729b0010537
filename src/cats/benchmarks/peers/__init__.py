"""Our decode loop beside llama.cpp's, on one GGUF file, in turns."""

from cats.benchmarks.peers.measure import Case, measure

__all__ = ["Case", "measure"]
