"""The stream engine behind the interface of the decode loop."""

from __future__ import annotations

import traceback
from functools import partial
from weakref import ref

import torch
from torch import Tensor, nn

from cats.decode.capture import (
    capture,
    graph_key,
    must_be_deterministic,
    replay,
    window_of,
    windows_of,
)
from cats.decode.forward import prefill
from cats.decode.options import Options
from cats.decode.state import State
from cats.decode.stream.chain import Chain
from cats.decode.stream.layout import lay_out_, lay_out_again_
from cats.decode.stream.probe import probe
from cats.decode.stream.spec import ModelSpec, read_spec, with_plain_embedding
from cats.decode.tracing import exclusion
from cats.errors import BackendError, UnsupportedModelError
from cats.weights import QuantisedLinear

# Key of a conversation's chain, beside its graphs, which hold the addresses of its buffers.
_CHAIN = "chain"


class StreamEngine:
    """All kernels of a token, each a stream of weights, in one CUDA graph.

    It runs one row without padding. ``down`` of each MLP is stored column by column, and quantised
    layers are packed, in place, until :meth:`reset`.
    """

    name = "stream"
    lag = 1

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: On a GPU; probed here.

        Raises:
            BackendError: If its layers are not of the common form, or differ from the kernels.
        """
        self._model = ref(model)
        self._laid_out: list[ref[nn.Parameter]] = []
        self._packed: list[ref[QuantisedLinear]] = []
        self._spec: ModelSpec | None = None
        try:
            self._embedding_scale = self._lay_out(model)
        except BaseException as error:
            # frees what its frames still hold of the packed layers
            traceback.clear_frames(error.__traceback__)
            self.reset()
            if isinstance(error, UnsupportedModelError | AttributeError):
                raise BackendError(f"the engine stream cannot run this model: {error}") from error
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise BackendError(
                    "the engine stream cannot run: out of memory while it was compared with the "
                    "model"
                ) from error
            raise

    def _lay_out(self, model: nn.Module) -> float:
        """Store layers as the kernels read them, and compare them with the model's.

        Returns:
            What multiplies the embedding.
        """
        spec = with_plain_embedding(read_spec(model))
        with torch.cuda.device(spec.norm.device):
            # the same name, so that nothing here keeps the plain tensors
            self._spec = spec = lay_out_(spec, self._laid_out, self._packed)
            if self._packed:
                torch.cuda.empty_cache()
            return probe(model, spec, Chain)

    def prefill(
        self, model: nn.Module, state: State, ids: Tensor, start: int, options: Options
    ) -> None:
        state.advance(prefill(model, state, ids, start, state.take_extras()), options)

    def prepare(self, model: nn.Module, state: State, lengths: range, options: Options) -> None:
        if state.padded or state.batch > 1 or must_be_deterministic():
            raise BackendError(
                "the engine stream runs one row without padding, and adds up in any order; "
                "engine='auto' takes another engine for batches and deterministic algorithms"
            )
        windows = {
            window: graph_key(self.name, window, options) for window in windows_of(state, lengths)
        }
        if options.processors is not None:
            windows = {}
        if _CHAIN in state.captured and all(key in state.captured for key in windows.values()):
            return
        with exclusion.tracing():
            if _CHAIN not in state.captured:
                state.captured[_CHAIN] = self.chain(state)
            chain = _chain_of(state)
            chain.use_frequencies_of(lengths[0])
            for window, key in windows.items():
                if key not in state.captured:
                    step = partial(_step, chain, window, state, options)
                    state.captured[key] = capture(step, state)

    def step(self, model: nn.Module, state: State, length: int, options: Options) -> None:
        window = window_of(length, state.capacity)
        chain = _chain_of(state)
        chain.use_frequencies_of(length)
        if options.processors is not None:
            # they run Python at each step, which a graph does not repeat
            with torch.cuda.device(state.device):
                _step(chain, window, state, options)
            return
        replay(state, graph_key(self.name, window, options))

    def chain(self, state: State, *, traced: bool = False) -> Chain:
        """New launches for a token of a conversation.

        Args:
            state: A conversation of one row, after its first pass.
            traced: Whether warps write times.
        """
        assert self._spec is not None, "the engine was reset"
        return Chain(self._spec, state, self._embedding_scale, traced=traced)

    def reset(self) -> None:
        """Store ``down`` and quantised layers again as they were before this engine."""
        # nothing here keeps a packed layer beside its plain tensors
        self._spec = None
        lay_out_again_(self._model(), self._laid_out, self._packed)


def _chain_of(state: State) -> Chain:
    chain = state.captured[_CHAIN]
    assert isinstance(chain, Chain)
    return chain


def _step(chain: Chain, window: int, state: State, options: Options) -> None:
    """Run the newest token and choose the next one."""
    sampling = options.sampling
    greedy = not sampling.do_sample and sampling.repetition_penalty == 1
    if not greedy or options.processors is not None or state.logits is not None:
        state.advance(chain.run(window)[None], options)
    else:
        chain.run_greedily(window, options.pad_token_id)
