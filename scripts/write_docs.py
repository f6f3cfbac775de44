"""Writes what the docs derive from the code: the figure of the layers, the tables of memory and disk, quoted examples.

    python scripts/write_docs.py            writes what has changed
    python scripts/write_docs.py --check    exits with 1 and names what is not current

A page marks the place: what stands between `<!-- generated: NAME -->` and `<!-- end -->` is replaced.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import grimp

from arriero.checkpoint.size import checkpoint_bytes
from arriero.common.settings import Setting, parse
from arriero.common.toml import file_settings
from arriero.model.config import count_parameters
from arriero.train.memory import minimum_bytes, state_bytes
from arriero.train.recipe import Recipe, find_bundled

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DEVICES = {
    "tinyllama-1.1b": 8, "llama-7b-zero-8p": 8, "llama-13b-ptd-8p": 8, "llama-33b-zero-32p": 32,
    "llama-65b-ptd-32p": 32, "llama2-7b": 8, "llama2-13b": 8, "llama2-70b": 64, "llama3-8b": 8, "llama3-70b": 64,
}  # fmt: skip
"""What each bundled recipe is made for; docs/recipes.md says the same."""
PURPOSE = {
    "cli": "one module or package a verb", "train": "recipe, preflight, loop, trainer, optimizer",
    "checkpoint": "save, load, verify, formats, tensors", "distributed": "launch; parallel",
    "observe": "metrics, throughput, curves, compare", "data": "prepare, token files, batches, tokenizers",
    "model": "LLaMA, operators, initial weights", "common": "errors, files, settings, devices, untrusted input",
}  # fmt: skip


def layers() -> list[list[str]]:
    """The layers of the first import contract, from the top; those of one level together."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    levels = next(c for c in contracts["contracts"] if c["type"] == "layers")["layers"]
    return [[name.strip() for name in level.split("|")] for level in levels]


def layer_imports() -> dict[str, set[str]]:
    """For each layer, the layers that its modules import, by grimp's graph of the source."""
    graph = grimp.build_graph("arriero", cache_dir=None)
    found: dict[str, set[str]] = {name: set() for level in layers() for name in level}
    for module in graph.modules:
        own = module.split(".")[1] if "." in module else ""
        if own in found:
            others = {name.split(".")[1] for name in graph.find_modules_directly_imported_by(module) if "." in name}
            found[own] |= others & found.keys() - {own}
    return found


def layers_svg() -> str:
    """The layers as boxes, one level a row, with what each imports."""
    levels, imports = layers(), layer_imports()
    width, height, gap = 860, 58, 22
    order = [name for level in levels for name in level]
    parts = []
    for row, level in enumerate(levels):
        y, each = 10 + row * (height + gap), (width - 12 * (len(level) - 1)) / len(level)
        if row:
            parts.append(f'<path d="M{10 + width / 2} {y - gap} v{gap - 3}" stroke="#555" marker-end="url(#arrow)"/>')
        for column, name in enumerate(level):
            x = 10 + column * (each + 12)
            below = ", ".join(sorted(imports[name], key=order.index)) or "nothing of arriero"
            parts.append(
                f'<rect x="{x:g}" y="{y}" width="{each:g}" height="{height}" rx="4" fill="#eef3f8" stroke="#567"/>'
            )
            for dy, points, weight, text in ((18, 14, "bold", name), (34, 12, "normal", PURPOSE[name]),
                                           (50, 11, "normal", f"imports {below}")):  # fmt: skip
                parts.append(
                    f'<text x="{x + each / 2:g}" y="{y + dy}" font-size="{points}" font-weight="{weight}" '
                    f'text-anchor="middle">{text}</text>'
                )
    total = 20 + len(levels) * (height + gap) - gap
    arrow = '<marker id="arrow" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#555"/></marker>'  # noqa: E501
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 20} {total}" font-family="sans-serif">',
        f"<defs>{arrow}</defs>", f'<rect width="{width + 20}" height="{total}" fill="white"/>', *parts, "</svg>", "",
    ])  # fmt: skip


def recipe(name: str, **changes: object) -> Recipe:
    """A bundled recipe, with other values by key."""
    settings = [Setting(key.replace("__", "."), [str(value)], key) for key, value in changes.items()]
    return parse(Recipe, file_settings(find_bundled("", name, ".toml")) + settings, prog="write_docs")


def memory_by_recipe() -> str:
    """State and activations a device, and bytes on the disk, of each recipe on the devices that it is made for."""
    rows = ["| recipe | devices | parameters | state | activations | checkpoint | "
            "export in bfloat16 |", "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, devices in DEVICES.items():
        one = recipe(name)
        model, need = one.model_config(), minimum_bytes(one, devices)
        parameters = count_parameters(model)
        cells = [
            f"`{name}`", f"{devices}", f"{parameters / 1e9:.2f}e9", f"{state_bytes(one, devices) / 1e9:.1f}",
            f"{need['activations'] / 1e9:.1f}", f"{checkpoint_bytes(model, one.train.dtype) / 1e9:.0f}",
            f"{2 * parameters / 1e9:.0f}",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


LAYOUTS: dict[str, dict[str, int]] = {
    "data 8, ZeRO-1": {"parallel__zero_stage": 1},
    "data 8, ZeRO-2": {"parallel__zero_stage": 2},
    "data 8, ZeRO-3": {"parallel__zero_stage": 3},
    "tensor 2, data 4, ZeRO-1": {"parallel__zero_stage": 1, "parallel__tensor_parallel": 2},
    "tensor 8": {"parallel__zero_stage": 1, "parallel__tensor_parallel": 8},
    "pipeline 8": {"parallel__zero_stage": 1, "parallel__pipeline_parallel": 8},
}


def memory_by_layout() -> str:
    """State a device on eight devices, a model a column, a layout a row."""
    models = ["tinyllama-1.1b", "llama-7b", "llama-13b", "llama-65b", "llama3-8b"]
    rows = [f"| layout of 8 devices | {' | '.join(models)} |", "| --- |" + " --- |" * len(models)]
    for words, changes in LAYOUTS.items():
        cells = []
        for model in models:
            one = recipe("llama2-7b", model=model, train__dtype="bfloat16", **changes)
            cells.append(f"{state_bytes(one, 8) / 1e9:.1f}")
        rows.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(rows)


EXAMPLES = {
    "schedule.py": "A learning-rate schedule",
    "optimizer.py": "An optimizer",
    "model_family.py": "A model family",
    "data_format.py": "A data format",
    "tracker.py": "A tracker",
    "weight_format.py": "A weight format",
    "device.py": "A device",
    "verb.py": "A verb",
}
"""The titles of the examples, in the order of the page."""


def examples() -> str:
    """Every file of examples/extending under its title."""
    files = {path.name: path for path in sorted((ROOT / "examples" / "extending").glob("*.py"))}
    names = [*(name for name in EXAMPLES if name in files), *(name for name in files if name not in EXAMPLES)]
    parts = []
    for name in names:
        title = EXAMPLES.get(name, name.removesuffix(".py").replace("_", " ").capitalize())
        text = files[name].read_text(encoding="utf-8").rstrip()
        parts.append(f"## {title}\n\n`examples/extending/{name}`:\n\n```python\n{text}\n```")
    return "\n\n".join(parts)


GENERATED: dict[str, Callable[[], str]] = {
    "memory by recipe": memory_by_recipe,
    "memory by layout": memory_by_layout,
    "examples": examples,
}


def filled(text: str) -> str:
    """A page with every marked place written anew."""
    pattern = r"<!-- generated: ([^>]+) -->\n.*?<!-- end -->"

    def written(place: re.Match[str]) -> str:
        return f"<!-- generated: {place[1]} -->\n\n{GENERATED[place[1]]()}\n\n<!-- end -->"

    return re.sub(pattern, written, text, flags=re.S)


def current() -> dict[Path, str]:
    """Every file that holds something generated, with the text that it should have."""
    pages = {page: filled(page.read_text(encoding="utf-8")) for page in sorted(DOCS.glob("*.md"))}
    return {DOCS / "layers.svg": layers_svg()} | pages


def main() -> int:
    """Writes, or with --check names what is not current."""
    stale = [path for path, text in current().items() if not path.is_file() or path.read_text("utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not current: python scripts/write_docs.py")
        return bool(stale)
    texts = current()
    for path in stale:
        path.write_text(texts[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
