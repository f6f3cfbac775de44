"""Which files belong to a tokenizer, and how they are copied."""

from __future__ import annotations

from pathlib import Path

from arriero.common.files import make_directory, write_atomic
from arriero.common.untrusted import read_bytes, require_inside

VOCABULARY_FILES = ("tokenizer.model", "tokenizer.json")
"""The files that decide ids, in the order in which they are looked for."""

TOKENIZER_FILES = (
    *VOCABULARY_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "merges.txt",
)  # fmt: skip
"""Every file that belongs to a tokenizer."""

CHAT_TEMPLATE_DIRECTORY = "additional_chat_templates"
"""transformers' folder of further chat templates, *.jinja."""

GENERATION_CONFIG = "generation_config.json"
"""What travels with a tokenizer into a run: how the model that both belong to is sampled."""

_MAX_CHAT_TEMPLATES = 100


def copy_tokenizer_files(source: Path, directory: Path) -> list[str]:
    """Copies a tokenizer's files: the one place that knows which they are.

    Args:
        source: its directory, or the file in it that decides the ids. A file gets the name that the directory will be
            searched for, and no other vocabulary comes with it that would decide in its place.
        directory: where to; made if it is not there. Links in it are replaced, not followed.

    Returns:
        The names of the files in `directory`.

    Raises:
        UserError: a file is no regular one, is too large, or a link leads out of the directory.
    """
    fix = "name a directory that can be written"
    make_directory(directory, fix)
    folder, named = (source, None) if source.is_dir() else (source.parent, source)
    names = [name for name in TOKENIZER_FILES if _exists(folder / name)]
    copied = []
    if named is not None:
        copied = [VOCABULARY_FILES[1] if named.suffix == ".json" else VOCABULARY_FILES[0]]
        write_atomic(directory / copied[0], read_bytes(named, "give the tokenizer's own file"))
        harmless = VOCABULARY_FILES[1:] if named.name == VOCABULARY_FILES[0] else ()
        names = [name for name in names if name not in VOCABULARY_FILES or name in harmless]
    templates = sorted((folder / CHAT_TEMPLATE_DIRECTORY).glob("*.jinja"))[:_MAX_CHAT_TEMPLATES]
    if templates:
        make_directory(directory / CHAT_TEMPLATE_DIRECTORY, fix)
    for name in (*names, *(f"{CHAT_TEMPLATE_DIRECTORY}/{template.name}" for template in templates)):
        _copy(folder, name, directory)
        copied.append(name)
    return copied


def copy_generation_config(folder: Path, directory: Path) -> None:
    """Copies the generation_config.json that lies beside a tokenizer, if there is one."""
    if _exists(folder / GENERATION_CONFIG):
        _copy(folder, GENERATION_CONFIG, directory)


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _copy(folder: Path, name: str, directory: Path) -> None:
    write_atomic(
        directory / name, read_bytes(require_inside(folder, folder / name), f"put the file itself into {folder}")
    )
