"""The page in docs; ``make test-families`` shows that it is what ``cats families`` writes."""

import re
from pathlib import Path

import pytest

from cats.families import PAGE

ROOT = Path(__file__).parents[2]
# What users may rely on: these work with the releases of constraints.txt.
SUPPORTED = {
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "glm", "glm4"),
    *("olmo2", "granite", "cohere2", "lfm2", "phi4_multimodal", "smollm3", "ernie4_5"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "llama4_text", "phimoe"),
}


@pytest.fixture(scope="module")
def text():
    return (ROOT / PAGE).read_text("utf-8")


def test_at_least_100_families_are_sparse_and_75_fused(text):
    sparse, fused = map(
        int, re.search(r"makes (\d+) of these sparse, and `cats.fuse_` fuses (\d+)", text).groups()
    )
    assert sparse >= 100
    assert fused >= 75


def test_no_supported_family_falls_out(text):
    assert {*re.findall(r"^\| `(\w+)` \| yes ", text, re.MULTILINE)} >= SUPPORTED
