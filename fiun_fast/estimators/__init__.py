"""How a Fisher is obtained."""

from .accumulator import FisherAccumulator
from .estimate import estimate_fisher

__all__ = ["FisherAccumulator", "estimate_fisher"]
