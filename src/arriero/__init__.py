"""arriero: pre-train LLaMA models, with the same numbers in every parallel layout."""

__version__ = "0.1.0"
