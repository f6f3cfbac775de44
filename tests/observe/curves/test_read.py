from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.common.errors import UserError
from arriero.observe.curves.read import read_curves

ASCENDSPEED = (
    " iteration {i:8d}/   50000 | consumed samples: {s:12d} | consumed tokens:      1572864 |"
    " elapsed time per iteration (ms): 33818.0 | learning rate: 1.406E-07 | global batch size:   256 |{loss}"
    " loss scale: 1.0 | grad norm: 9.216 | actual seqlen:  2048 | number of skipped iterations:   0 |"
    " number of nan iterations:   0 | samples per second: 7.570 | TFLOPs: 107.09 |\n"
)
README_SAMPLE = (  # with the spelling and the line break that AscendSpeed's own page shows
    " iteration  3/50000 | consumed samples: 768 | consumed tokens:  1572864 |"
    " elapsed time per iteration (ms):  33818.0 | learning rate:    1.406E-07 | gloabl batch size:  256 |"
    " lm loss:  1.200820E+01 | loss scale:  1.0 | grad norm:    9.216 | actual seqlen:  2048 | number of skipped\n"
    "iterations: 0 | number of nan iterations:   0 | samples per second: 7.570 | TFLOPs: 107.09 |\ntime (ms)\n"
)
MEGATRON = (
    " [2026-08-22 15:22:22.123456] iteration        3/   50000 | consumed samples:          768 |"
    " elapsed time per iteration (ms): 33818.0 | throughput per GPU (TFLOP/s/GPU): 107.1 |"
    " learning rate: 1.406000E-07 | global batch size:   256 | lm loss: 1.200820E+01 | loss scale: 1.0 |"
    " grad norm: 9.216 | num zeros: 4 | number of skipped iterations:   0 | number of nan iterations:   0 |\n"
)
MINDSPEED_LLM = (
    " [2025-01-22 15:22:22] iteration        3/   50000 | consumed samples:          768 |"
    " elapsed time per iteration (ms): 33818.0 | throughput per GPU (TFLOP/s/GPU): 107.1 | core attn ratio (%): 8.1 |"
    " learning rate: 1.406000E-07 | global batch size:   256 | lm loss: 1.200820E+01 | loss scale: 1.0 |"
    " grad norm: 9.216 | number of skipped iterations:   0 | number of nan iterations:   0 |\n"
)
MINDSPEED_FSDP2 = (
    "iteration: 3 | consumed samples: 768 | elapsed time per iteration (ms): 33818.0 | throughput(samples/s): 7.57 |"
    " learning rate: 1.406000E-07 | global batch size: 256 | lm loss: 12.0082 | grad norm: 9.216\n"
)
PIECES = st.sampled_from(
    ["iteration", ",", "lm_loss", "\n", "1", "nan", " iteration 7/9 |", " elapsed time per iteration (ms): 1 |",
     " lm loss: ", "|", '{"iteration": 1, "lm_loss": 2}', '"']
)  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        ASCENDSPEED.format(i=3, s=768, loss=" lm loss: 1.200820E+01 |"),
        README_SAMPLE,
        MEGATRON,
        MINDSPEED_LLM,
        MINDSPEED_FSDP2,
        MINDSPEED_FSDP2.rstrip() + " | tokens/s: 1938 | mfu: 0.34 |\n",
        "[default7]:" + MEGATRON.replace("\n", "\r\n"),
    ],
    ids=[
        "ascendspeed",
        "ascendspeed page",
        "megatron",
        "mindspeed-llm",
        "fsdp2",
        "fsdp2 throughput",
        "torchrun prefix",
    ],
)
def test_every_neighbour_s_line_is_read(tmp_path: Path, line: str) -> None:
    log = tmp_path / "train.log"
    log.write_text("building model ...\n" + line + "saving | iteration: none\n")
    curves = read_curves(log)
    assert curves.kind == "Megatron's, MindSpeed's, AscendSpeed's or arriero's log"
    assert curves.iterations == {3}
    assert curves.columns["lm_loss"] == {3: 12.0082}
    assert curves.columns["grad_norm"] == {3: 9.216}
    assert curves.columns["consumed_samples"] == {3: 768}


def test_validation_lines_are_no_training_steps(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    frame = "-" * 80 + "\n"
    line = " validation loss at iteration 4 | lm loss value: 2.500000E+00 | lm loss PPL: 1.218249E+01 | \n"
    log.write_text(MEGATRON + frame + line + frame + "  successfully saved checkpoint from iteration       4 to x\n")
    curves = read_curves(log)
    assert curves.iterations == {3}
    assert curves.columns["validation_loss"] == {4: 2.5}


def test_a_vanished_loss_is_a_nan_and_a_skipped_step_is_none(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    skipped = ASCENDSPEED.format(i=2, s=512, loss="").replace("skipped iterations:   0", "skipped iterations:   1")
    log.write_text(ASCENDSPEED.format(i=1, s=256, loss="") + skipped)
    curves = read_curves(log)
    assert list(curves.columns["lm_loss"]) == [1]
    assert math.isnan(curves.columns["lm_loss"][1])
    assert curves.iterations == {1, 2}


@pytest.mark.parametrize("word", ["nan", "NAN", "inf"])
def test_a_printed_non_finite_loss_is_read(tmp_path: Path, word: str) -> None:
    log = tmp_path / "train.log"
    log.write_text(ASCENDSPEED.format(i=1, s=256, loss=f" lm loss: {word} |"))
    assert not math.isfinite(read_curves(log).columns["lm_loss"][1])


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    first, second = (ASCENDSPEED.format(i=i, s=256 * i, loss=" lm loss: 1.2E+01 |") for i in (1, 2))
    log.write_text(first + second[: second.index("1.2E+01") + 2])
    assert read_curves(log).iterations == {1}


def test_after_a_resume_the_later_line_counts(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text("".join(ASCENDSPEED.format(i=i, s=1, loss=f" lm loss: {x} |") for i, x in ((1, 9), (2, 8), (2, 7))))
    assert read_curves(log).columns["lm_loss"] == {1: 9, 2: 7}


def test_run_directory_and_its_metrics_are_the_same(tmp_path: Path) -> None:
    text = '{"kind": "step", "iteration": 1, "lm_loss": "NaN", "grad_norm": 2, "mfu": null}\n'
    text += '{"kind": "validation", "iteration": 1, "lm_loss": 2.5, "perplexity": 12.18}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    for path in (tmp_path, tmp_path / "metrics.jsonl"):
        columns = read_curves(path).columns
        assert math.isnan(columns["lm_loss"][1])
        assert columns["grad_norm"] == {1: 2.0}
        assert columns["validation_loss"] == {1: 2.5}
        assert set(columns) == {"lm_loss", "grad_norm", "validation_loss"}


@pytest.mark.parametrize(
    "text",
    [
        "iteration,lm_loss,grad_norm\n1,8.5,2\n2,,3\n",
        "\ufeffStep;Loss;Grad Norm\n1;8.5;2\n\n2;;3",
        "iter\tlm loss\tgradient norm\n1.0\t8.5\t2\n2\t\t3\n",
    ],
)
def test_csv_of_several_dialects(tmp_path: Path, text: str) -> None:
    for name in ("curve.csv", "curve.txt"):
        (tmp_path / name).write_text(text)
        curves = read_curves(tmp_path / name)
        assert curves.kind == "CSV"
        assert curves.columns == {"lm_loss": {1: 8.5}, "grad_norm": {1: 2.0, 2: 3.0}}


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.csv", "lm_loss\n1\n", "a.csv, line 1: no column named iteration"),
        ("a.csv", "", "a.csv, line 1: no column named iteration"),
        ("a.csv", "iteration,lm_loss\n", "a.csv: no training step in it .read as CSV"),
        ("a.csv", "iteration,lm_loss\n1,x\n", "a.csv, line 2: lm_loss is 'x'"),
        ("a.csv", "iteration,lm_loss\n1,2\n\n1.5,2\n", "a.csv, line 4: iteration is '1.5'"),
        ("a.csv", "iteration,lm_loss\nnan,2\n", "a.csv, line 2: iteration is 'nan'"),
        ("a.csv", "iteration,lm_loss\n1,2,3\n", "a.csv, line 2: 3 values under 2 columns"),
        ("a.log", "hello\n", "a.log: no training step in it .read as a console log"),
        ("a.log", "", "a.log: no training step"),
        ("a.log", ASCENDSPEED.format(i=1, s=1, loss=" lm loss: 1.2.3 |"), "a.log, line 1: lm loss is '1.2.3'"),
        ("a.jsonl", "{broken\n", "a.jsonl, line 1: not JSON"),
        ("a.jsonl", '{"step": 1, "loss": 2.0, "loss": 3.0}\n', "a.jsonl, line 1: key 'loss' stands twice"),
        ("a.json", '[{"step": 1, "loss": 2.0, "loss": 3.0}]', "a.json: key 'loss' stands twice"),
        ("a.jsonl", "", "a.jsonl: no training step"),
        ("missing.log", None, "missing.log: no such file"),
    ],
)
def test_bad_input_names_file_line_and_fix(tmp_path: Path, name: str, text: str | None, problem: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=problem) as raised:
        read_curves(tmp_path / name)
    assert raised.value.fix


def test_a_directory_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl, .* in it"):
        read_curves(tmp_path)


def test_our_own_log_line_is_read(tmp_path: Path) -> None:
    from arriero.observe.logline import arriero_line
    from arriero.observe.metrics import StepMetrics

    step = StepMetrics(
        iteration=7, iterations=9, consumed_samples=8, consumed_tokens=64, elapsed_ms=1.0, learning_rate=1e-3,
        global_batch=8, lm_loss=math.nan, loss_scale=1.0, grad_norm=2.5, sequence_length=8, skipped_iterations=0,
        nan_iterations=1, samples_per_second=1.0, tokens_per_second_per_device=8.0, tflops=0.1, mfu=0.3,
        data_wait_ms=0.0, eta_seconds=3.0,
    )  # fmt: skip
    (tmp_path / "log.txt").write_text(arriero_line(step) + "\n")
    columns = read_curves(tmp_path / "log.txt").columns
    assert math.isnan(columns["lm_loss"][7])
    assert columns["grad_norm"] == {7: 2.5}


@given(st.sampled_from(["log", "csv", "jsonl"]), st.lists(st.one_of(st.text(), PIECES), max_size=12))
def test_no_text_ends_in_anything_but_curves_or_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, pieces: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    path.write_text("".join(pieces), encoding="utf-8", errors="surrogatepass")
    try:
        named = bool(read_curves(path).iterations)
    except UserError as error:
        named = str(path) in str(error)
    assert named
