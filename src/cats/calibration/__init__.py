"""Calibration: count activations over some text, and read thresholds off the counts."""

from cats.calibration.collection import calibrate, collect
from cats.calibration.statistics import Statistics

__all__ = ["Statistics", "calibrate", "collect"]
