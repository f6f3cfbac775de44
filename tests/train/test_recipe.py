"""The recipe: one parser for file and command line, all problems at once, each with its place and its fix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import toy
from arriero.cli.main import dispatch
from arriero.cli.pretrain import read_command
from arriero.common.errors import EXIT_USAGE, UserError
from arriero.common.ranges import bare_type, field_ranges, range_problems
from arriero.common.settings import Setting, command_line_settings, parse
from arriero.common.toml import file_settings, to_toml
from arriero.train.directory import recipe_text_problems
from arriero.train.recipe import Recipe, bundled_directory


def load(text: str, path: Path, *words: str) -> Recipe:
    path.write_text(text)
    return parse(Recipe, file_settings(path) + command_line_settings(list(words)), prog="test")


def test_file_then_command_line(tmp_path: Path) -> None:
    text = 'out = "here"\n[train]\nsteps = 5\n[optim]\nbetas = [0.8, 0.9]\n[schedule]\nlr = 1e-2\n'
    recipe = load(text, tmp_path / "r.toml", "--train.steps", "7", "--schedule.min-lr=1e-3", "--optim.eps", "1e-6")
    assert (recipe.out, recipe.train.steps, recipe.optim.betas) == ("here", 7, (0.8, 0.9))
    assert (recipe.schedule.lr, recipe.schedule.min_lr, recipe.optim.eps) == (1e-2, 1e-3, 1e-6)


@pytest.mark.parametrize("word", ["true", "True"])
def test_truth_is_written_as_in_the_file_or_as_in_python(word: str) -> None:
    recipe = parse(Recipe, command_line_settings(["--parallel.sequence-parallel", word]), prog="test")
    assert recipe.parallel.sequence_parallel is True


def test_all_problems_are_reported_together_with_their_lines(tmp_path: Path) -> None:
    text = 'outt = "x"\n\n[train]\nsteps = "many"\n[schedule]\nshape = "cosin"\nlr = 1e-3\n'
    with pytest.raises(UserError) as caught:
        load(text, tmp_path / "r.toml", "--train.stesp", "3")
    message = str(caught.value)
    assert "4 problems" in message
    assert f"{tmp_path / 'r.toml'}:1: unknown key 'outt'" in message
    assert "did you mean 'out'" in message
    assert "r.toml:4" in message
    assert "many" in message
    assert "a whole number" in message
    assert "r.toml:6" in message
    assert "one of cosine, linear, constant, wsd" in message
    assert "--train.stesp: unknown key" in message
    assert "did you mean 'train.steps'" in message


@pytest.mark.parametrize(("text", "message"), [("[train\n", "not TOML"), ("a = 1\na = 2\n", "not TOML")])
def test_broken_toml_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(text, tmp_path / "r.toml")
    assert str(tmp_path / "r.toml") in str(caught.value)


def test_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = load('out = "a \\"b\\" c"\n[train]\nsteps = 9\ndtype = "float16"\n', tmp_path / "r.toml")
    assert load(to_toml(recipe), tmp_path / "again.toml") == recipe


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(lambda t: not t.startswith("-")))
def test_any_text_survives_the_round_trip(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "r.toml"
    path.write_text(to_toml(Recipe(out=text)), encoding="utf-8")
    assert parse(Recipe, file_settings(path), prog="test").out == text


def test_every_bundled_recipe_parses() -> None:
    recipes = sorted(bundled_directory().glob("*.toml"))
    assert recipes
    for path in recipes:
        recipe = parse(Recipe, file_settings(path), prog="test")
        assert recipe.model_config().num_hidden_layers > 0


def test_cross_checks_come_together(tmp_path: Path) -> None:
    recipe, _ = read_command(
        [str(toy.write_recipe(tmp_path)), "--parallel.tensor-parallel", "3", "--train.global-batch", "7", "--out", "",
         "--schedule.warmup-steps", "1", "--schedule.warmup-fraction", "0.1"]
    )  # fmt: skip
    message = "\n".join(str(p) for p in recipe.problems(4))
    assert "out: not set" in message
    assert "3 does not divide the 4 attention heads" in message
    assert "use one of 1, 2" in message
    assert "4 processes do not divide into groups of 3 (tensor 3" in message
    assert "global_batch 7 is not a multiple" in message
    assert "warmup_fraction are both set" in message


def test_model_and_init_must_agree(tmp_path: Path) -> None:
    toy.write_config(tmp_path / "a")
    toy.write_config(tmp_path / "b", num_hidden_layers=3)
    with pytest.raises(UserError, match="differ in num_hidden_layers"):
        Recipe(model=str(tmp_path / "a"), init=str(tmp_path / "b")).model_config()
    with pytest.raises(UserError, match="model: not set"):
        Recipe().model_config()
    with pytest.raises(UserError, match="did you mean 'demo'"):
        Recipe(model="demoo").model_config()


TEXTS = st.text(max_size=30).filter(lambda t: not t.startswith("-"))


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of the type and range of a field."""
    base = bare_type(kind)
    if get_origin(base) is tuple:
        inner = get_args(base)
        many = inner[1:] == (...,)
        return st.lists(values(inner[0]), max_size=3).map(tuple) if many else st.tuples(*map(values, inner))
    return TEXTS if base is str else st.from_type(kind)


@given(st.data())
@settings(max_examples=25)
def test_whatever_its_values_a_recipe_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:  # fmt: skip
    """As the run keeps it, and as its checkpoints do: both write `to_toml` and read `file_settings`."""
    recipe, keys = Recipe(), field_ranges(Recipe)
    for key in data.draw(st.lists(st.sampled_from(sorted(keys)), min_size=1, max_size=12, unique=True)):
        table, _, name = key.rpartition(".")
        value = data.draw(values(keys[key]), label=key)
        part = replace(getattr(recipe, table) if table else recipe, **{name: value})
        recipe = replace(recipe, **{table: part}) if table else part
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
    assume(
        not range_problems(recipe) and not recipe_text_problems(recipe)
    )  # else it is refused before anything is written
    path.write_bytes(to_toml(recipe).encode())
    assert parse(Recipe, file_settings(path), prog="test") == recipe


@pytest.mark.parametrize(
    ("key", "value"),
    [("optim.eps", "1e-30"), ("out", "\x7f"), ("data.prefix", "a\nb = 1\x1b\"'''\u2028\r\n")],
)
def test_values_that_json_and_toml_write_differently(tmp_path: Path, key: str, value: str) -> None:
    recipe = parse(Recipe, [Setting(key, [value], "test")], prog="test")
    (tmp_path / "r.toml").write_bytes(to_toml(recipe).encode())
    assert parse(Recipe, file_settings(tmp_path / "r.toml"), prog="test") == recipe


def test_a_recipe_that_could_not_be_read_back_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(toy.write_recipe(tmp_path))
    for words in (["--out", f"{tmp_path}/\udcff"], ["--train.grad-clip", "nan"], ["--tokenizer", "x" * 200_000]):
        assert dispatch(["pretrain", recipe, *words]) == EXIT_USAGE
        assert len(capsys.readouterr().err) < 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "model", "toy.toml"]
