"""The stream engine on a CPU: a token is one call into C++."""

from __future__ import annotations

import traceback
from weakref import ref

from torch import Tensor, nn

from cats.decode.forward import prefill
from cats.decode.options import Options
from cats.decode.state import State
from cats.decode.stream.cpu_chain import CpuChain
from cats.decode.stream.layout import lay_out_, lay_out_again_
from cats.decode.stream.probe import probe
from cats.decode.stream.spec import ModelSpec, read_spec
from cats.decode.tracing import exclusion
from cats.errors import BackendError, ShapeError, UnsupportedModelError
from cats.weights import QuantisedLinear

# Key of a conversation's chain among what depends on its buffers.
_CHAIN = "chain"
# Tokens before the probed one: one run of slots, and several.
_LENGTHS = (1, 37, 300)


class CpuStreamEngine:
    """Every part of a token in one call, by a team of threads that share small pieces of it.

    It runs one row without padding. ``down`` of each MLP is stored column by column, and quantised
    layers are packed, in place, until :meth:`reset`.
    """

    name = "stream"
    lag = 0

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: On a CPU; probed here.

        Raises:
            BackendError: If its layers are not of the common form, or differ from the kernels.
        """
        self._model = ref(model)
        self._laid_out: list[ref[nn.Parameter]] = []
        self._packed: list[ref[QuantisedLinear]] = []
        self._spec: ModelSpec | None = None
        try:
            spec = lay_out_(read_spec(model, any_mask=True), self._laid_out, self._packed)
            self._spec = spec
            self._embedding_scale = probe(model, spec, CpuChain, _LENGTHS)
        except BaseException as error:
            # frees what its frames still hold of the packed layers
            traceback.clear_frames(error.__traceback__)
            self.reset()
            if isinstance(error, UnsupportedModelError | AttributeError | ShapeError):
                raise BackendError(f"the engine stream cannot run this model: {error}") from error
            raise

    def prefill(
        self, model: nn.Module, state: State, ids: Tensor, start: int, options: Options
    ) -> None:
        chain = state.captured.get(_CHAIN)
        if isinstance(chain, CpuChain):
            chain.settle()
        state.advance(prefill(model, state, ids, start, state.take_extras()), options)

    def prepare(self, model: nn.Module, state: State, lengths: range, options: Options) -> None:
        if state.padded or state.batch > 1:
            raise BackendError(
                "the engine stream runs one row without padding; engine='auto' takes another "
                "engine for batches"
            )
        if _CHAIN not in state.captured:
            assert self._spec is not None, "the engine was reset"
            with exclusion.tracing():
                state.captured[_CHAIN] = CpuChain(self._spec, state, self._embedding_scale)

    def step(self, model: nn.Module, state: State, length: int, options: Options) -> None:
        chain = state.captured[_CHAIN]
        assert isinstance(chain, CpuChain)
        chain.use_frequencies_of(length)
        sampling = options.sampling
        greedy = not sampling.do_sample and sampling.repetition_penalty == 1
        if greedy and options.processors is None and state.logits is None:
            chain.run_greedily(options.pad_token_id)
        else:
            state.advance(chain.run(length)[None], options)

    def reset(self) -> None:
        """Store ``down`` and quantised layers again as they were before this engine."""
        # nothing here keeps a packed layer beside its plain tensors
        self._spec = None
        lay_out_again_(self._model(), self._laid_out, self._packed)
