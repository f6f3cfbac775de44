"""Logs of other systems: samples with the exact text that their sources print, and what must be read of each."""

from __future__ import annotations

import base64
import json
import math
import resource
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.common.errors import UserError
from arriero.observe.compare import compare_runs
from arriero.observe.curves import text_lines as lines_module
from arriero.observe.curves.read import FORMATS, read_curves
from arriero.observe.curves.tensorboard import masked_crc

RED, GREEN, ORANGE, CYAN, RESET = "\x1b[31m", "\x1b[32m", "\x1b[38;2;180;60;0m", "\x1b[36m", "\x1b[39m"
TITAN = "[rank0]:[titan] 2025-07-01 12:00:0{i},123 - root - INFO - "
TORCHTITAN = (
    "".join(
        TITAN.format(i=i) + f"{RED}step: {i:2}  {GREEN}loss: {loss:7.4f}  {ORANGE}grad_norm: {norm:7.4f}  "
        f"\x1b[38;2;54;234;195mmemory: {1.2:5.2f}GiB({1.5:.2f}%)  \x1b[34mtps: {12345:,}  {CYAN}tflops: {1234.5:,.2f}  "
        f"\x1b[35mmfu: {12.34:.2f}%{RESET}\n"
        for i, loss, norm in ((1, 8.5, 2.25), (2, 8.0, 1.5))
    )
    + TITAN.format(i=3)
    + f"\x1b[33mvalidate step: {2:2}  {GREEN}loss: {7.75:7.4f}  memory:  1.20GiB  tps: 1,234{RESET}\n"
)
FLAME = (
    "[titan] 2025-07-01 12:00:00,123 - root - INFO - step:    1,024 token:       4,194,304  loss:  8.5000  "
    "lr: 1.0000e-04 gnorm:  2.25 memory:  1.20GiB tgs:  12,345 mfu: 12.34% [ 0:00:01< 0:01:00]\n"
)
LITGPT = (
    "Epoch 1 | iter 1 step 0 | loss train: 9.000, val: n/a | iter time: 123.45 ms remaining time: 0:01:23\n"
    "Epoch 1 | iter 2 step 1 | loss train: 8.500, val: n/a | iter time: 123.45 ms (step) remaining time: 0:01:23\n"
    "Epoch 1 | iter 3 step 1 | loss train: 8.100, val: n/a | iter time: 123.45 ms remaining time: 0:01:23\n"
    "Epoch 1 | iter 4 step 2 | loss train: 8.000, val: n/a | iter time: 123.45 ms (step) remaining time: 0:01:23\n"
    "iter 4: val loss 7.7500, val time: 456.78 ms\n"
    "Epoch 1 | iter 5 step 2 | loss train: 7.900, val: 7.750 | iter time: 123.45 ms remaining time: 0:01:23\n"
)
NANOGPT = (
    "step 0: train loss 10.9890, val loss 10.9891\n"
    "iter 0: loss 8.5000, time 26541.67ms, mfu -100.00%\n"
    "iter 1: loss 8.0000, time 134.12ms, mfu 12.34%\n"
    "step 2: train loss 7.8000, val loss 7.7500\nsaving checkpoint to out\n"
)
TRAINER_5 = (
    "\r  0%|          | 0/4 [00:00<?, ?it/s]\r 50%|█████     | 2/4 [00:01<00:01,  1.89it/s]"
    "{'loss': '8.5', 'grad_norm': '2.25', 'learning_rate': '5e-05', 'epoch': '0.5'}\n"
    "\r100%|██████████| 4/4 [00:02<00:00,  1.89it/s]"
    "{'loss': '8', 'grad_norm': '1.5', 'learning_rate': '2.5e-05', 'epoch': '1'}\n"
    "{'eval_loss': '7.75', 'eval_runtime': '0.1', 'eval_samples_per_second': '80', 'epoch': '1'}\n"
    "{'train_runtime': '2.1', 'train_samples_per_second': '7.6', 'train_loss': '8.25', 'epoch': '1'}\n"
)
TRAINER_4 = (
    "{'loss': 8.5, 'grad_norm': 2.25, 'learning_rate': 5e-05, 'epoch': 0.5}\n"
    "{'loss': 8.0, 'grad_norm': 1.5, 'learning_rate': 2.5e-05, 'epoch': 1.0}\n"
    "{'eval_loss': 7.75, 'eval_runtime': 0.1, 'eval_samples_per_second': 80.0, 'epoch': 1.0}\n"
    "{'train_runtime': 2.1, 'train_samples_per_second': 7.6, 'train_loss': 8.25, 'epoch': 1.0}\n"
)
STATE = {
    "best_global_step": None, "best_metric": None, "best_model_checkpoint": None, "epoch": 1.0, "eval_steps": 500,
    "global_step": 2, "is_hyper_param_search": False, "is_local_process_zero": True, "is_world_process_zero": True,
    "log_history": [
        {"epoch": 0.5, "grad_norm": 2.25, "learning_rate": 5e-05, "loss": 8.5, "step": 1},
        {"epoch": 1.0, "grad_norm": 1.5, "learning_rate": 2.5e-05, "loss": 8.0, "step": 2},
        {"epoch": 1.0, "eval_loss": 7.75, "eval_runtime": 0.1, "eval_samples_per_second": 80.0, "step": 2},
        {"epoch": 1.0, "step": 2, "total_flos": 1e12, "train_loss": 8.25, "train_runtime": 2.1},
    ],
    "logging_steps": 1, "max_steps": 2, "num_input_tokens_seen": 0, "num_train_epochs": 1, "save_steps": 500,
}  # fmt: skip
LLAMA_FACTORY = (
    '{"current_steps": 1, "total_steps": 2, "loss": 8.5, "lr": 5e-05, "epoch": 0.5, "percentage": 50.0, '
    '"elapsed_time": "0:00:01", "remaining_time": "0:00:01"}\n'
    '{"current_steps": 2, "total_steps": 2, "loss": 8.0, "lr": 2.5e-05, "epoch": 1.0, "percentage": 100.0, '
    '"elapsed_time": "0:00:02", "remaining_time": "0:00:00"}\n'
    '{"current_steps": 2, "total_steps": 2, "eval_loss": 7.75, "epoch": 1.0, "percentage": 100.0}\n'
    '{"current_steps": 2, "total_steps": 2, "epoch": 1.0, "percentage": 100.0, "elapsed_time": "0:00:03"}\n'
)
LLAMA_FACTORY_2023 = (
    '{"current_steps": 1, "total_steps": 2, "loss": 8.5, "eval_loss": null, "predict_loss": null, "reward": null, '
    '"learning_rate": 5e-05, "epoch": 0.5, "percentage": 50.0, "elapsed_time": "0:01", "remaining_time": "0:01"}\n'
    '{"current_steps": 2, "total_steps": 2, "loss": 8.0, "eval_loss": null, "predict_loss": null, "reward": null}\n'
    '{"current_steps": 2, "total_steps": 2, "loss": null, "eval_loss": 7.75, "predict_loss": null, "reward": null}\n'
)
WANDB_CHART = (
    '"Step","gallant-wind-3 - train/loss","gallant-wind-3 - train/loss__MIN","gallant-wind-3 - train/loss__MAX"\n'
    '"1","8.5","8.5","8.5"\n"2","8","8","8"\n'
)
WANDB_HISTORY = (
    ",_step,_runtime,_timestamp,train/loss,train/grad_norm,train/global_step,eval/loss,note\n"
    "0,0,1.5,1751371200.5,8.5,2.25,1,,hello\n1,1,2.5,1751371201.5,8.0,1.5,2,,\n2,2,3.5,1751371202.5,,,2,7.75,\n"
)
TENSORBOARD_CSV = "Wall time,Step,Value\n1751371200.5,1,8.5\n1751371201.5,2,8.0\n"
MEGATRON = "".join(
    f" [2026-08-22 15:22:22.123456] iteration {i:8d}/{2:8d} | consumed samples: {i * 256:12d} | elapsed time per "
    f"iteration (ms): 33818.0 | learning rate: 1.406000E-07 | global batch size:   256 | lm loss: {loss:.6E} | loss "
    f"scale: 1.0 | grad norm: {norm:.3f} | number of skipped iterations:   0 | number of nan iterations:   0 |\n"
    for i, loss, norm in ((1, 8.5, 2.25), (2, 8.0, 1.5))
) + (
    "-" * 100 + "\n validation loss at iteration 2 on validation set | lm loss value: 7.750000E+00 | lm loss PPL: "
    "2.321572E+03 | \n" + "-" * 100 + "\n"
    " validation loss at iteration 2 on test set | lm loss value: 9.000000E+00 | lm loss PPL: 8.103084E+03 | \n"
)
EVENTS = zlib.decompress(base64.b64decode(
    "eNrzYICAf5M85nIqhsf6Nhy65SjFm1SUmJmn51qWmldiZRSkx6VTkppXnF+UlJ9YlKJXXJqbm1hUqVdelFmSWqSXClIVn5aZkxoPESl9XtmgAD"
    "VX8+3KAM6MFIi5AoxawlyCXFwlINP1c/KLi0UZGDgcz2467m4OVf/8xalITqdUuHotLg0ufoj69KLElPi8/KJcJw4ORi0WBgYBBy9uLk4u9uLk"
    "xJzEouJXngLdmlBjzP/HM3C2woxpYNKS5pLkEsrJVQBZqlBWrFCcmFuQkwqxP1XshRCKew/DNDJhcS+Do8GuI49Q3CuYBlePz70H7FHcm2TU/Q"
    "fFvU4wYxpY8LiXwXGx8DpNFPeWwDQyY3Hvgfrd9c8/orj3F0I9Pvc21KO4d9ok6Y0o7jVMh7mXDY97D9SvrXYKkIdqDPR2keBMSIeHlxCXABdn"
    "alliDsy5Pxz2vCzYjeK99nQ80cHkeL4m8JctVH2C58c3nEL58ORjwKXHJZiXX5KqX5JaURIPTblO/BzsQixCTByMTqwZqTk5+V4cXGxcLCAlQl"
    "sPoKbFGfkoYcUNsTy1ID85w4mHg8mIA6L2AWrc/pUIuAsAjFT6Qw=="
))  # fmt: skip
"""Written by tensorboard 2.21's SummaryWriter; its EventAccumulator reads train/loss 8.5, 8.0, nan and then 8.125 again
at step 2, eval/loss 7.75 at step 2, and the tensors train/grad_norm 2.25, 1.5, inf and train/epoch 0.5 at step 3."""

LOSS, NORM, VALIDATION = {1: 8.5, 2: 8.0}, {1: 2.25, 2: 1.5}, {2: 7.75}
SAMPLES = {
    "titan.log": (TORCHTITAN, "torchtitan's log", LOSS, NORM, VALIDATION),
    "flame.log": (FLAME, "torchtitan's log", {1024: 8.5}, {1024: 2.25}, None),
    "lit.log": (LITGPT, "litgpt's log", LOSS, None, VALIDATION),
    "nano.log": (NANOGPT, "nanoGPT's log", LOSS, None, {0: 10.9891, 2: 7.75}),
    "trainer5.log": (TRAINER_5, "Hugging Face Trainer's printed log", LOSS, NORM, VALIDATION),
    "trainer4.log": (TRAINER_4, "Hugging Face Trainer's printed log", LOSS, NORM, VALIDATION),
    "trainer_state.json": (json.dumps(STATE, indent=2), "Hugging Face's trainer state", LOSS, NORM, VALIDATION),
    "one_line.json": (json.dumps(STATE), "Hugging Face's trainer state", LOSS, NORM, VALIDATION),
    "history.json": (json.dumps(STATE["log_history"]), "Hugging Face's trainer state", LOSS, NORM, VALIDATION),
    "trainer_log.jsonl": (LLAMA_FACTORY, "JSON lines", LOSS, None, VALIDATION),
    "trainer_log_2023.jsonl": (LLAMA_FACTORY_2023, "JSON lines", LOSS, None, VALIDATION),
    "wandb_export.csv": (WANDB_CHART, "CSV", LOSS, None, None),
    "history.csv": (WANDB_HISTORY, "CSV", LOSS, NORM, VALIDATION),
    "run-x-tag-train_loss.csv": (TENSORBOARD_CSV, "CSV", LOSS, None, None),
    "tb.csv": (TENSORBOARD_CSV, "CSV", LOSS, None, None),
    "megatron.log": (MEGATRON, "Megatron's, MindSpeed's, AscendSpeed's or arriero's log", LOSS, NORM, VALIDATION),
}


def written(directory: Path, name: str, text: str | bytes) -> Path:
    path = directory / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dressed", [False, True], ids=["plain", "dressed"])
def test_every_format_is_read(tmp_path: Path, name: str, dressed: bool) -> None:
    """Dressed: Windows line ends, carriage returns of a progress bar, colours, and a name that tells nothing."""
    text, kind, loss, norm, validation = SAMPLES[name]
    if dressed:
        console = name.endswith(".log")
        text = text.replace("\n", "\r\n")
        text = "\x1b[1m starting\x1b[0m\r\n\r 10%|█ | 1/9\r" + text if console else "\ufeff" * (kind == "CSV") + text
        if kind != "Hugging Face's trainer state" and "-tag-" not in name:
            name = "any.txt"
    curves = read_curves(written(tmp_path, name, text))
    assert curves.kind == kind
    assert curves.columns["lm_loss"] == loss
    assert curves.columns.get("grad_norm") == norm
    assert curves.columns.get("validation_loss") == validation
    assert set(curves.iterations) == loss.keys()
    assert read_curves(tmp_path / name, {"lm_loss"}).columns == {"lm_loss": loss}


def test_an_event_file_is_read_as_tensorboard_reads_it(tmp_path: Path) -> None:
    written(tmp_path, "events.out.tfevents.1751371200.host.1.0", EVENTS)
    for path in (tmp_path, tmp_path / "events.out.tfevents.1751371200.host.1.0"):
        curves = read_curves(path)
        assert {k: v for k, v in curves.columns["lm_loss"].items() if k < 3} == {1: 8.5, 2: 8.125}
        assert math.isnan(curves.columns["lm_loss"][3])
        assert curves.columns["grad_norm"] == {1: 2.25, 2: 1.5, 3: math.inf}
        assert curves.columns["validation_loss"] == VALIDATION
        assert curves.columns["epoch"] == {3: 0.5}
        assert set(curves.iterations) == {1, 2, 3}  # not the samples of Megatron's "lm loss vs samples"
    written(tmp_path, "events.out.tfevents.1751371300.host.2.0", EVENTS)  # a second start of the same run
    assert read_curves(tmp_path).columns["grad_norm"] == {1: 2.25, 2: 1.5, 3: math.inf}


@given(st.data())
def test_a_damaged_event_file_is_whole_up_to_there_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    at, bit = data.draw(st.integers(0, len(EVENTS) - 1)), data.draw(st.integers(0, 7))
    cut = data.draw(st.integers(12, len(EVENTS)))
    flipped = bytearray(EVENTS[:cut])
    if at < cut:
        flipped[at] ^= 1 << bit
    path = written(tmp_path_factory.getbasetemp(), "events.out.tfevents.1.x", bytes(flipped))
    whole = read_curves(written(tmp_path_factory.getbasetemp(), "whole.tfevents", EVENTS)).columns
    try:
        columns = read_curves(path).columns
    except UserError as error:
        right = str(path) in str(error)
    else:  # a value that was written, though perhaps an earlier one of the same step
        right = all(repr(columns[k][i]) in {repr(whole[k][i]), "8.0"} for k in columns for i in columns[k])
    assert right


def frame(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data))


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=5))
def test_well_framed_nonsense_is_a_sentence(tmp_path_factory: pytest.TempPathFactory, records: list[bytes]) -> None:
    path = written(tmp_path_factory.getbasetemp(), "e.tfevents", b"".join(map(frame, records)))
    try:
        named = bool(read_curves(path).iterations)
    except UserError as error:
        named = str(path) in str(error)
    assert named


def test_a_record_of_a_huge_length_costs_nothing(tmp_path: Path) -> None:
    length = struct.pack("<Q", 2**63)
    path = written(tmp_path, "e.tfevents", EVENTS + length + struct.pack("<I", masked_crc(length)) + b"x")
    assert len(read_curves(path).columns["lm_loss"]) == 3


def test_a_long_line_is_refused_or_passed_over_in_bounded_memory(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    huge = tmp_path / "m.jsonl"
    with huge.open("wb") as file:
        file.write(b'{"iteration": 1, "lm_loss": 8.5}\n')
        file.truncate(1 << 30)  # zeros without an end, which take no room on the disk
    with pytest.raises(UserError, match=r"m\.jsonl, line 2: is longer than 1,048,576 bytes"):
        read_curves(huge)
    log = tmp_path / "a.log"
    log.write_bytes(MEGATRON.encode() + b"x" * (3 << 20) + b"\n" + MEGATRON.replace("8.000000E+00", "7.0E+00").encode())
    assert read_curves(log).columns["lm_loss"] == {1: 8.5, 2: 7.0}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


def test_a_log_without_steps_is_spread_or_refused(tmp_path: Path) -> None:
    printed = read_curves(written(tmp_path, "out.log", TRAINER_5))
    state = read_curves(written(tmp_path, "trainer_state.json", json.dumps(STATE)))
    with pytest.raises(UserError, match="its lines name no step") as raised:
        compare_runs(state, printed)
    assert "--logging-steps N" in raised.value.fix
    assert compare_runs(state, printed, logging_steps=1, max_rel=0).passed
    assert compare_runs(printed, printed, max_rel=0).passed
    assert set(compare_runs(printed, printed, logging_steps=10).b.iterations) == {10, 20}
    with pytest.raises(UserError, match="no effect"):
        compare_runs(state, state, logging_steps=10)


def test_a_log_with_its_first_step_apart(tmp_path: Path) -> None:
    epochs = [0.01, 0.1, 0.2, 0.3]
    text = "".join(f"{{'loss': {9 - i}, 'learning_rate': 1e-05, 'epoch': {e}}}\n" for i, e in enumerate(epochs))
    curves = read_curves(written(tmp_path, "out.log", text))
    assert compare_runs(curves, curves, logging_steps=10).a.columns["lm_loss"] == {1: 9, 10: 8, 20: 7, 30: 6}


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.csv", "Step,a - loss,b - loss\n1,2,3\n", "a.csv, line 1: two columns are loss"),
        ("a.csv", "step,loss,Loss\n1,2,3\n", "a.csv, line 1: two columns are loss"),
        ("a.csv", "step,loss\n1,1_0\n", "a.csv, line 2: loss is '1_0'"),
        ("a.csv", "step,loss\n1,١\n", "a.csv, line 2: loss is "),
        ("a.csv", 'step,loss\n1,"' + "x" * 200_000, "a.csv, line 2: field larger than field limit"),
        ("a.jsonl", '{"kind": "step", "lm_loss": 1}\n', "a.jsonl, line 1: lacks 'iteration'"),
        ("a.jsonl", '{"step": 1.5, "loss": 1}\n', "a.jsonl, line 1: step is 1.5"),
        ("a.jsonl", '{"step": true, "loss": 1}\n', "a.jsonl, line 1: step is True"),
        ("a.jsonl", '{"step": 1' + "0" * 400 + ', "loss": 1}\n', "a.jsonl, line 1: step is "),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1: the whole is a list"),
        ("a.jsonl", '{"loss": 1}\n', "a.jsonl: no training step"),
        ("a.json", '{"log_history": 1}', "a.json: "),
        ("a.json", '{"log_history": [{"step": "x", "loss": 1}]}', r"a.json, log_history.0.: step is x"),
        ("a.log", "[titan] step:  1  loss:  abc  grad_norm: 1\n", "a.log, line 1: loss is 'abc'"),
        ("a.log", TORCHTITAN.encode("utf-16"), "a.log: is UTF-16"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, text: str | bytes, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as raised:
        read_curves(written(tmp_path, name, text))
    assert raised.value.fix


def test_an_unknown_log_gets_the_list_of_what_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        read_curves(written(tmp_path, "a.log", "Epoch 1: 100%|###| 9/9 [00:01<00:00, train_loss=2.3]\n"))
    assert FORMATS in raised.value.fix
    page = (Path(__file__).parents[3] / "docs" / "compare.md").read_text(encoding="utf-8")
    for word in ("torchtitan", "litgpt", "nanoGPT", "Trainer", "trainer_state.json", "trainer_log.jsonl", "wandb",
                 "TensorBoard", "Megatron", "MindSpeed", "AscendSpeed"):  # fmt: skip
        assert word in FORMATS
        assert word in page


def test_a_line_that_another_system_would_not_print_does_not_matter(tmp_path: Path) -> None:
    text = "step: 7  loss: n/a\n{'loss': 'none'}\niter 3: loss x, time 1ms\n" + MEGATRON
    assert read_curves(written(tmp_path, "a.log", text)).columns["lm_loss"] == LOSS


def test_a_half_written_object_is_left_out_and_a_whole_one_is_not(tmp_path: Path) -> None:
    whole = '{"global_step/max_steps": "1/9", "loss": 8.5}\n{"global_step/max_steps": "2/9", "loss": 8.0}'
    assert read_curves(written(tmp_path, "a.jsonl", whole)).columns["lm_loss"] == LOSS
    assert read_curves(written(tmp_path, "a.jsonl", whole[:-1])).columns["lm_loss"] == {1: 8.5}


@pytest.mark.parametrize(
    "text",
    ["step: 1 " * 100_000, "step: 1 loss: " * 60_000, "{'a" * 300_000, "iteration 1 " * 80_000, "\x1b]" * 400_000,
     "\x1b[" + "0" * 900_000, "iter 1 step 1 " * 60_000, "{'loss': '" + "a'a" * 300_000, " " * 900_000 + "step: 1"],
    ids=range(9),
)  # fmt: skip
def test_a_line_made_to_be_slow_is_not(tmp_path: Path, text: str) -> None:
    """Each was or would be quadratic in a pattern that looks on to the end of the line from many places."""
    with pytest.raises(UserError):
        read_curves(written(tmp_path, "a.log", text + " elapsed time per iteration loss: \n"))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_json_s_non_finite_numbers_are_read(tmp_path: Path, value: str) -> None:
    for text in (f'{{"step": 1, "loss": {value}}}\n', f'{{"step": 1, "loss": "{value}"}}\n'):
        loss = read_curves(written(tmp_path, "a.jsonl", text)).columns["lm_loss"][1]
        assert repr(loss) == repr(float(value))


@pytest.mark.parametrize("sign", ["", "-"])
def test_a_whole_number_beyond_all_floats_is_no_value(tmp_path: Path, sign: str) -> None:
    huge = f'{{"step": 2, "loss": {sign}{"9" * 4000}}}\n'
    columns = read_curves(written(tmp_path, "a.jsonl", '{"step": 1, "loss": 3.5}\n' + huge)).columns
    assert columns["lm_loss"] == {1: 3.5}
    with pytest.raises(UserError, match="no training step"):
        read_curves(written(tmp_path, "b.jsonl", huge))


@given(
    st.lists(st.tuples(st.sampled_from([0, 1, 9, 10, 11, 25]), st.sampled_from(["\n", "\r", "\r\n", ""])), max_size=9)
)
def test_lines_are_those_of_the_text_each_cut_at_the_limit(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[int, str]]
) -> None:
    text = "".join("x" * length + end for length, end in parts)
    path = written(tmp_path_factory.getbasetemp(), "lines.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines_module, "MAX_LINE", 10)
        patch.setattr(lines_module, "_CHUNK", 7)
        with path.open("rb") as file:
            found = [(line.text, line.cut) for line in lines_module.read_lines(file) if line.text]
    expected = [line for line in text.replace("\r", "\n").split("\n") if line]
    assert found == [(line[:10], len(line) > 10) for line in expected]
