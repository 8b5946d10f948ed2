"""How a Fisher is obtained."""

from .accumulator import FisherAccumulator
from .estimate import estimate_fisher, estimate_fishers

__all__ = ["FisherAccumulator", "estimate_fisher", "estimate_fishers"]
