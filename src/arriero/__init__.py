"""Pre-train LLaMA models: one command line, one recipe file, the same numbers in every parallel layout."""

from arriero.common.version import __version__

__all__ = ["__version__"]
