"""
Every error that the library raises on purpose:

* CatsError
  - ConfigError (also a ValueError): an option or a configuration that cannot be right
  - ShapeError (also a ValueError): a tensor of the wrong shape, dtype or layout
  - DataError (also a ValueError): text or tokens that cannot be used
  - FormatError (also a ValueError): a file that is corrupt, truncated or from a newer release
  - UnsupportedModelError (also a TypeError): a model or module that CATS cannot work on
  - ModelMismatchError (also a ValueError): thresholds or statistics of another model
  - BackendError (also a RuntimeError): a backend that was asked for by name and cannot run
  - StorageError (also an OSError): a file that cannot be read or written
  - LogitsError (also a RuntimeError): logits that no token can be drawn from
  - TrainingError (also a RuntimeError): a training that cannot go on
"""


class CatsError(Exception):
    """Base of every error that the library raises on purpose."""


class ConfigError(CatsError, ValueError):
    """An option or a configuration that cannot be right, whatever the model."""


class ShapeError(CatsError, ValueError):
    """A tensor of the wrong shape, dtype or memory layout."""


class DataError(CatsError, ValueError):
    """Text or tokens that cannot be used."""


class FormatError(CatsError, ValueError):
    """A file that is corrupt, truncated, or from a newer release."""


class UnsupportedModelError(CatsError, TypeError):
    """A model or module that does not have the form that CATS needs."""


class ModelMismatchError(CatsError, ValueError):
    """Thresholds or statistics that belong to another model."""


class BackendError(CatsError, RuntimeError):
    """A backend that was asked for by name and cannot run this call."""


class StorageError(CatsError, OSError):
    """A file that cannot be read or written."""


class LogitsError(CatsError, RuntimeError):
    """Logits that no token can be drawn from: they are NaN or infinite."""


class TrainingError(CatsError, RuntimeError):
    """A training that cannot go on: its loss is NaN or infinite."""
