from __future__ import annotations

import errno
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.common.errors import UserError
from arriero.observe import line_file as lines
from arriero.observe.line_file import WriteErrors
from arriero.observe.metrics import MetricsWriter, StepMetrics, ValidationMetrics, read_metrics

STEP = StepMetrics(
    iteration=3, iterations=50000, consumed_samples=768, consumed_tokens=1572864, elapsed_ms=33818.0,
    learning_rate=1.40625e-7, global_batch=256, lm_loss=12.0082, loss_scale=1.0, grad_norm=9.216, sequence_length=2048,
    skipped_iterations=0, nan_iterations=0, samples_per_second=7.57, tokens_per_second_per_device=484.5, tflops=107.09,
    mfu=None, data_wait_ms=0.4, eta_seconds=1690798.5,
)  # fmt: skip


def write(path: Path, *steps: StepMetrics | ValidationMetrics) -> None:
    with MetricsWriter(path) as writer:
        for step in steps:
            writer.write(step)


def test_a_line_holds_the_contract_s_keys_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    write(path, STEP, ValidationMetrics(iteration=3, lm_loss=2.0, perplexity=math.exp(2.0)))
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert list(first) == [
        "kind", "iteration", "iterations", "consumed_samples", "consumed_tokens", "elapsed_ms", "learning_rate",
        "global_batch", "lm_loss", "loss_scale", "grad_norm", "sequence_length", "skipped_iterations", "nan_iterations",
        "samples_per_second", "tokens_per_second_per_device", "tflops", "mfu", "data_wait_ms", "eta_seconds",
        "mfu_full", "hfu", "forward_ms", "backward_ms", "communication_ms", "optimizer_ms", "checkpoint_ms",
        "validation_ms", "logging_ms",
    ]  # fmt: skip
    assert first["kind"] == "step"
    assert first["mfu"] is None
    assert second == {"kind": "validation", "iteration": 3, "lm_loss": 2.0, "perplexity": math.exp(2.0)}


@given(st.lists(st.floats(), min_size=1, max_size=5))
def test_any_float_comes_back(tmp_path_factory: pytest.TempPathFactory, losses: list[float]) -> None:
    path = tmp_path_factory.mktemp("m") / "metrics.jsonl"
    write(path, *(replace(STEP, iteration=i, lm_loss=loss) for i, loss in enumerate(losses, 1)))
    text = path.read_text()
    json.loads(text.splitlines()[0], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    read = [r["lm_loss"] for r in read_metrics(path)]
    assert [repr(x) for x in read] == [repr(x) for x in losses]


def test_every_write_is_readable_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(STEP)
        assert len(read_metrics(path)) == 1


def test_resume_repeats_no_iteration(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, *(replace(STEP, iteration=i) for i in range(1, 8)), ValidationMetrics(7, 1.0, math.e))
    with MetricsWriter(path) as writer:
        writer.truncate_after(5)
        writer.write(replace(STEP, iteration=6))
    assert [r["iteration"] for r in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_to_nothing_and_beyond_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, STEP)
    with MetricsWriter(path) as writer:
        writer.truncate_after(9)
        assert len(read_metrics(path)) == 1
        writer.truncate_after(0)
        assert read_metrics(path) == []


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_half_written_last_line_is_repaired(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, *(replace(STEP, iteration=i) for i in range(1, 4)))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:kept]) + lines[kept][:40])
    assert [r["iteration"] for r in read_metrics(path)] == list(range(1, kept + 1))
    write(path, replace(STEP, iteration=kept + 1))
    assert [r["iteration"] for r in read_metrics(path)] == list(range(1, kept + 2))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{broken", "line 2: not JSON"),
        ("[1]", "line 2: the whole is a list"),
        ('{"iteration": "4"}', "line 2: iteration is"),
        ('{"iteration": 4, "lm_loss": 1.0, "lm_loss": 2.0}', "line 2: key 'lm_loss' stands twice"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n' + line + "\n")
    with pytest.raises(UserError, match=problem) as raised:
        read_metrics(path)
    assert str(path) in str(raised.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_metrics(tmp_path / "metrics.jsonl")


BAD_LINES = [
    b"{broken", b"", b"[1]", b"null", b'{"iteration": "4"}', b'{"iteration": 4.5}', b'{"iteration": 1e400}',
    b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b'{"iteration": 99999999999999999999999}', b"x" * (2 << 20), b"\0" * 100,
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_resume_passes_over_a_bad_line_and_names_it(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"iteration": i}).encode() for i in (1, 2, 3)]
    path.write_bytes(b"\n".join([good[0], bad, good[1], good[2], b'{"iteration": 4']))
    with MetricsWriter(path) as writer:
        told = writer.truncate_after(2)
        writer.write(replace(STEP, iteration=3))
    assert len(told) == 1
    assert f"{path}, line 2: " in told[0]
    assert len(told[0]) < 1000
    skipped: list[str] = []
    assert [r["iteration"] for r in read_metrics(path, skipped=skipped)] == [1, 2, 3]
    assert skipped == told
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(0, 9))
def test_any_order_of_lines_is_cut_to_those_before_the_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], after: int
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("m") / "metrics.jsonl"
    path.write_text("".join(json.dumps({"iteration": i, "n": n}) + "\n" for n, i in enumerate(order)))
    with MetricsWriter(path) as writer:
        assert writer.truncate_after(after) == []
    assert [(r["iteration"], r["n"]) for r in read_metrics(path)] == [(i, n) for n, i in enumerate(order) if i <= after]


def test_going_back_while_the_disk_is_full_takes_back_what_waits_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    path = tmp_path / "metrics.jsonl"
    told: list[str] = []
    writer = MetricsWriter(path, WriteErrors(told.append))
    for i in (1, 2, 3):
        writer.write(replace(STEP, iteration=i))

    def full(handle: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lines.os, "write", full)
        for i in (4, 5):
            writer.write(replace(STEP, iteration=i))
        assert writer.truncate_after(2) == []
        for i in (3, 4):
            writer.write(replace(STEP, iteration=i, lm_loss=1.0))
    writer.close()
    assert [(r["iteration"], r["lm_loss"] == 1.0) for r in read_metrics(path)] == [
        (1, False), (2, False), (3, True), (4, True)
    ]  # fmt: skip
    assert len(told) == 2
