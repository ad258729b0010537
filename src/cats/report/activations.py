"""Figures of a profile: what the activations of a model's layers look like."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from cats.report import plots
from cats.results import ProfileRecord

# Layers in one figure: more lines are hard to tell apart.
_HISTOGRAMS = 6


def layer_labels(names: Sequence[str]) -> list[str]:
    """``"layer 0"`` for ``"model.layers.0.mlp.act_fn"``.

    The names themselves if two of them would get the same label, or if one has no number.
    """
    numbers = [re.search(r"\.(\d+)(?:\.|$)", name) for name in names]
    labels = [f"layer {number[1]}" for number in numbers if number]
    return labels if len(set(labels)) == len(names) else list(names)


def histograms(profile: ProfileRecord, name: str) -> str:
    """Magnitudes of the activations of up to six layers, with the threshold.

    The first and the last layer are among them, and the others lie at equal distances between.
    """
    layers = profile.layers
    labels = layer_labels([layer.name for layer in layers])
    gaps = min(len(layers), _HISTOGRAMS) - 1
    chosen = [round(i * (len(layers) - 1) / gaps) for i in range(gaps + 1)] if gaps else [0]
    figure, axis = plots.single()
    for i, index in enumerate(chosen):
        layer = layers[index]
        shares = layer.histogram
        edges = [b / (len(shares) - 1) for b in range(len(shares) - 1)]
        colour = plots.colour(i)
        axis.plot(edges, shares[:-1], drawstyle="steps-post", label=labels[index], color=colour)
        if layer.threshold is not None:
            axis.axvline(layer.threshold, color=colour, linestyle=":", linewidth=1)
    plots.label(axis, x="magnitude of the activation", y="share")
    axis.set(yscale="log")
    plots.legend(axis)
    return plots.svg(figure, name)


def layers(profile: ProfileRecord, name: str) -> str:
    """Zeros and near zeros layer by layer, alone and shared by several tokens."""
    figure, axis = plots.single()
    near = f"below {profile.near:g}"
    axis.plot([layer.near_zero for layer in profile.layers], label=near, linestyle="--")
    axis.plot([layer.zero for layer in profile.layers], label="zero")
    for n in sorted({n for layer in profile.layers for n in layer.union}, key=int):
        shared = [layer.union.get(n, math.nan) for layer in profile.layers]
        axis.plot(shared, label=f"zero for {n} tokens at once", linewidth=1)
    plots.label(axis, x="layer", y="share of activations")
    axis.set(ylim=(0, 1))
    plots.legend(axis)
    return plots.svg(figure, name)


def positions(profile: ProfileRecord, name: str) -> str:
    """Zeros by the position in a block, as a mean over the layers."""
    figure, axis = plots.single()
    lists = [layer.by_position for layer in profile.layers]
    length = min(map(len, lists))
    means = [sum(values[i] for values in lists) / len(lists) for i in range(length)]
    axis.plot(range(length), means, marker="o", markersize=3)
    plots.label(axis, x="part of the block, first tokens first", y="share of zeros")
    axis.set(ylim=(0, 1))
    return plots.svg(figure, name)
