"""What cats can do with one family, tried on a tiny model of it."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cats.apply import sparsify_
from cats.calibration import collect
from cats.config import CatsConfig
from cats.decode import Sessions, generate, release
from cats.decode.stream.spec import read_spec
from cats.errors import CatsError, UnsupportedModelError
from cats.families.masked import Gates, masked
from cats.families.tiny import VOCABULARY, tiny_model
from cats.fusion import fuse_, fused_mlps
from cats.model import RoutedExperts
from cats.quantisation import quantise_

YES = "yes"
# Largest relative difference of logits between two orders of the same sums in float32.
_TOLERANCE = 1e-3
_NEW_TOKENS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What works for a family; each field but the first two is ``"yes"``, a detail, or why not.

    Attributes:
        model_type: Its name in transformers.
        gates: How many gates a forward pass of the tiny model has, found in its operators.
        sparsify: Whether ``cats.sparsify_`` gives what a masked forward pass of the plain model
            gives, with a threshold for every gate.
        fuse: Whether ``cats.fuse_`` does; how many MLPs it takes where it leaves some.
        engine: How ``cats.generate`` runs a step, once it has given the tokens of transformers.
        stream: Whether the engine ``stream`` can say the model in its form.
        quantised: Whether the model in 8 bits is made sparse, and gives what its masked forward
            pass gives.
        rows: Whether sessions of several lengths decode together.
    """

    model_type: str
    gates: int = 0
    sparsify: str = ""
    fuse: str = ""
    engine: str = ""
    stream: str = ""
    quantised: str = ""
    rows: str = ""

    @property
    def is_gated(self) -> bool:
        return self.gates > 0

    @property
    def is_sparse(self) -> bool:
        return self.sparsify.startswith(YES)

    @property
    def is_fused(self) -> bool:
        return self.fuse.startswith(YES)


def check_family(model_type: str) -> Family:
    """Try everything on a tiny model with random weights; takes a few seconds.

    Raises:
        AssertionError: If a sparse or fused model computes something else than the masked forward
            pass of the plain model, or ``cats.generate`` other tokens than transformers.
    """
    with warnings.catch_warnings():
        # that a tiny model cannot be traced, or that a text is short, is part of the answer
        warnings.simplefilter("ignore")
        return _check(model_type)


def _check(model_type: str) -> Family:
    try:
        model = tiny_model(model_type)
        gates = _gates(model)
    except UnsupportedModelError as error:
        return Family(model_type=model_type, sparsify=str(error))
    if not gates:
        return Family(model_type=model_type, sparsify="it has no gate")
    try:
        config, silent = _calibrate(model)
    except CatsError as error:
        return Family(model_type=model_type, gates=len(gates), sparsify=_short(error))
    if missed := len(gates - _covered(model, config)):
        return Family(
            model_type=model_type,
            gates=len(gates),
            sparsify=f"{missed} of {len(gates)} gates would stay dense",
        )
    expected = _masked_logits(model, config)
    sparse = sparsify_(copy.deepcopy(model), config)
    _assert_close(_logits(sparse), expected, f"the sparse {model_type}")
    return Family(
        model_type=model_type,
        gates=len(gates),
        sparsify=f"{YES}, but leave out {silent}, which does not run on text" if silent else YES,
        fuse=_said(lambda: _fuse(sparse, expected, model_type)),
        engine=_said(lambda: _generate(sparse, model_type)),
        stream=_said(lambda: _stream(sparse)),
        quantised=_said(lambda: _quantised(model_type)),
        rows=_said(lambda: _rows(sparse)),
    )


def _said(attempt: Callable[[], str]) -> str:
    try:
        return attempt()
    except (CatsError, AttributeError) as error:
        return _short(error)


def _fuse(sparse: nn.Module, expected: Tensor, model_type: str) -> str:
    fused = fuse_(copy.deepcopy(sparse))
    _assert_close(_logits(fused), expected, f"the fused {model_type}")
    left = sum(isinstance(module, RoutedExperts) for module in fused.modules())
    count = sum(1 for _ in fused_mlps(fused))
    return YES if not left else f"{YES}, {count} of {count + left} modules: not the stacked experts"


def _generate(sparse: Any, model_type: str) -> str:
    ids = _ids(1, 7)
    options: dict[str, Any] = dict(
        do_sample=False, max_new_tokens=_NEW_TOKENS, eos_token_id=None, pad_token_id=0
    )
    mask = torch.ones_like(ids)
    try:
        expected = sparse.generate(ids, attention_mask=mask, **options)
    except Exception as error:  # the code of a family may raise anything
        return f"transformers cannot generate with it ({type(error).__name__})"
    reasons: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = generate(sparse, ids, attention_mask=mask, **options)
        reasons = [str(w.message) for w in caught if "module by module" in str(w.message)]
    release(sparse)
    if not torch.equal(actual, expected):
        _assert_tie(sparse, actual, expected, model_type)
    return "module by module" if reasons else "traced"


def _assert_tie(sparse: nn.Module, actual: Tensor, expected: Tensor, model_type: str) -> None:
    """The first other token must be one that rounding may decide about."""
    at = int((actual != expected)[0].nonzero()[0])
    with torch.no_grad():
        scores = sparse(input_ids=expected[:, :at]).logits[0, -1]
    gap = float(scores.max() - scores[actual[0, at]])
    if gap > _TOLERANCE * float(scores.abs().max()):
        raise AssertionError(f"cats.generate gives other tokens for {model_type} (by {gap:.2g})")


def _stream(sparse: nn.Module) -> str:
    read_spec(copy.deepcopy(sparse).to(torch.bfloat16))
    return YES


def _quantised(model_type: str) -> str:
    model = quantise_(tiny_model(model_type), bits=8)
    config, _ = _calibrate(model)
    expected = _masked_logits(model, config)
    _assert_close(_logits(sparsify_(model, config)), expected, f"the quantised {model_type}")
    return YES


def _rows(sparse: nn.Module) -> str:
    with Sessions(sparse, rows=3, context=48) as sessions:
        refusal = sessions.refusal
    release(sparse)
    return YES if refusal is None else f"one by one: {refusal}"


def _calibrate(model: nn.Module) -> tuple[CatsConfig, str]:
    """Thresholds, and the part of the model that has to be left out, such as a vision tower."""
    statistics = collect(model, [_ids(8, 24)])
    silent = [name for name, counts in statistics.counts.items() if not counts.any()]
    if silent:
        statistics = collect(model, [_ids(8, 24)], exclude=silent)
    part = os.path.commonpath([name.replace(".", "/") for name in silent]) if silent else ""
    return statistics.config(0.5), part.replace("/", ".")


def _gates(model: nn.Module) -> set[int]:
    try:
        with Gates() as gates:
            _logits(model)
    except Exception as error:  # the code of a family may raise anything
        raise UnsupportedModelError(
            f"transformers cannot run a tiny model ({type(error).__name__}: {_line(error)})"
        ) from error
    return gates.found


def _covered(model: nn.Module, config: CatsConfig) -> set[int]:
    with masked(model, config.thresholds) as covered, Gates():
        _logits(model)
    return covered


def _masked_logits(model: nn.Module, config: CatsConfig) -> Tensor:
    with masked(model, config.thresholds):
        return _logits(model)


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=_ids(2, 9, seed=1), use_cache=False).logits
    return logits


def _assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    error = float((actual - expected).abs().max() / expected.abs().max())
    if not error <= _TOLERANCE:
        raise AssertionError(
            f"{what} differs from the masked forward pass of the plain model by {error:.2g}"
        )


def _ids(rows: int, length: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def _short(error: Exception) -> str:
    """The reason of a refusal, without the advice that follows it."""
    return _line(error).partition("; leave it out with")[0]


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
