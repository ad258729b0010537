"""Benchmarks: correctness first, the memory limit measured in the same run."""
