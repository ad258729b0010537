"""Every causal family of transformers, tried as a tiny model: what cats can do with it."""

from cats.families.check import Family, check_family
from cats.families.table import PAGE, page

__all__ = ["PAGE", "Family", "check_family", "page"]
