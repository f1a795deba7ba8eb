"""Tensor plans for modules that bring none: `derive(module, tensor)`."""

from hybridpar.tensor.derive.plan import Derived, derive

__all__ = ["Derived", "derive"]
