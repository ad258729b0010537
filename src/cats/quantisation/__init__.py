"""Quantise the weights of a model: round them to the nearest code, or as GPTQ does."""

from cats.quantisation.layerwise import gptq_
from cats.quantisation.rounding import quantise_, rounded
from cats.quantisation.selection import Selection, check_bits, decoder_layers, select

__all__ = [
    "Selection",
    "check_bits",
    "decoder_layers",
    "gptq_",
    "quantise_",
    "rounded",
    "select",
]
