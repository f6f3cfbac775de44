"""What the pages take from the code is current: the figure, the tables, quoted files, named functions and messages."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from arriero.common.settings import field_types, parse
from arriero.common.toml import file_settings
from arriero.train.recipe import Recipe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SOURCE = ROOT / "src" / "arriero"


def text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def write_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_docs", ROOT / "scripts" / "write_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_generated_is_current(write_docs: ModuleType) -> None:
    for path, wanted in write_docs.current().items():
        assert path.read_text(encoding="utf-8") == wanted, f"{path.name}: run python scripts/write_docs.py"


def test_the_figure_shows_the_contracts(write_docs: ModuleType) -> None:
    names = {name for level in write_docs.layers() for name in level}
    assert names == {path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file()}
    imports = write_docs.layer_imports()
    assert imports["common"] == set()
    assert "cli" not in set().union(*imports.values())


@pytest.mark.parametrize("page", ["architecture.md", "memory.md"])
def test_every_file_and_function_that_is_named_exists(page: str) -> None:
    """After a file, the names in code up to the next file are its functions and classes."""
    for line in text(page).splitlines():
        module = ""
        for span in re.findall(r"`([^`]+)`", line):
            if re.fullmatch(r"[\w/]+\.py", span):
                path = next((p for p in (SOURCE / span, SOURCE.parent / span, ROOT / span) if p.is_file()), None)
                assert path is not None, f"{page} names {span}, which is not there"
                module = path.read_text(encoding="utf-8")
            elif module and re.fullmatch(r"[A-Za-z_]\w+", span):
                assert re.search(rf"^ *(?:class|def) {span}\b", module, re.M), f"{page}: no {span} in: {line}"
            elif match := re.fullmatch(r"arriero((?:\.\w+)+)\.(\w+)", span):
                path = SOURCE.joinpath(*match[1][1:].split(".")).with_suffix(".py")
                assert re.search(rf"^(?:class|def) {match[2]}\b", path.read_text(encoding="utf-8"), re.M), span


def test_the_paths_never_lead_nowhere() -> None:
    page = text("architecture.md")
    for part in ("token", "weight", "step", "checkpoint"):
        section = page[page.index(f"## The life of a {part}") :].split("\n## ")[0]
        assert len(re.findall(r"`[\w/]+\.py`", section)) >= 5
    assert len(re.findall(r"^\d\. `[\w/]+\.py`", page, re.M)) == 6


def test_every_key_that_is_named_exists() -> None:
    keys = field_types(Recipe)
    tables = {key.split(".")[0] for key in keys if "." in key}
    for page in ("glossary.md", "llama-7b.md", "instruction-tuning.md", "troubleshooting.md", "memory.md"):
        cells = text(page) if page != "glossary.md" else "\n".join(re.findall(r"^\| ([^|]+) \|", text(page), re.M))
        for span in re.findall(r"`([^`\n]+)`", cells):
            if match := re.match(r"(?:--)?(\w+)\.([\w-]+)", span):
                key = f"{match[1]}.{match[2].replace('-', '_')}"
                assert match[1] not in tables or key in keys or f"{match[2]}" in ("jsonl", "py"), f"{page}: {span}"


def test_every_example_is_quoted_and_short() -> None:
    for path in (ROOT / "examples" / "extending").glob("*.py"):
        lines = path.read_text(encoding="utf-8").rstrip()
        assert f"`examples/extending/{path.name}`:\n\n```python\n{lines}\n```" in text("extending.md"), path.name
        assert len(lines.splitlines()) <= 80, path.name


def test_recipes_that_are_shown_can_be_read(tmp_path: Path) -> None:
    found = 0
    for page in sorted(DOCS.glob("*.md")):
        for block in re.findall(r"(?<!:\n\n)^```toml\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            if "{" in block or not {"data", "train", "model", "init"} & tomllib.loads(block).keys():
                continue
            path = tmp_path / f"{page.stem}-{(found := found + 1)}.toml"
            path.write_text(block)
            parse(Recipe, file_settings(path), prog=page.name)
    assert found >= 2


def test_messages_that_are_explained_exist() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py")))
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # texts that the source breaks into lines
    others = {"CUDA out of memory"}  # torch's
    cells = re.findall(r"^\| ([^|]+) \|", text("troubleshooting.md"), re.M)
    quoted = [span for cell in cells for span in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 15
    for span in quoted:
        words = span.strip().rstrip(":")
        assert span in others or words in sources, f"no message of the program holds: {span}"


def test_the_figures_of_the_tutorial_are_those_of_the_tables(write_docs: ModuleType) -> None:
    """docs/llama-7b.md: state under ZeRO-2 and 3, activations, checkpoint and export, FLOPs of a step."""
    from arriero.observe.throughput import flops_per_token

    one = write_docs.recipe("llama-7b-zero-8p")
    two, three = (
        write_docs.state_bytes(write_docs.recipe("llama-7b-zero-8p", parallel__zero_stage=z), 8) for z in (2, 3)
    )
    page = re.sub(r"\s+", " ", text("llama-7b.md"))
    assert f"{two / 1e9:.1f} GB under ZeRO-2, {three / 1e9:.1f} GB under ZeRO-3" in page
    assert f"{write_docs.minimum_bytes(one, 8)['activations'] / 1e9:.1f} GB for a micro-batch of 8" in page
    assert f"takes {write_docs.checkpoint_bytes(one.model_config(), 'bfloat16') / 1e9:.0f} GB" in page
    assert f"takes {2 * write_docs.count_parameters(one.model_config()) / 1e9:.0f} GB" in page
    flops = flops_per_token(one.model_config(), 2048) * 64 * 2048
    assert f"41.25 GFLOPs ([metrics](metrics.md)) = {flops / 1e15:.2f} PFLOPs" in page
    seconds = [flops / (8 * peak * 1e12 * 0.4) for peak in (989, 312)]
    assert f"{seconds[0]:.1f} s at 40% of an H100's 989 TFLOP/s, {seconds[1]:.1f} s at 40% of an A100's 312" in page


def test_the_site_builds_and_every_page_is_in_its_order(tmp_path: Path) -> None:
    """In strict mode a dead link, a missing anchor or a page outside the order is an error."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site")))
    for page in DOCS.glob("*.md"):
        assert (tmp_path / "site" / page.with_suffix(".html").name).is_file()
        assert f"({page.name})" in text("index.md") or page.name == "index.md", f"docs/index.md lacks {page.name}"
