"""tokenizer.json for a bare SentencePiece model.

transformers 5 given only a `tokenizer.model` splits runs of blanks wrongly; a tokenizer.json that states the model's
merges is read as it stands.
"""

from __future__ import annotations

from pathlib import Path


def write_tokenizer_json(model: Path, directory: Path) -> None:
    """Writes tokenizer.json and, if missing, tokenizer_config.json into `directory`."""
    raise NotImplementedError
