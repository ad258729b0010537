"""Tiny models of many families, unusual modules, tokenizers, and a cache of the hub."""

import hashlib

import torch
import transformers
from packaging import version
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import cats

FAMILIES = [
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    GemmaConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Phi3Config,
]
# This version of transformers changed some behaviour; the tests that use the name say which.
OLDER_TRANSFORMERS = version.parse(transformers.__version__) < version.parse("5.23")
VOCABULARY = 257  # the bytes, and the end of text
BOS = 257  # of tokenizers that begin a text with it
F = 40
SIZES = dict(
    hidden_size=16,
    intermediate_size=F,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    vocab_size=VOCABULARY,
    max_position_embeddings=512,
    pad_token_id=256,
    bos_token_id=256,
    eos_token_id=256,
)


def make_model(config=LlamaConfig, **changes):
    """A model whose gates have about unit variance, as those of real models."""
    model = AutoModelForCausalLM.from_config(config(**SIZES | changes)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
    return model


def make_ids(rows=4, length=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, length), generator=generator)


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def assert_same_tokens(model, actual, expected, mask=None, *, tie=1e-4):
    """Check that the tokens ``[B, T]`` are equal, up to a token that rounding may decide.

    Args:
        model: Gives the logits of ``expected``.
        actual: Tokens to test.
        expected: Tokens that transformers generated.
        mask: Mask of the prompt, ``[B, P]``, if it has padding.
        tie: Rounding may decide between logits whose difference is smaller.
    """
    if torch.equal(actual, expected):
        return
    assert actual.shape == expected.shape
    full = torch.ones_like(expected)
    if mask is not None:
        full[:, : mask.shape[1]] = mask
    positions = (full.cumsum(1) - 1).clamp(min=0)
    chosen = logits(model, expected, attention_mask=full, position_ids=positions)
    for row, differ in enumerate(actual != expected):
        if differ.any():
            at = int(differ.nonzero()[0])
            scores = chosen[row, at - 1]
            gap = float(scores.max() - scores[actual[row, at]])
            assert gap < tie, f"row {row} parts at {at}, where another token leads by {gap:.2e}"


def make_tokenizer(*, begins=False, merges=()):
    """A tokenizer with one token per byte, the end of text, and one token per merge.

    Args:
        begins: Whether it begins each text with ``<bos>``, whose id is ``BOS``.
        merges: Pairs of letters that become one token.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, "<eos>", *(["<bos>"] if begins else []), *map("".join, merges)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>" if begins else None
    )


class MLP(nn.Module):
    """``down(act(gate(x)) * up(x))``; subclasses change the formula."""

    def __init__(self, act=None, bias=False, size=16):
        super().__init__()
        self.gate_proj = nn.Linear(size, F, bias=bias)
        self.up_proj = nn.Linear(size, F, bias=bias)
        self.down_proj = nn.Linear(F, size, bias=bias)
        self.act_fn = act or nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ClampedMLP(MLP):
    """Clamps its inner values, as some models do; it still has the gated form."""

    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=7), self.up_proj(x).clamp(-7, 7)
        return self.down_proj(self.act_fn(gate) * up)


class ShiftedAtLargeInputsMLP(MLP):
    """Has the gated form for small inputs only."""

    def forward(self, x):
        shrunk = torch.nn.functional.softshrink(self.up_proj(x), 10.0)
        return super().forward(x) + self.down_proj(shrunk)


class TwiceMLP(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.act_fn(self.up_proj(x)))


class AdditiveMLP(MLP):
    def forward(self, x):
        return super().forward(x) + x


class UnknownActivation(nn.Module):
    def forward(self, x):
        return torch.sin(x) * x


class Body(nn.Module):
    """Embeds ids and adds the output of each MLP; tokens do not see each other."""

    def __init__(self, *mlps, size=16):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, size)
        self.layers = nn.ModuleList(mlps)

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


class Int8Tensor(torch.Tensor):
    """An int8 weight as quantisation libraries store it: with ``dequantize``, without a storage."""

    @staticmethod
    def __new__(cls, values, scale):
        # torch has no public name for it
        make = torch.Tensor._make_wrapper_subclass
        return make(cls, values.shape, dtype=scale.dtype, device=values.device)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Int8Tensor(inner["values"], inner["scale"])

    def dequantize(self):
        return self.values.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.dequantize(), *bias, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(func)


def quantize_(model):
    """Replace the weight of each linear layer of the MLPs by an int8 tensor."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".mlp." in name:
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
            values = (module.weight.detach() / scale).round().to(torch.int8)
            module.weight = nn.Parameter(Int8Tensor(values, scale), requires_grad=False)
    return model


def fill_hub_cache(folder, *, revision, subfolder="", target=None, name="org/model"):
    """Fill a cache of the hub with one revision of a model and its tokenizer, but no ``main``.

    Only this revision and subfolder are in the cache.

    Args:
        folder: The cache.
        revision: Name of the revision.
        subfolder: Subfolder within the repository.
        target: Target of its thresholds; None for a dense model.
        name: Name of the repository.

    Returns:
        The model.
    """
    model = make_model()
    if target is not None:
        cats.sparsify_(model, cats.calibrate(model, [make_ids()], target_sparsity=target))
    repository = folder / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(revision.encode()).hexdigest()
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    model.save_pretrained(repository / "snapshots" / commit / subfolder)
    make_tokenizer().save_pretrained(repository / "snapshots" / commit / subfolder)
    return model
