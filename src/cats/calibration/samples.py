"""Inputs of a model's layers on some text, and how much the loss depends on each of their outputs.

One backward pass per batch gives the gradient ``g`` of the loss with respect to the output of a
layer. If the output changes by ``d``, the loss changes by about ``(g d)**2 / 2`` on average
(Fisher information), which ``norm(g)**2 * norm(d)**2`` stands for here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cats.calibration.collection import block_hash, check_dense
from cats.data import Batch, as_batch
from cats.errors import DataError, FormatError, ModelMismatchError, UnsupportedModelError
from cats.fingerprint import of_model
from cats.model import GatedExperts, GatedMLP, evaluating, find_gated_mlps
from cats.protocols import CausalModel
from cats.storage import load_tensors, save_tensors
from cats.weights import weight_of
from cats.weights.placement import check_has_weights, input_device, is_offloaded

PER_ROW = 32
"""Tokens that are kept of each row of a batch, evenly spread."""


@dataclass(kw_only=True, slots=True)
class Samples:
    """Inputs of layers, and weights of their tokens.

    Attributes:
        inputs: Name of an MLP, or of a linear layer beside one, to some of its inputs ``[N, D]``.
        weights: The same names to ``[N]``, float32: the squared norm of the loss' gradient with
            respect to the layer's output for that token.
        fingerprints: Name of each MLP to a few of its weights.
        model: Hash of the whole model, :func:`cats.fingerprint.of_model`.
        tokens: How many tokens ran through the model.
        blocks: How many rows of batches they were.
        text_hash: As in :class:`cats.calibration.Statistics`.
    """

    inputs: dict[str, Tensor] = field(repr=False)
    weights: dict[str, Tensor] = field(repr=False)
    fingerprints: dict[str, Tensor] = field(repr=False)
    model: str
    tokens: int = 0
    blocks: int = 0
    text_hash: int = 0

    @classmethod
    def collect(
        cls,
        model: nn.Module,
        batches: Iterable[Batch],
        *,
        exclude: Sequence[str] = (),
        attention: bool = False,
        samples: Samples | None = None,
    ) -> Samples:
        """Run text through the dense model, forward and backward.

        Args:
            model: A dense model, all of it in memory.
            batches: Token ids ``[B, T]`` without padding.
            exclude: Patterns of MLPs that stay dense.
            attention: Keep inputs of the other linear layers of the decoder layers as well.
            samples: Those of an earlier part of the text, to be added; they do not change.

        Raises:
            UnsupportedModelError: If the model has no gated MLP, or stacked experts, is sparse or
                offloaded, or its MLPs do not take one hidden state per token.
            DataError: If a batch is padded, or a gradient is NaN or infinite.
            ModelMismatchError: If the earlier samples are of another model or other layers.
        """
        check_dense(model)
        check_has_weights(model)
        if is_offloaded(model):
            raise UnsupportedModelError(
                "gradients need the whole model in memory, and some of its weights are offloaded: "
                "load it without device_map, or use --method cats"
            )
        mlps = find_gated_mlps(model, exclude=exclude)
        for mlp in mlps:
            if isinstance(mlp, GatedExperts):
                mlp.known_layout()  # raises: they have no inputs of layers
        layers = {mlp.name: mlp.module for mlp in mlps}
        if attention:
            layers |= attention_layers(model, mlps)
        collected = cls(
            inputs={name: torch.empty(0) for name in layers},
            weights={name: torch.empty(0) for name in layers},
            fingerprints={mlp.name: mlp.fingerprint() for mlp in mlps},
            model=of_model(model),
        )
        if samples is not None:
            samples.check_same(collected)
            collected = samples
        for batch in batches:
            ids, mask = as_batch(batch)
            if mask is not None:
                raise DataError("inputs are kept of blocks without padding only")
            collected = collected._with(ids, _run(model, layers, ids.to(input_device(model))))
        return collected

    def check_same(self, other: Samples) -> None:
        """Raise ModelMismatchError unless both are of the same layers of the same model."""
        if (self.model, [*self.inputs]) != (other.model, [*other.inputs]):
            raise ModelMismatchError(
                "these inputs are those of another model, or of other layers of it: collect all of "
                "them with the same model, exclude and attention"
            )

    def save(self, path: str | Path, **block: object) -> None:
        """Write one safetensors file.

        Args:
            path: The file.
            **block: What else its ``cats`` block holds.
        """
        tensors = {f"{n}.fingerprint": t for n, t in self.fingerprints.items()}
        for name, inputs in self.inputs.items():
            tensors |= {f"{name}.inputs": inputs, f"{name}.weights": self.weights[name]}
        about = {"model": self.model, "tokens": self.tokens, "blocks": self.blocks}
        text = {"layers": [*self.inputs], "text_hash": f"{self.text_hash:016x}"}
        save_tensors(path, tensors, {"kind": "samples", **about, **text, **block})

    @classmethod
    def load(cls, path: str | Path) -> tuple[Samples, dict[str, Any]]:
        """Read what :meth:`save` wrote, and the file's ``cats`` block.

        Raises:
            StorageError: If there is no such file or it cannot be read.
            FormatError: If it is damaged, comes from a newer release, or holds something else.
        """
        tensors, block = load_tensors(path)
        if block.get("kind") != "samples":
            raise FormatError(
                f"{path}: holds {block.get('kind')}, expected samples; name another file"
            )
        end = ".fingerprint"
        try:
            samples = cls(
                inputs={name: tensors[f"{name}.inputs"] for name in block["layers"]},
                weights={name: tensors[f"{name}.weights"] for name in block["layers"]},
                fingerprints={
                    n.removesuffix(end): t for n, t in tensors.items() if n.endswith(end)
                },
                model=block["model"],
                tokens=block["tokens"],
                blocks=block["blocks"],
                text_hash=int(block["text_hash"], 16),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path}: damaged samples ({error}); delete the file") from error
        return samples, block

    def _with(self, ids: Tensor, new: dict[str, tuple[Tensor, Tensor]]) -> Samples:
        inputs, weights = dict(self.inputs), dict(self.weights)
        for name, (x, squares) in new.items():
            if not squares.isfinite().all() or not x.isfinite().all():
                raise DataError(
                    f"{name}: inputs or gradients are NaN or infinite; load the model in bfloat16 "
                    "or float32, and check its weights"
                )
            inputs[name] = torch.cat((inputs[name], x)) if len(inputs[name]) else x
            weights[name] = torch.cat((weights[name], squares)) if len(weights[name]) else squares
        return Samples(
            inputs=inputs,
            weights=weights,
            fingerprints=self.fingerprints,
            model=self.model,
            tokens=self.tokens + ids.numel(),
            blocks=self.blocks + len(ids),
            text_hash=(self.text_hash + sum(map(block_hash, ids))) % (1 << 64),
        )


def attention_layers(model: nn.Module, mlps: Iterable[GatedMLP]) -> dict[str, nn.Module]:
    """Name of each linear layer beside a gated MLP, in the same decoder layer, to the layer.

    These are the projections of attention, whatever a model calls them.
    """
    layers = {}
    for mlp in mlps:
        parent = mlp.name.rpartition(".")[0]
        for name, module in model.get_submodule(parent).named_modules(prefix=parent):
            is_inside = name.startswith(f"{mlp.name}.") or name == mlp.name
            if not is_inside and weight_of(module) is not None:
                layers[name] = module
    return layers


def _run(
    model: nn.Module, layers: dict[str, nn.Module], ids: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and weights of some tokens of a batch, on the CPU."""
    if ids.shape[1] < 2:
        raise DataError("no tokens to predict: blocks need at least two tokens")
    count = min(PER_ROW, ids.shape[1] - 1)
    # the last token of a block predicts nothing, so that its gradients are zero
    picks = [i * (ids.shape[1] - 1) // count for i in range(count)]
    inputs: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}  # q, k and v have the same input

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if name in inputs or not args or args[0].ndim != 3 or not isinstance(output, Tensor):
                raise UnsupportedModelError(
                    f"{name} does not run once on hidden states [B, T, D]: leave it out with "
                    "exclude, or without attention"
                )
            x = args[0]
            if id(x) not in seen:
                seen[id(x)] = x.detach()[:, picks].flatten(0, 1).cpu()
                alive.append(x)  # another tensor could get the same id
            inputs[name] = seen[id(x)]

            def weigh(gradient: Tensor) -> None:
                squares[name] = gradient[:, picks].float().square().sum(-1).flatten().cpu()

            output.register_hook(weigh)

        return hook

    alive: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(_differentiable(model))
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(keep(name)).remove)
        logits = cast(CausalModel, model)(input_ids=ids, use_cache=False).logits
        loss = sum(
            F.cross_entropy(row.float(), target, reduction="sum")
            for row, target in zip(logits[:, :-1], ids[:, 1:], strict=True)
        )
        cast(Tensor, loss).backward()
    if missing := [name for name in layers if name not in squares]:
        raise UnsupportedModelError(
            f"{missing[0]} never ran on the text: leave it out with exclude"
        )
    return {name: (inputs[name], squares[name]) for name in layers}


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with gradients of hidden states and none of weights."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    embedding = cast(CausalModel, model).get_input_embeddings()

    def require(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    handle = embedding.register_forward_hook(require)
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with evaluating(model), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
