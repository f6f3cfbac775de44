"""Console logs: one reader a system, each line a step, a validation or neither.

A log is mixed with other output, so a line that fits no reader is passed over. Every reader sees every line, and the
one that finds the most steps gives the result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from arriero.common.errors import UserError
from arriero.common.text import escape
from arriero.observe.curves.curve import VALIDATION, Curves, CurvesBuilder, normalize_name, parse_number, require_number
from arriero.observe.curves.text_lines import TextLine

# One pattern for all of Megatron's family: Megatron has a time stamp in front, AscendSpeed none, MindSpeed's FSDP2 a
# colon and no total, and a launcher may put `[default0]:` before everything.
_MEGATRON = re.compile(r"\biteration:?\s+(\d{1,15})\s*(?:/\s*\d+\s*)?\|(.*)", re.ASCII)
_MEGATRON_VALIDATION = re.compile(
    r"validation(-\d{1,6})? loss at iteration (\d{1,15})(?: on (\w+) set)? \| (?:lm )?loss value: (\S+)", re.ASCII
)
# None of these may look on to the line's end from every place in it: a line of a megabyte would take hours.
_TITAN = re.compile(r"(?:^|\s)(validate )?step:\s*(\d[\d,]{0,20})\s", re.ASCII)
_PAIR = re.compile(r"([A-Za-z_]\w{0,60}):\s*([^\s|]+)", re.ASCII)
_LITGPT = re.compile(r"\biter (\d{1,15}) step (\d{1,15}) \| loss train: ([^\s,]+),(.*)", re.ASCII)
_LITGPT_VALIDATION = re.compile(r"\biter (\d{1,15}): val loss ([^\s,]+), val time: ", re.ASCII)
_NANOGPT = re.compile(r"(?:^|\s)iter (\d{1,15}): loss ([^\s,]+), time ", re.ASCII)
_NANOGPT_VALIDATION = re.compile(r"(?:^|\s)step (\d{1,15}): train loss ([^\s,]+), val loss ([^\s,]+)", re.ASCII)
_TRAINER = re.compile(r"\{'\w[^{}]*\}")
_TRAINER_PAIR = re.compile(r"'([^'\\]{1,200})': (?:'([^'\\]*)'|([^\s,'}]+))")

Reader = Callable[[CurvesBuilder, str, str], None]


def _megatron(found: CurvesBuilder, text: str, where: str) -> None:
    """Takes every `key: value |` of a step's line, under the key with underscores (`grad norm` is grad_norm)."""
    if match := _MEGATRON_VALIDATION.search(text):
        value = require_number(match[4], where, "lm loss value")
        if match[3] in (None, "validation"):
            name = f"validation{match[1].replace('-', '_')}_loss" if match[1] else VALIDATION
            found.add(int(match[2]), {name: value}, training=False)
    elif "elapsed time per iteration" in text and (match := _MEGATRON.search(text)):
        found.add(int(match[1]), _megatron_fields(match[2], where))


def _megatron_fields(text: str, where: str) -> dict[str, float]:
    """The numbers of one step line; a loss that is missing though the step was not skipped was not a number."""
    fields: dict[str, float] = {}
    for field in text.split("|"):
        key, colon, value = field.partition(":")
        name = re.sub(r"\W+", "_", key.strip()).strip("_").lower()
        if not colon or not name:
            continue
        if name in ("lm_loss", "grad_norm"):
            fields[name] = require_number(value, where, name.replace("_", " "))
        elif (one := parse_number(value)) is not None:  # else a duration, a percentage: nothing that is compared
            fields[name] = one
    if "lm_loss" not in fields and not fields.get("number_of_skipped_iterations"):
        fields["lm_loss"] = math.nan  # Megatron and AscendSpeed print a loss only above zero, so a NaN vanishes
    return fields


def _torchtitan(found: CurvesBuilder, text: str, where: str) -> None:
    """`step:  1  loss:  8.1234  grad_norm:  1.2345  memory: ...`, and `validate step:  1  loss: ...`."""
    if not (match := _TITAN.search(text)):
        return
    iteration = int(match[2].replace(",", ""))
    fields: dict[str, float] = {}
    for key, value in _PAIR.findall(text, match.start()):
        one = parse_number(value.replace(",", ""))
        if one is None and key == "loss" and "loss" not in fields:
            one = require_number(value, where, key)
        if one is not None and key != "step":
            fields.setdefault(normalize_name(key), one)
    if iteration >= 10**15 or "loss" not in fields:
        return
    if match[1]:
        found.add(iteration, {VALIDATION: fields["loss"]}, training=False)
    else:
        found.add(iteration, fields)


class _Litgpt:
    """The last micro-batch of a step, which is marked `(step)`: its loss is the mean of the step's micro-batches.

    `val: 5.123` in it is the newest validation, repeated on every line until the next. The validation's own line names
    the micro-batch, which is that of the step's line before it.
    """

    def __init__(self) -> None:
        self.micro_batch = self.step = -1

    def read(self, found: CurvesBuilder, text: str, where: str) -> None:
        """Reads one line."""
        if (match := _LITGPT.search(text)) and "(step)" in match[4]:
            self.micro_batch, self.step = int(match[1]), int(match[2])
            found.add(self.step, {"lm_loss": require_number(match[3], where, "loss train")})
        elif (match := _LITGPT_VALIDATION.search(text)) and int(match[1]) == self.micro_batch:
            found.add(self.step, {VALIDATION: require_number(match[2], where, "val loss")}, training=False)


def _nanogpt(found: CurvesBuilder, text: str, where: str) -> None:
    """`iter 0` is the first step, 1 elsewhere; `step 250: ... val loss` was measured after 250 steps."""
    if match := _NANOGPT.search(text):
        found.add(int(match[1]) + 1, {"lm_loss": require_number(match[2], where, "loss")})
    elif match := _NANOGPT_VALIDATION.search(text):
        found.add(int(match[1]), {VALIDATION: require_number(match[3], where, "val loss")}, training=False)


class _Trainer:
    """Hugging Face's Trainer: `{'loss': 2.5, 'grad_norm': 1.2, 'learning_rate': 5e-05, 'epoch': 0.1}`, without a step.

    The lines are counted. A validation is only kept where its epoch is that of the loss line before it.
    """

    def __init__(self) -> None:
        self.count = 0
        self.epochs: list[float] = []

    def read(self, found: CurvesBuilder, text: str, where: str) -> None:
        """Reads one line."""
        if not (match := _TRAINER.search(text)):
            return
        pairs = {key: quoted or bare for key, quoted, bare in _TRAINER_PAIR.findall(match[0])}
        if "train_runtime" in pairs:  # the summary at the end
            return
        fields = {normalize_name(key): one for key, text in pairs.items() if (one := parse_number(text)) is not None}
        epoch = fields.pop("epoch", math.nan)
        if "loss" in pairs:
            require_number(pairs["loss"], where, "loss")
            self.count += 1
            self.epochs.append(epoch)
            found.add(self.count, fields)
        elif "eval_loss" in fields and self.epochs and epoch == self.epochs[-1]:
            found.add(self.count, {VALIDATION: fields["eval_loss"]}, training=False)

    def first_line_is_step_one(self) -> bool:
        """Whether the first line is of step 1 and not of step `logging_steps`, as `logging_first_step` has it."""
        first, last = (self.epochs[0], self.epochs[-1]) if self.epochs else (0.0, 0.0)
        return self.count > 2 and first > 0 and last / first > 1.5 * self.count


def read_log(path: Path, lines: Iterable[TextLine], only: Collection[str] | None) -> Curves:
    """Reads a console log of any of the systems above; without a step in it, the result has no iterations.

    Raises:
        UserError: a step's loss that is no number, named by file and line.
    """
    trainer = _Trainer()
    readers: list[tuple[str, str, Reader]] = [
        ("iteration", "Megatron's, MindSpeed's, AscendSpeed's or arriero's log", _megatron),
        ("step:", "torchtitan's log", _torchtitan),
        ("iter ", "litgpt's log", _Litgpt().read),
        (" loss ", "nanoGPT's log", _nanogpt),
        ("{'", "Hugging Face Trainer's printed log", trainer.read),
    ]
    collectors = [CurvesBuilder(path, only) for _ in readers]
    wrong: dict[int, UserError] = {}  # of a reader whose lines these may not be, so that it counts at the end alone
    for line in lines:
        if line.cut or not (line.whole or line.text.rstrip().endswith(("|", "}"))):
            continue  # cut off by a kill, and then so may be its last number; or no line of a log at all
        for i, (mark, _, read) in enumerate(readers):
            if i not in wrong and mark in line.text:
                try:
                    read(collectors[i], line.text, f"{escape(path)}, line {line.number}")
                except UserError as error:
                    wrong[i] = error
    best = max(range(len(readers)), key=lambda i: len(collectors[i].steps))
    _, kind, read = readers[best]
    if wrong and (best in wrong or not collectors[best].steps):
        raise wrong.get(best, next(iter(wrong.values())))
    if not collectors[best].steps:
        return Curves(path, {}, "a console log", frozenset())
    if read == trainer.read:
        return collectors[best].curves(
            kind, counted_lines=True, first_line_is_step_one=trainer.first_line_is_step_one()
        )
    notes = (f"{escape(path)}: nanoGPT's iter 0 is the first step, 1 here.",) if read is _nanogpt else ()
    return collectors[best].curves(kind, notes=notes)
