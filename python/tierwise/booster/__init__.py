"""What users call: `Booster` and its plugins."""

from tierwise.booster.booster import Booster

__all__ = ["Booster"]
