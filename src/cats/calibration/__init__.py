"""Calibration: run some text, and find the thresholds of each layer."""

from cats.calibration.calibration import calibrate
from cats.calibration.collection import collect
from cats.calibration.paths import Paths
from cats.calibration.samples import Samples
from cats.calibration.statistics import Statistics

__all__ = ["Paths", "Samples", "Statistics", "calibrate", "collect"]
