from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from small_inputs import write_records

from arriero.cli.inspect.dataset import inspect, recognises
from arriero.common.errors import UserError
from arriero.data import prefetch
from arriero.data.batches import Batches
from arriero.data.config import DataConfig
from arriero.data.indexed import IndexedDataset, IndexedWriter
from arriero.data.manifest import read_manifest
from arriero.data.prefetch import Prefetch

Prepare = Callable[..., str]


def test_a_set_by_any_of_its_names(tmp_path: Path, prepare: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    out = prepare(write_records(tmp_path, "jsonl"), format="alpaca")
    for name in (out, f"{out}_text_document", f"{out}_text_document.idx", f"{out}_text_document.bin"):
        assert recognises(Path(name))
        assert inspect(Path(name), verify=True) == 0
        text = capsys.readouterr().out
        assert "3 documents" in text
        assert "bytes a token" in text
        assert "⟦<s>⟧Below is" in text
        assert "both files equal the manifest's SHA-256" in text
    assert not recognises(tmp_path)
    with pytest.raises(UserError, match="no data set at"):
        inspect(tmp_path / "none")


def test_the_loss_mask_is_visible(tmp_path: Path, prepare: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    out = prepare(write_records(tmp_path, "jsonl"), format="alpaca-sft")
    capsys.readouterr()
    assert inspect(Path(out), json=True, figure=tmp_path / "lengths.png") == 0
    reports = json.loads(capsys.readouterr().out)
    assert [r["prefix"].rpartition("_packed_")[2] for r in reports] == [
        "input_ids_document",
        "attention_mask_document",
        "labels_document",
    ]
    (no_loss, prompt), (loss, answer) = reports[0]["first"][0]
    assert (no_loss, loss) == ("no loss", "loss")
    assert prompt.endswith("### Response:\n")
    assert answer == "Paco⟦</s>⟧"
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert inspect(Path(out), figure=tmp_path / "without_suffix") == 0
    assert f"figure     {tmp_path}/without_suffix.png" in capsys.readouterr().out
    assert (tmp_path / "without_suffix.png").is_file()


def test_a_flipped_bit_and_a_cut_file_are_found(
    tmp_path: Path, prepare: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    out = prepare(write_records(tmp_path, "jsonl"), format="alpaca")
    payload = Path(f"{out}_text_document.bin")
    raw = bytearray(payload.read_bytes())
    raw[100] ^= 1
    payload.write_bytes(raw)
    assert inspect(Path(out)) == 0
    assert inspect(Path(out), verify=True) == 1
    assert "SHA-256 differs from the manifest" in capsys.readouterr().out
    payload.write_bytes(raw[:-2])
    assert inspect(Path(out)) == 1
    assert "sequence 2 has" in capsys.readouterr().out


def test_a_foreign_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with IndexedWriter(tmp_path / "foreign", np.dtype(np.int32)) as writer:
        writer.add([5, 6])
        writer.end_document()
    assert inspect(tmp_path / "foreign") == 0
    text = capsys.readouterr().out
    assert "5 6" in text
    assert "no manifest" in text


def test_merged_sets_follow_each_other(tmp_path: Path, prepare: Prepare) -> None:
    made = []
    for n in range(2):
        source = tmp_path / f"{n}.txt"
        source.write_text(f"words of {n}\nmore\n")
        made.append(prepare(source, out=str(tmp_path / "out" / f"part{n}")))
    out = str(tmp_path / "out" / "both")
    prepare(*made, merge=True, out=out)
    joined = IndexedDataset(f"{out}_text_document")
    parts = [IndexedDataset(f"{one}_text_document") for one in made]
    assert [joined[i].tolist() for i in range(4)] == [part[i].tolist() for part in parts for i in range(2)]
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest["records"]["out"] == 4
    assert inspect(Path(out), verify=True) == 0
    with pytest.raises(UserError, match="give --overwrite"):
        prepare(*made, merge=True, out=out)
    with pytest.raises(UserError, match="needs two or more"):
        prepare(made[0], merge=True, out=out + "2")
    with pytest.raises(UserError, match="both an input and the output"):
        prepare(*made, merge=True, out=f"{tmp_path}/out/../out/part0", overwrite=True)
    prepare(*made, merge=True, out=str(tmp_path / "out" / "bo"))  # `both_text_document` is a neighbour of it
    prepare(*made, merge=True, out=str(tmp_path / "out" / "b[ot]h"))
    with pytest.raises(UserError, match="give --overwrite"):
        prepare(*made, merge=True, out=str(tmp_path / "out" / "b[ot]h"))
    Path(f"{made[0]}_text_document.bin").write_bytes(b"\0\0")
    with pytest.raises(UserError, match="SHA-256 differs"):
        prepare(*made, merge=True, out=out + "2")


def test_prefetched_batches_are_the_same_in_order(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.dtype(np.uint16)) as writer:
        for n in range(50):
            writer.add(np.full(9, n))
            writer.end_document()
    batches = Batches(DataConfig(prefix=str(tmp_path / "a"), split="1,0,0"), sequence_length=8, global_batch=4, seed=0)
    with Prefetch(lambda step: batches.batch(step, 0, 4), range(3, 20)) as ready:
        found = [batch.tokens.tolist() for batch in ready]
    assert found == [batches.batch(step, 0, 4).tokens.tolist() for step in range(3, 20)]


def test_prefetch_measures_how_long_the_reader_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(perf_counter=iter([1.0, 1.25, 7.0, 7.5]).__next__)
    monkeypatch.setattr(prefetch, "time", clock)
    waited = []
    with Prefetch(lambda n: n, range(2)) as ready:
        for _ in ready:
            waited.append(ready.waited_ms)
            if len(waited) == 2:
                break
    assert waited == [250.0, 500.0]


def test_prefetch_hands_on_errors_and_stops_early() -> None:
    with Prefetch(lambda n: 1 // (2 - n), range(9)) as ready:
        for _ in range(3):  # whoever asks again does not wait for ever
            with pytest.raises(ZeroDivisionError):
                list(ready)
    with Prefetch(lambda n: n, range(10**9)) as ready:
        assert next(iter(ready)) == 0
    assert not ready._thread.is_alive()
