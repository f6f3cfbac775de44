from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from arriero.common.errors import UserError
from arriero.data.demo_corpus import corpus_records, corpus_texts, train_tokenizer, write_corpus

MODULE = '''"""Something that speaks for long enough to be kept, in one sentence."""
raise SystemExit("this module must never run")

def join(a, *p, sep="/"):
    """Joins the parts with the separator,

        and keeps its indented lines
    as they are.
    """

def _private():
    """Something that speaks for long enough, but of what nobody should use."""

def short():
    """Too short."""

class Path(str):
    """A path, which is described here at some length."""

    def parent(self):
        """The directory that holds it, which is described at some length."""
'''


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    for folder in ("os", "test", "site-packages/torch", "pydoc_data", "_secret"):
        (root / folder).mkdir(parents=True)
    (root / "os" / "path.py").write_text(MODULE)
    (root / "os" / "__init__.py").write_text('"""Routines for the operating system, long enough to be kept."""\n')
    (root / "_secret" / "path.py").write_text(MODULE.replace("Joins", "Mixes"))
    (root / "test" / "path.py").write_text(MODULE.replace("Joins", "Tests"))
    (root / "site-packages" / "torch" / "path.py").write_text(MODULE.replace("Joins", "Multiplies"))
    (root / "broken.py").write_text("def (:\n")
    (root / "latin.py").write_bytes(b'"""caf\xe9, which is no UTF-8 and declares no other encoding."""\n')
    (root / "surrogate.py").write_text(
        '"""Half a surrogate pair \\ud800 must not reach the file, whatever happens."""\n'
    )
    (root / "pydoc_data" / "topics.py").write_text("topics = {'assert': 'The assert statement\\n', 'if': 'The if'}\n")
    return root


def test_records_of_a_small_library(stdlib: Path) -> None:
    records = corpus_records(stdlib)
    found = {record["instruction"]: record for record in records}
    assert set(found) == {
        "Document the module os.", "Document the module os.path.", "Document the function os.path.join.",
        "Document the class os.path.Path.", "Document the method os.path.Path.parent.",
        "Document the module surrogate.", "Explain the Python topic assert.", "Explain the Python topic if.",
    }  # fmt: skip
    join = found["Document the function os.path.join."]
    assert join["input"] == "join(a, *p, sep='/')"
    assert join["output"] == "Joins the parts with the separator,\n\n    and keeps its indented lines\nas they are."
    assert found["Document the class os.path.Path."]["input"] == "class Path(str)"
    assert found["Explain the Python topic assert."] == {
        "instruction": "Explain the Python topic assert.", "input": "", "output": "The assert statement",
    }  # fmt: skip
    assert "\ud800" not in found["Document the module surrogate."]["output"]


def test_the_order_is_the_same_in_any_process(stdlib: Path) -> None:
    code = "import sys, pathlib; from arriero.data.demo_corpus import corpus_records; "
    code += "print([r['instruction'] for r in corpus_records(pathlib.Path(sys.argv[1]))])"
    elsewhere = subprocess.run([sys.executable, "-c", code, str(stdlib)], capture_output=True, text=True, check=True)
    assert elsewhere.stdout.strip() == str([record["instruction"] for record in corpus_records(stdlib)])


def test_no_documentation_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no documentation"):
        corpus_records(tmp_path)


def test_this_python_has_enough_and_nothing_is_imported(tmp_path: Path) -> None:
    before = set(sys.modules)
    stats = write_corpus(tmp_path / "demo" / "corpus.parquet")
    new = {name for name in set(sys.modules) - before if not name.startswith(("pyarrow", "numpy"))}
    assert not new & {"this", "antigravity", "idlelib", "tkinter", "turtle"}
    texts = corpus_texts(tmp_path / "demo" / "corpus.parquet")
    assert stats.records == len(texts) > 2000
    assert stats.characters == sum(len(text) - 2 for text in texts) > 1_000_000
    assert [p.name for p in (tmp_path / "demo").iterdir()] == ["corpus.parquet"]


TEXT = "The path of a file: join(a, *p) joins 1234 parts.\n    indented  twice\n\tand with a tab\n"


@pytest.fixture
def tokenizer(tmp_path: Path) -> sentencepiece.SentencePieceProcessor:
    texts = [TEXT, *(f"{word} of the {word}ing, and {word}s in {n}" for n, word in enumerate(["file", "path", "run"]))]
    file = train_tokenizer(texts * 5, tmp_path / "tokenizer", 340)
    assert file == tmp_path / "tokenizer" / "tokenizer.model"
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


def test_the_tokenizer_is_llama_s_kind(tokenizer: sentencepiece.SentencePieceProcessor, tmp_path: Path) -> None:
    assert tokenizer.vocab_size() == 340
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (0, 1, 2, -1)
    assert [tokenizer.id_to_piece(i) for i in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert all(len(p) == 1 for p in tokenizer.encode("1234", out_type=str)[1:])
    assert tokenizer.encode("a\nb", out_type=str).count("<0x0A>") == 1
    assert tokenizer.encode("<s>") != [1]
    config = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "LlamaTokenizer"


@pytest.mark.parametrize("text", [TEXT, "", " ", "  two blanks,  twice  ", "日本語 😀 café", "</s><unk>", "\n\n\t\x00"])
def test_every_text_comes_back(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_twice_gives_the_same_file(tmp_path: Path) -> None:
    models = [train_tokenizer([TEXT] * 3, tmp_path / name, 310).read_bytes() for name in ("a", "b")]
    assert models[0] == models[1]


@pytest.mark.parametrize(("texts", "size"), [([TEXT], 9000), ([TEXT], 100), ([], 400), (["\n"], 400)])
def test_an_impossible_size_is_one_error_and_leaves_nothing(tmp_path: Path, texts: list[str], size: int) -> None:
    with pytest.raises(UserError, match=f"no tokenizer of {size} pieces") as raised:
        train_tokenizer(texts, tmp_path / "tokenizer", size)
    assert raised.value.fix
    assert not (tmp_path / "tokenizer").exists()
