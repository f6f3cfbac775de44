"""What decides a run, by name: keys, versions, and digests of its inputs. Compared between processes and on resume."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.common.files import open_regular
from arriero.common.ranges import leaves
from arriero.common.version import __version__
from arriero.data.prefix import data_files, parse_prefix

if TYPE_CHECKING:
    from arriero.train.recipe import Recipe


PATHS = ("model", "tokenizer", "data.prefix")
"""Keys that may differ between machines, as long as what lies there is the same."""


def run_facts(recipe: Recipe) -> dict[str, str]:
    """What decides a run, by name: every key of the recipe, versions, and digests of what its paths lead to."""
    import torch

    facts = {"arriero version": __version__, "arriero source": source_digest(), "torch version": torch.__version__}
    facts |= {key: str(value) for key, value in flat(recipe).items() if key not in PATHS}
    facts |= {f"model's {key}": str(value) for key, value in recipe.model_config().to_json().items()}
    return facts | input_digests(recipe)


def input_digests(recipe: Recipe) -> dict[str, str]:
    """Digests of the tokenizer and of each data file that is read, wherever they lie, and the weights of a blend."""
    facts: dict[str, str] = {}
    if recipe.tokenizer:
        facts["tokenizer"] = tokenizer_digest(Path(recipe.tokenizer))
    if not recipe.data.prefix:
        return facts
    if (weights := parse_prefix(recipe.data.prefix).weights) is not None:
        facts["data weights"] = ", ".join(f"{w / sum(weights):.12g}" for w in weights)
    return facts | {key: file_sample(path) for key, path in data_files(recipe.data.prefix).items()}


def input_changes(before: dict[str, str], recipe: Recipe) -> dict[str, tuple[str, str]]:
    """What of the inputs is another than it was: "tokenizer" or "data" -> (then, now).

    Args:
        before: what `input_digests` gave then. Older versions named each data file "data N NAME", took files with
            similar names in, looked at the ends of a file alone and did not know a blend's weights; their tokenizer was
            tokenizer.json where a directory has both.
        recipe: what is run now.
    """
    now, found = input_digests(recipe), {}
    if before.get("tokenizer") != now.get("tokenizer"):
        path = Path(recipe.tokenizer)
        older = tokenizer_digest(path, ("tokenizer.json", "tokenizer.model")) if recipe.tokenizer else "none"
        if before.get("tokenizer") != older:
            found["tokenizer"] = (before.get("tokenizer", "none"), now.get("tokenizer", "none"))
    here = {key: value for key, value in now.items() if key.startswith("data")}
    then = {key: value for key, value in before.items() if key.startswith("data")}
    if any(key.startswith("data ") and key != "data weights" for key in then):
        then = _as_now(then, recipe.data.prefix)
    if differing := [key for key in {**then, **here} if then.get(key) != here.get(key)]:
        found["data"] = tuple(  # type: ignore[assignment]
            ", ".join(f"{key.removeprefix('data ')} {side.get(key, 'none')}" for key in differing[:4])
            for side in (then, here)
        )
    return found


def _as_now(older: dict[str, str], prefix: str) -> dict[str, str]:
    """Digests of an older version under the names of this one, for the files that are read now.

    A file whose ends are as they were then counts as unchanged; one that has another name now is taken in its turn.
    """
    ordered = sorted(older, key=lambda key: (int(number) if (number := key.split()[1]).isdigit() else 0, key))
    by_name: dict[str, list[str]] = {}
    for key in ordered:
        by_name.setdefault(key.split(" ", 2)[-1], []).append(older[key])
    files, found = data_files(prefix), {}
    known = all(path.name in by_name for path in files.values())
    rest = [older[key] for key in ordered]
    for key, path in files.items():
        values = by_name[path.name] if known else rest
        value = values.pop(0) if values else "none"
        found[key] = file_sample(path) if value == file_sample(path, blocks=0) else value
    if (weights := parse_prefix(prefix).weights) is not None:
        found["data weights"] = ", ".join(f"{w / sum(weights):.12g}" for w in weights)
    return found


def flat(recipe: Recipe) -> dict[str, Any]:
    """Every key of a recipe, dotted, with its value."""
    return {key: value for key, _, value in leaves(recipe)}


def source_digest() -> str:
    """Of arriero's own files, so that two checkouts of one version differ by name."""
    root, total = Path(str(resources.files("arriero"))), hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:12]


def tokenizer_digest(path: Path, order: tuple[str, ...] = ("tokenizer.model", "tokenizer.json")) -> str:
    """Of the file that decides the ids; in a directory the first of `order`, which is `load_tokenizer`'s."""
    names = [path] if path.is_file() else [path / name for name in order]
    return next((hashlib.sha256(p.read_bytes()).hexdigest()[:12] for p in names if p.is_file()), "missing")


def file_sample(path: Path, part: int = 1 << 20, *, blocks: int = 64, block: int = 1 << 14) -> str:
    """Size, and a digest of the first and last MiB and of evenly spaced blocks between.

    That is all of a small file, and never a terabyte: one changed byte in the middle of a large file can be missed,
    another order of its documents is not.
    """
    try:
        with open(open_regular(path, follow=True), "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            total = hashlib.sha256(file.read(part))
            for i in range(blocks if size > 2 * part else 0):
                file.seek(part + (size - 2 * part) * i // blocks)
                total.update(file.read(block))
            file.seek(max(0, size - part))
            total.update(file.read(part))
    except OSError as error:
        return error.strerror or "unreadable"
    return f"{size} bytes, {total.hexdigest()[:12]}"
