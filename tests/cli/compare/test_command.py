from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import tyro

from arriero.cli.compare.command import CompareArgs, run
from arriero.common.errors import UserError


def csv(path: Path, losses: list[float], norms: list[float] | None = None) -> Path:
    rows = ["iteration,lm_loss" + (",grad_norm" if norms else "")]
    for i, loss in enumerate(losses):
        rows.append(f"{i + 1},{loss}" + (f",{norms[i]}" if norms else ""))
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return csv(tmp_path / "a.csv", [8.0, 7.0, 6.5], [1.0, 2.0, 3.0])


@pytest.fixture
def b(tmp_path: Path) -> Path:
    return csv(tmp_path / "b.csv", [8.0, 7.07, 6.5], [1.0, 2.0, 3.3])


def test_exit_codes(a: Path, b: Path) -> None:
    assert run(CompareArgs(a, a, max_rel=0)) == 0
    assert run(CompareArgs(a, b)) == 1
    assert run(CompareArgs(a, b, quantity=("lm_loss",))) == 0
    with pytest.raises(UserError, match="no such file"):
        run(CompareArgs(a, a.with_name("c.csv")))


def test_arguments_parse(a: Path, b: Path) -> None:
    line = [str(a), str(b), "--max-rel", "1e-5", "--quantity", "lm_loss", "grad_norm", "--json"]
    expected = CompareArgs(a, b, max_rel=1e-5, quantity=("lm_loss", "grad_norm"), json=True)
    assert tyro.cli(CompareArgs, args=line) == expected


def test_what_a_person_reads_fits_60_columns(
    a: Path, b: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    run(CompareArgs(a, b))
    out = capsys.readouterr().out
    assert re.search(r"^relative error, max +0\.01 +0\.1 *$", out, re.M)
    assert re.search(r"^  at iteration +2 +3 *$", out, re.M)
    assert re.search(r"^verdict +pass +FAIL *$", out, re.M)
    assert "- grad_norm: 1 of 3 steps beyond the limit, the first at 3." in out
    assert "To compare the loss alone: --quantity lm_loss" in out
    assert out.rstrip().splitlines()[-1].startswith("FAIL (--out DIR")
    assert all(len(line) <= 60 for line in out.splitlines() if "csv" not in line)


def test_json_is_all_that_json_prints(a: Path, b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv(b, [8.0, math.nan, 6.5])
    assert run(CompareArgs(a, b, json=True)) == 1
    out = capsys.readouterr().out
    result = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert result["passed"] is False
    assert result["quantities"]["lm_loss"]["finite_in_one_only"] == [2]
    assert result["quantities"]["lm_loss"]["max_relative"] == 0
    assert list(result["quantities"]) == ["lm_loss"]


def test_report_of_a_failure(a: Path, b: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "report"
    assert run(CompareArgs(a, b, out=out)) == 1
    assert sorted(p.name for p in out.iterdir()) == ["compare.html", "compare.md", "compare.png"]
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    markdown = (out / "compare.md").read_text()
    assert "# Comparison: FAIL" in markdown
    assert "| relative error, max | 0.01 | 0.1 |" in markdown
    assert "| 3 | 3 | 3.3 | 0.1 |" in markdown
    assert "(compare.png)" in markdown
    page = (out / "compare.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page
    assert str(out / "compare.md") in capsys.readouterr().out


@pytest.mark.parametrize("losses", [[8.0], [8.0, 7.0, 6.5], [math.nan, 7.0, 6.5], [0.0, 0.0], [math.nan, math.nan]])
def test_report_of_odd_runs(a: Path, tmp_path: Path, losses: list[float]) -> None:
    b = csv(tmp_path / "b.csv", losses)
    assert run(CompareArgs(a, b, out=tmp_path / "out")) == int(losses[:2] != [8.0, 7.0][: len(losses[:2])])
    assert (tmp_path / "out" / "compare.md").read_text().startswith("# Comparison: ")


def test_an_unusable_input_writes_nothing(a: Path, tmp_path: Path) -> None:
    other = csv(tmp_path / "b.csv", [])
    with pytest.raises(UserError, match="no training step"):
        run(CompareArgs(a, other, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
