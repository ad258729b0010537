"""A tiny model that says a text which a test chose."""

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

import cats
from tests.models import make_ids, make_model

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_WIDTH = 64


def pieces_of(text):
    """The text in pieces of which none comes twice."""
    pieces, start = [], 0
    while start < len(text):
        end = start + 2
        # a last letter alone would be one of the ordinary tokens
        while end < len(text) and (text[start:end] in pieces or end == len(text) - 1):
            end += 1
        pieces.append(text[start:end])
        start = end
    assert len(set(pieces)) == len(pieces), f"the end of {text!r} repeats a piece of it"
    return pieces


def make_scripted(text, *, repeats=False, sparsity=None, template=TEMPLATE, **config):
    """A model that answers every prompt of the template with the same text.

    Args:
        text: What it says. Whatever token it reads chooses the next one alone, so that the tokens
            of the text are tokens of their own.
        repeats: Say it again and again, instead of ending.
        sparsity: Of its MLPs, which add almost nothing; None for a dense model.
        template: Chat template; has to end with ``:``.
        **config: Changes of the configuration.

    Returns:
        The model and its tokenizer.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [byte_level.pre_tokenize_str(piece)[0][0] for piece in pieces_of(text)]
    vocabulary = {word: i for i, word in enumerate([*alphabet, "<eos>", *words])}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = template

    sizes = dict(hidden_size=_WIDTH, head_dim=32, max_position_embeddings=2048)
    model = make_model(vocab_size=len(vocabulary), **sizes | config)
    end, first = len(alphabet), len(alphabet) + 1
    last = first + len(words) - 1
    following = torch.full((len(vocabulary),), end)
    following[vocabulary[":"]] = first
    following[first:last] = torch.arange(first, last) + 1
    if repeats:
        following[last] = first
    with torch.no_grad():
        # each token's vector goes to the end almost unchanged, and the head looks the next one up
        vectors = torch.nn.functional.normalize(torch.randn(len(vocabulary), _WIDTH))
        model.model.embed_tokens.weight.copy_(vectors)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-4)
            layer.mlp.down_proj.weight.mul_(1e-4)
        model.lm_head.weight.zero_()
        for token, after in enumerate(following.tolist()):
            if token >= first or token == vocabulary[":"]:
                model.lm_head.weight[after] += 8 * vectors[token]
    if sparsity is not None:
        model = cats.sparsify_(model, cats.calibrate(model, [make_ids()], target_sparsity=sparsity))
    return model, fast
