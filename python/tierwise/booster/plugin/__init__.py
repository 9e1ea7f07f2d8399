"""Plugins: how a booster trains."""

from tierwise.booster.plugin.base import Plugin
from tierwise.booster.plugin.gemini import GeminiPlugin

__all__ = ["GeminiPlugin", "Plugin"]
