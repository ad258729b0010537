"""What is kept for a model between calls: an engine, until the model's structure changes."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast
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
from cats.protocols import CausalModel, ModelConfig

# A model's use of its cache is checked with texts of so many tokens, and at most so many texts.
_CHECKED_TOKENS, _CHECKED_TEXTS = 6, 3
# Largest relative difference of logits. Rounding gives less; a model that remembers something else
# than keys and values gives far more.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 5e-3}
_TOLERANCE_OF_16_BITS = 0.15


class Runner:
    """An engine for one model as it is now; all decoders of the model share it.

    Attributes:
        engine: Runs prompts and steps.
        marks: The model's marks when this runner was made.
        untraceable: Why steps of the model must not be traced; None where they may be.
        rule: How the model's rotary frequencies depend on the length; None where they do not.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        """
        Raises:
            UnsupportedModelError: If the model cannot be decoded from cached keys and values.
            BackendError: If the engine cannot run the model.
        """
        config = cast(CausalModel, model).config
        self._config = config.get_text_config(decoder=True)
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{type(model).__name__} has an encoder, and the decode loop runs decoders alone: "
                "use model.generate"
            )
        self._cache_name = cache_argument(model)
        self.rule = LengthRule.of(self._config)
        self._runs_again: bool | None = None
        self._one_pass = threading.RLock()
        self._checked_extras: set[frozenset[str]] = set()
        copied = copy_to_probe(model)
        before = Marks.of(copied)
        with torch.inference_mode():
            check_cache(copied, self._config)
        # what a forward pass stores in the modules itself is not a change by the user
        self._stored_by_passes = before.changed(Marks.of(copied))
        stored = stored_names(self._stored_by_passes, copied)
        self.untraceable = f"its forward pass stores {stored[0]}" if stored else None
        self.engine = make_engine(name, model, self.untraceable)
        # an engine may lay out weights anew
        self.marks = self.marks_of(model)

    def marks_of(self, model: nn.Module) -> Marks:
        """The marks of the model now, without what a forward pass stores in its modules itself."""
        return Marks.of(model).without(self._stored_by_passes)

    def name_for(self, batch: int) -> str:
        """Name of the engine that runs ``batch`` rows without padding."""
        engine = self.engine
        return engine.name_for(batch) if isinstance(engine, AutoEngine) else engine.name

    @contextmanager
    def running(self, model: nn.Module, state: State) -> Iterator[None]:
        """Hold this while the engine runs a prompt or a step of a conversation."""
        with exclusion.running():
            if self.rule is None:
                yield
                return
            # a forward pass writes the frequencies of its length into the model
            with self._one_pass:
                if self.rule.kind == "longrope":
                    yield
                    return
                with frequencies_of_one_text(model, state.rotary) as frequencies:
                    yield
                state.rotary = frequencies

    def check_extras(
        self, model: nn.Module, ids: Tensor, mask: Tensor, extras: Mapping[str, Any]
    ) -> None:
        """Check that decoding with such extras is right; once per set of their names.

        Raises:
            UnsupportedModelError: If it is not.
        """
        names = frozenset(extras)
        if not extras or names in self._checked_extras:
            return
        with exclusion.tracing(), torch.inference_mode():
            copied = copy_to_probe(model)
            difference = _checked_difference(copied, self._config, ids, mask, extras)
        if not difference <= largest_difference(model):
            raise UnsupportedModelError(
                f"decoding {type(model).__name__} with {', '.join(sorted(names))} differs from one "
                f"pass over the same tokens by {difference:.1%}: use model.generate"
            )
        self._checked_extras.add(names)

    def frequencies(self, length: int) -> int | None:
        """A number for the rotary frequencies at this length; see :meth:`LengthRule.range_of`."""
        return 0 if self.rule is None else self.rule.range_of(length)

    def runs_again_at(self, model: nn.Module, length: int) -> bool:
        """Whether the whole text must run again at this length, as in transformers."""
        if self.rule is None or length != self.rule.original + 1:
            return False
        if self._runs_again is None:
            self._runs_again = runs_again_at(model, length, self._cache_name)
        return self._runs_again


# Per model, by name of the engine and dtype of autocast. A runner holds weights but not the model,
# so that an entry goes when its model goes.
_RUNNERS: WeakKeyDictionary[nn.Module, dict[Hashable, Runner]] = WeakKeyDictionary()
_LOCK = threading.Lock()


def runner_of(model: nn.Module, name: str) -> tuple[Runner, Marks]:
    """The runner for a model as it is now, and the marks of the model.

    Args:
        model: A Hugging Face causal model.
        name: The name of the engine.

    Raises:
        UnsupportedModelError: If the model cannot be decoded from cached keys and values.
        BackendError: If the engine cannot run the model.
    """
    device = device_of(model).type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    key = name, autocast
    with _LOCK:
        runners = _RUNNERS.setdefault(model, {})
    if current := _current(runners, key, model):
        return current
    # weights that are laid out anew must not become tensors of inference mode
    with exclusion.tracing(), torch.inference_mode(False), torch.no_grad():
        # another thread may have made it meanwhile
        if current := _current(runners, key, model):
            return current
        if key in runners:
            runners.pop(key).engine.reset()
        runner = runners[key] = Runner(model, name)
        return runner, runner.marks


def release(model: nn.Module) -> None:
    """Forget all that was traced, compiled and captured for a model, and free its memory.

    The engine ``stream`` changes the memory layout of a dense model's weights; here they get their
    own layout back. Decoders that are still in use make anew what they need.

    Example:
        >>> cats.release(model)
    """
    with exclusion.tracing(), _LOCK, torch.inference_mode(False), torch.no_grad():
        for runner in _RUNNERS.pop(model, {}).values():
            runner.engine.reset()


def check_cache(model: nn.Module, config: ModelConfig) -> None:
    """Check that cached keys and values give the logits of one pass over the same tokens.

    Raises:
        UnsupportedModelError: If they do not.
    """
    generator = torch.Generator().manual_seed(0)
    device, differences = device_of(model), []
    for _ in range(_CHECKED_TEXTS):
        ids = torch.randint(config.vocab_size, (1, _CHECKED_TOKENS), generator=generator)
        ids = ids.to(device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        differences.append(_checked_difference(model, config, ids, mask, {}))
        # in 16 bits a rounding can choose other neurons or experts for one text, but not for all
        if differences[-1] <= largest_difference(model):
            return
    reads_ahead = getattr(config, "is_decoder", None) is False
    advice = "; with is_decoder=False it reads ahead: load it with is_decoder=True, or"
    raise UnsupportedModelError(
        f"{type(model).__name__} does not remember earlier tokens by keys and values alone: a step "
        f"after a prompt differs from one pass over both by {min(differences):.1%}"
        f"{advice if reads_ahead else ';'} use model.generate"
    )


def _checked_difference(
    model: nn.Module, config: ModelConfig, ids: Tensor, mask: Tensor, extras: Mapping[str, Any]
) -> float:
    try:
        return _difference_with_cache(model, config, ids, mask, extras)
    except (CatsError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a foreign model may raise anything; the message says what
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be decoded from cached keys and values "
            f"({first_line(error)}): use model.generate"
        ) from error


def _difference_with_cache(
    model: nn.Module, config: ModelConfig, ids: Tensor, mask: Tensor, extras: Mapping[str, Any]
) -> float:
    """Relative difference between the logits of a prompt and a step, and those of one pass over
    both without a cache.
    """
    state = State(model, config, len(ids), ids.shape[1] + 1)
    state.valid[:, :-1] = mask
    state.padded = not bool(mask.all())
    of_prompt = prefill(model, state, ids, 0, extras)
    newest = of_prompt.argmax(-1, keepdim=True)
    of_step = prefill(model, state, newest, ids.shape[1])
    with_cache = torch.stack([of_prompt, of_step], dim=1)
    without_cache = _without_cache(model, torch.cat([ids, newest], dim=1), state, extras)
    return relative_difference(with_cache.float(), without_cache.float())


def _without_cache(
    model: nn.Module, ids: Tensor, state: State, extras: Mapping[str, Any]
) -> Tensor:
    """Logits of the last two tokens, ``[B, 2, V]``, of one pass over ``[B, T]``."""
    arguments: dict[str, Any] = {"use_cache": False, "logits_to_keep": 2}
    if state.padded:
        arguments["attention_mask"] = state.valid
        arguments["position_ids"] = (state.valid.cumsum(1) - 1).clamp(min=0)
    for name, value in extras.items():
        if isinstance(value, Tensor) and value.shape[:2] == (len(ids), ids.shape[1] - 1):
            # one entry per token of the prompt: one more for the step
            value = torch.cat([value, torch.zeros_like(value[:, :1])], dim=1)
        arguments[name] = value
    accepted = arguments_of(model)
    output = cast(CausalModel, model)(
        input_ids=ids, **{name: value for name, value in arguments.items() if name in accepted}
    )
    return output.logits[:, -2:].to(state.device)


def largest_difference(model: nn.Module) -> float:
    """The largest relative difference between logits of a model that rounding explains."""
    return _TOLERANCE.get(next(model.parameters()).dtype, _TOLERANCE_OF_16_BITS)


def _current(
    runners: dict[Hashable, Runner], key: Hashable, model: nn.Module
) -> tuple[Runner, Marks] | None:
    """The runner of this key and the model's marks, if the structure is still the runner's."""
    runner = runners.get(key)
    if runner is None:
        return None
    marks = runner.marks_of(model)
    return (runner, marks) if marks.structure == runner.marks.structure else None
