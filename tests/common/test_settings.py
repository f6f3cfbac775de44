"""Every number of every verb and recipe has a range, and whatever is given for it is refused by name or within it."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import types
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from annotated_types import Interval, Len
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.cli.bench.command import BenchConfig
from arriero.cli.launch_slurm import SlurmArgs
from arriero.cli.main import VERBS
from arriero.common import settings as common_settings
from arriero.common.errors import UserError
from arriero.common.ranges import (
    bare_type,
    field_ranges,
    find_annotation,
    flag,
    format_interval,
    leaves,
    range_problems,
    value_problem,
)
from arriero.common.settings import Setting, command_line_settings, parse, parse_verb, show_flags
from arriero.common.suggest import OTHER_NAMES, suggestion
from arriero.common.toml import file_settings
from arriero.distributed.launch.config import LaunchConfig
from arriero.model.config import LlamaConfig
from arriero.train.config import RunOptions
from arriero.train.recipe import Recipe

VERB_ARGUMENTS = {
    name: getattr(importlib.import_module(verb.module), verb.arguments)
    for name, verb in VERBS.items()
    if name not in ("pretrain", "bench", "launch")  # they read a recipe's keys
}
SETTINGS = {
    **VERB_ARGUMENTS, "recipe": Recipe, "bench": BenchConfig, "launch": LaunchConfig, "slurm": SlurmArgs,
    "config.json": LlamaConfig,
}  # fmt: skip


def numbers(kind: Any) -> list[Any]:
    """The annotated int and float types within a type."""
    base = bare_type(kind)
    if base in (int, float):
        return [kind]
    if get_origin(base) in (tuple, Union, types.UnionType):
        return [one for part in get_args(base) if part not in (..., type(None)) for one in numbers(part)]
    return []


NUMBERS = [
    (owner, key, kind) for owner, cls in SETTINGS.items() for key, kind in field_ranges(cls).items() if numbers(kind)
]
HOSTILE = [
    "nan", "inf", "-inf", "1e308", "-1e308", "-1", "0", "-0.0", "1", "0.5", "1e30", "1e-320", str(2**31), str(2**32),
    str(2**63), str(2**70), str(-(2**63)), "1_000", "٣", " 5", "5 ", "0x10", "1e3", "", "9" * 5000, "1" * 400 + ".5",
    "+7", "1,5", "True", "None", "5;", "\N{SUPERSCRIPT TWO}", "\x1b[31m", "1e999999999", "--1", "-",
]  # fmt: skip


@pytest.mark.parametrize(("owner", "key", "kind"), NUMBERS, ids=[f"{owner}-{key}" for owner, key, _ in NUMBERS])
def test_every_number_has_a_range(owner: str, key: str, kind: Any) -> None:
    """A field without one would take NaN, or a number that no memory holds."""
    for one in numbers(kind):
        interval = find_annotation(one, Interval)
        assert interval is not None, f"{owner}: give {key} a range: Annotated[..., Interval(ge=..., le=...)]"
        assert (interval.ge is None) != (interval.gt is None)
        assert (interval.le is None) != (interval.lt is None)
    if get_args(bare_type(kind))[1:] == (...,):
        assert find_annotation(kind, Len), f"{owner}: bound the length of {key}: Annotated[tuple[...], Len(0, ...)]"


@pytest.mark.parametrize("owner", SETTINGS)
def test_defaults_are_within_their_ranges(owner: str) -> None:
    cls = SETTINGS[owner]
    paths: dict[str, Any] = {name: Path("x") for name in ("source", "destination", "a", "b", "path", "model")} | {
        "shell": "bash"
    }
    needed: dict[str, Any] = {**paths, "to": "hf", "inputs": ("a",), "out": "b", "prompt": "x"}
    lacking = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    needed = {name: value for name, value in needed.items() if name in lacking}
    assert range_problems(cls(**needed)) == []


def given_words(key: str, kind: Any, word: str) -> list[str]:
    """The words that set a key, as often as it wants values."""
    parts = (
        [one for one in get_args(bare_type(kind)) if one is not ...] if get_origin(bare_type(kind)) is tuple else [kind]
    )
    return [f"{flag(key)}={word}"] if len(parts) == 1 else [flag(key), *[word] * len(parts)]


def read(owner: str, words: list[str]) -> Any:
    """What arriero makes of the words."""
    cls = SETTINGS[owner]
    if owner not in VERB_ARGUMENTS:
        return parse(cls, command_line_settings(words), prog="test")
    first = {"convert": ["a", "b", "--to=hf"], "export": ["a", "b"], "compare": ["a", "b"], "inspect": ["a"],
             "generate": ["a", "--prompt=x"],
             "completion": ["bash"], "prepare": ["a", "--out=b"]}.get(owner, [])  # fmt: skip
    return parse_verb(cls, [*first, *words], prog="test", description="")


def attempt(owner: str, words: list[str]) -> tuple[Any, str]:
    """What arriero makes of the words, or why it refuses them."""
    try:
        return read(owner, words), ""
    except UserError as error:
        return None, str(error)


def value_at(built: Any, key: str) -> Any:
    for name in key.split("."):
        built = getattr(built, name)
    return built


@given(
    st.sampled_from([one for one in NUMBERS if one[0] != "config.json"]),
    st.sampled_from(HOSTILE) | st.floats().map(str) | st.integers(-(2**80), 2**80).map(str) | st.text(max_size=8),
)
@settings(max_examples=100, deadline=None)
def test_whatever_is_given_for_a_number_is_refused_by_name_or_within_its_range(one: Any, word: str) -> None:
    owner, key, kind = one
    built, refused = attempt(owner, given_words(key, kind, word))
    if refused:
        assert key in refused or flag(key) in refused
        return
    assert value_problem(value_at(built, key), kind) == ""
    for number in numbers(kind):
        held = value_at(built, key)
        for item in held if isinstance(held, tuple) else [held]:
            assert item is None or type(item) is bare_type(number)


@pytest.mark.parametrize("owner", [owner for owner in SETTINGS if owner != "config.json"])
def test_every_hostile_value_of_every_number(owner: str) -> None:
    """Refused together: one call with all keys, so that this takes seconds, not minutes."""
    found = [(key, kind) for one, key, kind in NUMBERS if one == owner]
    for word in HOSTILE if found else []:
        words = [w for key, kind in found for w in given_words(key, kind, word)]
        wrong = [key for key, kind in found if value_problem(as_typed(kind, word), kind)]
        _, refused = attempt(owner, words)
        assert bool(refused) == bool(wrong), word
        if not word.startswith("-") or word[1:2].isdigit():  # else the parser takes a second word for an option
            assert [key for key in wrong if key not in refused and flag(key) not in refused] == [], word


def as_typed(kind: Any, word: str) -> Any:
    """What a word is as a value of the type: by Python's own int and float, of plain ASCII numerals."""
    (number, *_) = numbers(kind)
    base = bare_type(number)
    value: Any = word
    with contextlib.suppress(ValueError):
        if word.isascii() and not set(word) & set("_ xX,;") and len(word) <= (40 if base is int else 6000):
            value = base(word)
    if get_origin(bare_type(kind)) is tuple:
        return (value,) * max(1, len([one for one in get_args(bare_type(kind)) if one is not ...]))
    return None if word == "None" and type(None) in get_args(bare_type(kind)) else value


def test_problems_come_together_with_their_place_and_range(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("seed = -1\n[train]\ngrad_clip = nan\nsteps = 1e30\n[optim]\nbetas = [0.9, 1.5]\n")
    with pytest.raises(UserError) as caught:
        parse(Recipe, file_settings(path) + command_line_settings(["--watch.slow", "inf", "--lr", "1"]), prog="test")
    message = str(caught.value)
    assert "6 problems" in message
    for part in (
        f"{path}:1: seed is -1", "give a whole number from 0 to below 4,294,967,296",
        f"{path}:3: train.grad_clip is nan", "give a number from 0 to 1e6", f"{path}:4: train.steps is '1e+30'",
        f"{path}:6: optim.betas holds 1.5",
        "give 2 values, each a number from 0 to below 1", "watch.slow is inf", "did you mean 'schedule.lr'?",
    ):  # fmt: skip
        assert part in message


def test_a_recipe_made_in_python_is_checked_too() -> None:
    recipe = Recipe(out="x", seed=2**70)
    recipe = replace(recipe, train=replace(recipe.train, grad_clip=math.nan, steps=True))
    found = [p.problem for p in recipe.problems(1)]
    assert found == ["seed is 1180591620717411303424", "train.steps is True", "train.grad_clip is nan"]


DEEP = (
    "a" + ".a" * 20_000 + " = 1", "[a" + ".a" * 20_000 + "]", 'x = {"a"' + ' . "a"' * 9000 + " = 1}",
    "x = " + "{a = " * 300 + "1" + "}" * 300, "[train]\nsteps = [" + "1," * 20_000 + "]",
)  # fmt: skip


@pytest.mark.parametrize("text", DEEP, ids=range(len(DEEP)))
def test_deep_keys_and_long_lists_are_refused_at_once(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        parse(Recipe, file_settings(tmp_path / "r.toml"), prog="test")
    assert len(str(caught.value)) < 1000


@dataclass(frozen=True)
class Example:
    """Of each kind of field."""

    count: Annotated[int, Interval(ge=1, le=1000)] = 1
    share: Annotated[float, Interval(gt=0, lt=1)] = 0.5
    pair: tuple[Annotated[float, Interval(ge=0, le=1)], Annotated[float, Interval(ge=0, le=9)]] = (0.0, 1.0)
    many: Annotated[tuple[Annotated[int, Interval(ge=0, le=3)], ...], Len(0, 2)] = ()
    maybe: Annotated[int, Interval(ge=0, le=3)] | None = None
    word: Literal["a", "b"] = "a"
    path: Path | None = None


@pytest.mark.parametrize(
    ("change", "problem", "fix"),
    [
        ({"count": 0}, "count is 0", "give a whole number from 1 to 1,000"),
        ({"count": 1.0}, "count is 1.0", "give a whole number from 1 to 1,000"),
        ({"share": 1}, "share is 1", "give a number above 0, below 1"),
        ({"pair": (0.0, 10.0)}, "pair holds 10.0", "give 2 values, each a number from 0 to 1"),
        ({"many": (1, 2, 3)}, "many has 3 values", "give at most 2 values, each a whole number from 0 to 3"),
        ({"many": (7,)}, "many holds 7", "give at most 2 values, each a whole number from 0 to 3"),
        ({"maybe": -1}, "maybe is -1", "give a whole number from 0 to 3"),
        ({"path": Path("x" * 300)}, "no file can have so long a name", "give a path"),
        ({"path": Path("a\0b")}, "which no file can be named", "give a path"),
    ],
)
def test_messages(change: dict[str, Any], problem: str, fix: str) -> None:
    (error,) = range_problems(Example(**change))
    assert problem in error.problem
    assert error.fix == fix


def test_the_range_stands_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    show_flags(Example, "test")
    printed = " ".join(capsys.readouterr().out.split())
    assert "--count INT from 1 to 1,000" in printed
    assert "--share FLOAT above 0, below 1" in printed
    for verb, cls in VERB_ARGUMENTS.items():
        out = io.StringIO()
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
            parse_verb(cls, ["--help"], prog=f"arriero {verb}", description="")
        printed = " ".join(out.getvalue().replace("│", " ").split())
        for key, kind in field_ranges(cls).items():
            for number in numbers(kind):
                assert f"{flag(key)} " in printed
                assert format_interval(find_annotation(number, Interval)).strip() in printed


NEAR = {
    "train.lr": "schedule.lr", "lr": "schedule.lr", "schedule.learning_rate": "schedule.lr",
    "learning-rate": "schedule.lr", "outt": "out", "train.stesp": "train.steps", "batch_size": "train.global_batch",
    "tp": "parallel.tensor_parallel", "pp": "parallel.pipeline_parallel", "seq_length": "train.sequence_length",
    "max_steps": "train.steps", "train_iters": "train.steps", "optimizer.weight_decay": "optim.weight_decay",
    "Train.Steps": "train.steps", "train": "train.steps", "clip-grad": "train.grad_clip",
    "model.tensor_parallel": "parallel.tensor_parallel", "data.sequence_lenght": "train.sequence_length",
    "optim.beta": "optim.betas", "schedule.warmup": "schedule.warmup_fraction",
}  # fmt: skip


@pytest.mark.parametrize("wrong", NEAR)
def test_suggestions(wrong: str) -> None:
    sentence = suggestion(wrong, field_ranges(Recipe))
    assert sentence.startswith(f"did you mean {NEAR[wrong]!r}"), sentence
    assert sentence.count("'") <= 6


@given(st.text(max_size=30))
@settings(max_examples=50, deadline=None)
def test_a_suggestion_is_short_and_names_keys(word: str) -> None:
    sentence = suggestion(word, field_ranges(Recipe))
    assert len(sentence) < 150
    assert sentence == "--help lists every key" or set(sentence.split("'")[1::2]) <= set(field_ranges(Recipe))


def test_the_other_programs_names_are_of_keys_that_exist() -> None:
    known = {*field_ranges(Recipe), *field_ranges(RunOptions)}
    known |= {key.removeprefix("launch.") for key in known}
    assert set(OTHER_NAMES) <= known
    for name in (name for others in OTHER_NAMES.values() for name in others.split()):
        assert not any(key.rsplit(".", 1)[-1] == name for key in field_ranges(Recipe)), name


def test_a_value_that_looks_like_a_flag_stays_a_value() -> None:
    assert parse(Recipe, [Setting("out", ["--train.steps=3"], "r.toml:1")], prog="test").out == "--train.steps=3"
    assert parse(Recipe, [Setting("out", ["--help"], "r.toml:1")], prog="test").out == "--help"


def test_a_wrong_value_among_many_has_the_whole_recipe_read_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading all keys for each key took seconds."""
    sizes: list[int] = []
    read = common_settings._read_settings

    def counted(cls: Any, *rest: Any) -> Any:
        sizes.append(len(field_ranges(cls)))
        return read(cls, *rest)

    monkeypatch.setattr(common_settings, "_read_settings", counted)
    given = [Setting(key, [str(value)], "r.toml:1") for key, _, value in leaves(Recipe()) if isinstance(value, int)]
    with pytest.raises(UserError, match="one of float32"):
        parse(Recipe, [*given, Setting("train.dtype", ["single"], "r.toml:2")], prog="test")
    assert sizes[0] > 60
    assert set(sizes[1:]) == {1}
    assert len(sizes) == len(given) + 2
