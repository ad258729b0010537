"""What is kept of a model between calls: its engine, by the model as it is now."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cats.decode.engines import AutoEngine, make_engine
from cats.decode.forward import arguments_of, cache_argument, prefill
from cats.decode.marks import Marks
from cats.decode.rotary import LengthRule, frequencies_of_one_text, runs_again_at
from cats.decode.state import State, device_of
from cats.decode.tracing import (
    copy_to_probe,
    exclusion,
    first_line,
    relative_difference,
    stored_names,
)
from cats.errors import CatsError, UnsupportedModelError

# Tokens of the text by which a model's use of its cache is checked, and how many such texts.
_CHECKED_TOKENS, _CHECKED_TEXTS = 6, 3
# Largest difference of logits, as a share of these. Rounding gives less; a model that keeps
# something else than keys and values gives far more.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 5e-3}
_TOLERANCE_OF_16_BITS = 0.15


class Runner:
    """An engine for one model as it is now; all decoders of the model share it.

    Attributes:
        engine: Runs prompts and steps.
        marks: Of the model when this was made.
        rule: How its rotary frequencies depend on the length; None where they do not.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        """
        Raises:
            UnsupportedModelError: If the model cannot be decoded from cached keys and values.
            BackendError: If the engine cannot run the model.
        """
        config: Any = model.config
        self._config = config.get_text_config(decoder=True)
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{type(model).__name__} has an encoder, and the decode loop runs decoders alone: "
                "use model.generate"
            )
        self._cache_name = cache_argument(model)
        self.rule = LengthRule.of(self._config)
        self._runs_again: bool | None = None
        self._alone = threading.RLock()
        self._checked: set[frozenset[str]] = set()
        copied = copy_to_probe(model)
        before = Marks.of(copied)
        with torch.inference_mode():
            check_cache(copied, self._config)
        # What a pass itself stores in the modules is no change that a user has made.
        self._volatile = before.changed(Marks.of(copied))
        self.engine = make_engine(name, model, stored_names(self._volatile, copied))
        # an engine may lay out weights anew
        self.marks = self.marks_of(model)

    def marks_of(self, model: nn.Module) -> Marks:
        """The marks of the model now, but for what a forward pass itself stores in its modules."""
        return Marks.of(model).without(self._volatile)

    def name_for(self, batch: int) -> str:
        """Name of the engine that runs so many rows without padding."""
        return (
            self.engine.name_for(batch) if isinstance(self.engine, AutoEngine) else self.engine.name
        )

    @contextmanager
    def running(self, model: nn.Module, state: State) -> Iterator[None]:
        """Hold this while the engine runs a prompt or a step of a conversation."""
        with exclusion.running():
            if self.rule is None:
                yield
                return
            # a pass writes the frequencies of its length into the model
            with self._alone:
                if self.rule.kind == "longrope":
                    yield
                    return
                with frequencies_of_one_text(model, state.rotary) as stored:
                    yield
                state.rotary = stored

    def check_extras(
        self, model: nn.Module, ids: Tensor, mask: Tensor, extras: Mapping[str, Any]
    ) -> None:
        """Once for each kind of inputs beside ids and mask: decoding with them is right.

        Raises:
            UnsupportedModelError: If it is not.
        """
        names = frozenset(extras)
        if not extras or names in self._checked:
            return
        with exclusion.tracing(), torch.inference_mode():
            copied = copy_to_probe(model)
            difference = _checked_difference(copied, self._config, ids, mask, extras)
        if not difference <= _tolerance(model):
            raise UnsupportedModelError(
                f"decoding {type(model).__name__} with {', '.join(sorted(names))} differs from one "
                f"pass over the same tokens by {difference:.1%}: use model.generate"
            )
        self._checked.add(names)

    def frequencies(self, length: int) -> int | None:
        """Which rotary frequencies a pass over so many tokens uses; see :class:`LengthRule`."""
        return 0 if self.rule is None else self.rule.range_of(length)

    def runs_again_at(self, model: nn.Module, length: int) -> bool:
        """Whether the whole text must run again where it has this length, as in transformers."""
        if self.rule is None or length != self.rule.original + 1:
            return False
        if self._runs_again is None:
            self._runs_again = runs_again_at(model, length, self._cache_name)
        return self._runs_again


# By engine and by what a thread sets around its calls. A runner holds weights, not the model, so
# that an entry goes when its model goes.
_RUNNERS: WeakKeyDictionary[nn.Module, dict[Hashable, Runner]] = WeakKeyDictionary()
_LOCK = threading.Lock()


def runner_of(model: nn.Module, name: str) -> tuple[Runner, Marks]:
    """The runner for a model as it is now, and the marks of the model.

    Args:
        model: A Hugging Face causal model.
        name: Of the engine.
    """
    device = device_of(model).type
    cast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    key = name, cast if cast[0] else None
    with _LOCK:
        runners = _RUNNERS.setdefault(model, {})
    found = _current(runners, key, model)
    if found is None:
        # weights that are laid out anew must not become tensors of inference mode
        with exclusion.tracing(), torch.inference_mode(False), torch.no_grad():
            # another thread may have made it meanwhile
            found = _current(runners, key, model)
            if found is None:
                if key in runners:
                    runners.pop(key).engine.reset()
                runner = runners[key] = Runner(model, name)
                found = runner, runner.marks
    return found


def release(model: nn.Module) -> None:
    """Forget all that was traced, compiled and captured for a model, and free its memory.

    A dense model whose weights the engine ``stream`` has laid out for its kernels gets its own
    memory layout back. Decoders that are still in use make anew what they need.
    """
    with exclusion.tracing(), _LOCK, torch.inference_mode(False), torch.no_grad():
        for runner in _RUNNERS.pop(model, {}).values():
            runner.engine.reset()


def check_cache(model: nn.Module, config: Any) -> None:
    """Decoding from cached keys and values gives what one pass over the same tokens gives.

    Raises:
        UnsupportedModelError: If it does not.
    """
    generator = torch.Generator().manual_seed(0)
    device, differences = device_of(model), []
    for _ in range(_CHECKED_TEXTS):
        ids = torch.randint(config.vocab_size, (1, _CHECKED_TOKENS), generator=generator)
        ids = ids.to(device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        differences.append(_checked_difference(model, config, ids, mask, {}))
        # in 16 bits a rounding can choose other neurons or experts for one text, not for each
        if differences[-1] <= _tolerance(model):
            return
    ahead = "; with is_decoder=False it reads ahead: load it with is_decoder=True, or"
    advice = ahead if getattr(config, "is_decoder", None) is False else ";"
    raise UnsupportedModelError(
        f"{type(model).__name__} does not remember earlier tokens by keys and values alone: a step "
        f"after a prompt differs from one pass over both by {min(differences):.1%}{advice} "
        "use model.generate"
    )


def _checked_difference(
    model: nn.Module, config: Any, ids: Tensor, mask: Tensor, extras: Mapping[str, Any]
) -> float:
    try:
        return _difference_with_cache(model, config, ids, mask, extras)
    except (CatsError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a foreign model raises is the reason
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be decoded from cached keys and values "
            f"({first_line(error)}): use model.generate"
        ) from error


def _difference_with_cache(
    model: nn.Module, config: Any, ids: Tensor, mask: Tensor, extras: Mapping[str, Any]
) -> float:
    """Difference of a prompt's and a step's logits from those of one pass without a cache, as a
    share of these.
    """
    state = State(model, config, len(ids), ids.shape[1] + 1)
    state.valid[:, :-1] = mask
    state.padded = not bool(mask.all())
    first = prefill(model, state, ids, 0, extras)
    newest = first.argmax(-1, keepdim=True)
    found = torch.stack([first, prefill(model, state, newest, ids.shape[1])], dim=1)
    wanted = _without_cache(model, torch.cat([ids, newest], dim=1), state, extras)
    return relative_difference(found.float(), wanted.float())


def _without_cache(model: Any, ids: Tensor, state: State, extras: Mapping[str, Any]) -> Tensor:
    """Logits of the last two tokens, ``[B, 2, V]``, of one pass over ``[B, T]``."""
    given: dict[str, Any] = {"use_cache": False, "logits_to_keep": 2}
    if state.padded:
        given["attention_mask"] = state.valid
        given["position_ids"] = (state.valid.cumsum(1) - 1).clamp(min=0)
    for name, value in extras.items():
        if isinstance(value, Tensor) and value.shape[:2] == (len(ids), ids.shape[1] - 1):
            # one entry per token
            value = torch.cat([value, torch.zeros_like(value[:, :1])], dim=1)
        given[name] = value
    takes = arguments_of(model)
    output = model(input_ids=ids, **{name: v for name, v in given.items() if name in takes})
    logits: Tensor = output.logits[:, -2:]
    return logits.to(state.device)


def _tolerance(model: nn.Module) -> float:
    return _TOLERANCE.get(next(model.parameters()).dtype, _TOLERANCE_OF_16_BITS)


def _current(
    runners: dict[Hashable, Runner], key: Hashable, model: nn.Module
) -> tuple[Runner, Marks] | None:
    """The runner of that key and the marks of the model, if they are of the same structure."""
    runner = runners.get(key)
    if runner is None:
        return None
    marks = runner.marks_of(model)
    return (runner, marks) if marks.structure == runner.marks.structure else None
