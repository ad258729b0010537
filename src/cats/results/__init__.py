"""Measured numbers: typed records, one JSON line each, with where they were measured."""

from cats.results.environment import environment
from cats.results.files import append_results, join_results, read_results, run_of
from cats.results.profile import LayerRecord, ProfileRecord
from cats.results.quality import COMPARED, MEAN, QUANTISED, DemoTime, Perplexity, TaskScore
from cats.results.records import (
    DENSE_MLPS,
    EVENTS,
    LAUNCHES,
    PAPER_MLP,
    DecodeBandwidth,
    DecodeResult,
    DecodeVariantResult,
    FirstTokenTime,
    GenerateRate,
    LaunchTime,
    MLPBandwidth,
    MLPTime,
    Moment,
    PeakMemory,
    PrefillTime,
    SeveralGPUs,
    StartUpTime,
    TokenTime,
)
from cats.results.result import Result, Value

__all__ = [
    "COMPARED",
    "DENSE_MLPS",
    "EVENTS",
    "LAUNCHES",
    "MEAN",
    "PAPER_MLP",
    "QUANTISED",
    "DecodeBandwidth",
    "DecodeResult",
    "DecodeVariantResult",
    "DemoTime",
    "FirstTokenTime",
    "GenerateRate",
    "LaunchTime",
    "LayerRecord",
    "MLPBandwidth",
    "MLPTime",
    "Moment",
    "PeakMemory",
    "Perplexity",
    "PrefillTime",
    "ProfileRecord",
    "Result",
    "SeveralGPUs",
    "StartUpTime",
    "TaskScore",
    "TokenTime",
    "Value",
    "append_results",
    "environment",
    "join_results",
    "read_results",
    "run_of",
]
