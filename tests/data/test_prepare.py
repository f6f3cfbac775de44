from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from small_inputs import files_in, train_sentencepiece, write_records

from arriero.cli.prepare import PrepareArgs, run
from arriero.common.errors import UserError
from arriero.data.indexed import IndexedDataset
from arriero.data.manifest import read_manifest
from arriero.data.output import writing_output
from arriero.data.prepare import prepare as prepare_data
from arriero.data.prepare_config import PrepareConfig
from arriero.data.tokenizer import Tokenizer

Prepare = Callable[..., str]


def documents(prefix: str, tokenizer: Tokenizer) -> list[str]:
    found = IndexedDataset(prefix)
    return [tokenizer.decode(found[i]) for i in range(len(found))]


def test_text_lines_become_documents_between_bos_and_eos(
    tmp_path: Path, prepare: Prepare, tokenizer: Tokenizer
) -> None:
    source = tmp_path / "a.txt"
    source.write_text("first line\n\n  second <s> line\n")
    out = prepare(source)
    found = IndexedDataset(f"{out}_text_document")
    assert [found[i].tolist() for i in range(len(found))] == [
        [1, *tokenizer.encode("first line"), 2],
        [1, *tokenizer.encode("  second <s> line"), 2],
    ]
    assert files_in(tmp_path / "out") == ["set.manifest.json", "set_text_document.bin", "set_text_document.idx"]


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_alpaca_records_give_the_stanford_text(
    tmp_path: Path, prepare: Prepare, tokenizer: Tokenizer, kind: str
) -> None:
    out = prepare(write_records(tmp_path, kind), format="alpaca")
    texts = documents(f"{out}_text_document", tokenizer)
    assert texts[0].endswith("completes the request.\n\n### Instruction:\nName a llama.\n\n### Response:\nPaco")
    assert texts[1].endswith("### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:\n2")
    assert texts[2].endswith("### Instruction:\nSing ü <s>\n\n### Response:\nla\nla")
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest["records"] == {"in": 3, "out": 3, "quarantined": 0, "empty": 0}


def bad_inputs(directory: Path) -> dict[str, tuple[Path, dict[str, object], str]]:
    broken = directory / "broken.jsonl"
    broken.write_text('{"text": "good"}\n{"text": \n')
    whole = write_records(directory, "parquet").read_bytes()
    cut = directory / "cut.parquet"
    cut.write_bytes(whole[: len(whole) // 2])
    text = directory / "a.txt"
    text.write_text("a line\n")
    return {
        "missing file": (directory / "none.txt", {}, "no such file"),
        "broken line": (broken, {}, r"broken\.jsonl:2: broken JSON"),
        "cut parquet": (cut, {"format": "alpaca"}, r"cut\.parquet"),
        "unknown format": (text, {"format": "alpacca"}, "did you mean 'alpaca'"),
        "no tokenizer": (text, {"tokenizer": directory}, "holds no tokenizer.model"),
        "tokenizer missing": (text, {"tokenizer": None}, "--tokenizer is missing"),
        "idle template": (text, {"template": "vicuna"}, "--template has no effect"),
        "columns of text": (text, {"format": "alpaca"}, "text files have none"),
    }


@pytest.mark.parametrize("case", list(bad_inputs(Path(__import__("tempfile").mkdtemp()))))
def test_bad_input_is_one_message_and_leaves_nothing(tmp_path: Path, prepare: Prepare, case: str) -> None:
    source, options, message = bad_inputs(tmp_path)[case]
    with pytest.raises(UserError, match=message):
        prepare(source, **options)
    assert files_in(tmp_path / "out") == []


def test_a_tokenizer_without_bos_is_refused_unless_told(tmp_path: Path, prepare: Prepare) -> None:
    source = tmp_path / "a.txt"
    source.write_text("a line\n")
    train_sentencepiece(tmp_path / "tokenizer.model", bos_id=-1, eos_id=1)
    with pytest.raises(UserError, match=r"has no BOS token\s+fix: give --no-bos"):
        prepare(source, tokenizer=tmp_path)
    assert files_in(tmp_path / "out") == []
    assert IndexedDataset(prepare(source, tokenizer=tmp_path, bos=False) + "_text_document").tokens[-1] == 1


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    args = PrepareArgs(inputs=("none.txt",), out=str(tmp_path / "o"), format="tex", workers=-1)
    with pytest.raises(UserError, match="4 problems:") as error:
        run(args)
    for word in ("none.txt", "--tokenizer", "'text'", "--workers"):
        assert word in str(error.value)


def test_the_function_and_the_verb_write_the_same(tmp_path: Path, tokenizer_dir: Path, prepare: Prepare) -> None:
    source = tmp_path / "a.txt"
    source.write_text("a line\nand another\n")
    config = PrepareConfig(inputs=(str(source),), out=str(tmp_path / "function" / "a"), tokenizer=tokenizer_dir)
    prepared = prepare_data(config)
    assert prepared.prefixes == [f"{tmp_path}/function/a_text_document"]
    assert not prepared.reused
    assert prepared.manifest["records"]["out"] == 2
    assert prepare_data(config).reused
    by_verb = Path(f"{prepare(source)}_text_document.bin").read_bytes()
    assert Path(f"{prepared.prefixes[0]}.bin").read_bytes() == by_verb
    with pytest.raises(UserError, match=r"--max-bad is 2.0\s+fix: give a number from 0 to 1"):
        prepare_data(dataclasses.replace(config, max_bad=2.0))


@pytest.mark.parametrize("merge", [False, True])
def test_only_one_process_writes_a_name(tmp_path: Path, prepare: Prepare, merge: bool) -> None:
    source = tmp_path / "a.txt"
    source.write_text("a line\n")
    made = [prepare(source, out=str(tmp_path / "out" / name)) for name in "ab"]
    out = str(tmp_path / "out" / "c")
    with writing_output(out), pytest.raises(UserError, match="another process is preparing"):
        prepare(*(made if merge else [source]), merge=merge, out=out)
    prepare(*(made if merge else [source]), merge=merge, out=out)


def test_a_second_run_reuses_or_refuses(tmp_path: Path, prepare: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.txt"
    source.write_text("a line\n")
    out = prepare(source)
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path / "out").iterdir()}
    assert prepare(source, workers=1) == out
    assert "same inputs and options" in capsys.readouterr().out
    assert {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path / "out").iterdir()} == before
    with pytest.raises(UserError, match="different: eos"):
        prepare(source, eos=False)
    source.write_text("another line\n")
    with pytest.raises(UserError, match="different: input files"):
        prepare(source)
    prepare(source, overwrite=True)
    assert len(IndexedDataset(f"{out}_text_document")) == 1


def test_args_are_a_frozen_dataclass_with_help() -> None:
    assert dataclasses.is_dataclass(PrepareArgs)
    assert PrepareArgs.__doc__
