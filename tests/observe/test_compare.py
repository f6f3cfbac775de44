from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.common.errors import UserError
from arriero.observe.compare import compare_runs
from arriero.observe.curves.curve import Curves


def curves(name: str, **columns: dict[int, float]) -> Curves:
    return Curves(Path(name), columns, "csv")


def losses(*values: float) -> dict[int, float]:
    return dict(enumerate(values, 1))


finite = st.floats(min_value=-1e6, max_value=1e6)


@given(st.lists(finite, min_size=1))
def test_a_run_equals_itself_at_any_limit(values: list[float]) -> None:
    a = curves("a", lm_loss=losses(*values))
    assert compare_runs(a, a, max_rel=0).passed


@given(st.lists(st.floats(0.1, 1e3), min_size=1), st.floats(1e-6, 0.5), st.floats(1e-6, 0.5))
def test_a_shift_passes_exactly_when_it_is_within_the_limit(values: list[float], shift: float, limit: float) -> None:
    a = curves("a", lm_loss=losses(*values))
    b = curves("b", lm_loss=losses(*(v * (1 + shift) for v in values)))
    verdict = compare_runs(a, b, max_rel=limit)
    assert max(verdict.agreements[0].relative) == pytest.approx(shift, rel=1e-6)
    if abs(shift - limit) > 1e-6 * limit:
        assert verdict.passed == (shift <= limit)


def test_errors_and_where_they_are() -> None:
    verdict = compare_runs(
        curves("a", lm_loss=losses(4, 2, 10)), curves("b", lm_loss=losses(4, 2.1, 10.2)), max_rel=0.03
    )
    (x,) = verdict.agreements
    assert x.absolute == pytest.approx([0, 0.1, 0.2])
    assert x.relative == pytest.approx([0, 0.05, 0.02])
    assert [x.iterations[i] for i in x.worst(5)] == [2, 3, 1]
    assert not verdict.passed
    assert verdict.notes == ["a has no grad_norm: not compared.", "b has no grad_norm: not compared."]


def test_only_common_iterations_are_compared_and_it_is_said() -> None:
    verdict = compare_runs(curves("a", lm_loss={1: 9, 2: 8, 3: 7}), curves("b", lm_loss={2: 8, 3: 7, 4: 6, 5: 5}))
    assert verdict.passed
    assert verdict.agreements[0].iterations == [2, 3]
    assert "1 of the iterations are in a alone (1): not compared." in verdict.notes
    assert "2 of the iterations are in b alone (4 to 5): not compared." in verdict.notes


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_value_in_one_run_alone_fails(bad: float) -> None:
    good, broken = curves("a", lm_loss=losses(2, 2)), curves("b", lm_loss=losses(2, bad))
    for a, b in ((good, broken), (broken, good)):
        verdict = compare_runs(a, b, max_rel=1e9)
        assert not verdict.passed
        assert verdict.agreements[0].one_sided == [2]


def test_non_finite_alike_agrees_but_a_run_of_nothing_else_fails() -> None:
    nan, both = losses(math.nan, math.nan), losses(2, math.nan)
    assert compare_runs(curves("a", lm_loss=both), curves("b", lm_loss=both)).passed
    assert not compare_runs(curves("a", lm_loss=nan), curves("b", lm_loss=nan)).passed
    unlike = compare_runs(curves("a", lm_loss=losses(2, math.inf)), curves("b", lm_loss=losses(2, math.nan)))
    assert unlike.agreements[0].one_sided == [2]


def test_zero_in_the_reference() -> None:
    a = curves("a", lm_loss=losses(0, 1))
    assert compare_runs(a, curves("b", lm_loss=losses(0, 1))).passed
    assert not compare_runs(a, curves("b", lm_loss=losses(1e-9, 1)), max_rel=1e9).passed


def test_a_gradient_norm_beyond_the_limit_fails_unless_the_loss_alone_is_asked_for() -> None:
    a = curves("a", lm_loss=losses(2), grad_norm=losses(1))
    b = curves("b", lm_loss=losses(2), grad_norm=losses(1.5))
    assert not compare_runs(a, b).passed
    assert compare_runs(a, b, quantities=("lm_loss",)).passed


def test_notes_on_skipped_steps_and_on_other_strides() -> None:
    a = curves("a", lm_loss=dict.fromkeys((1, 2, 4), 2.0), grad_norm=dict.fromkeys(range(1, 5), 1.0))
    assert any("a has no loss at 1 iterations (3)" in note for note in compare_runs(a, a).notes)
    every, tenth = (
        curves("a", lm_loss=dict.fromkeys(range(1, 31), 2.0)),
        curves("b", lm_loss={10: 2.0, 20: 2.0, 30: 2.0}),
    )
    assert any("every 1 iterations, the second every 10" in note for note in compare_runs(every, tenth).notes)
    assert not any("every" in note for note in compare_runs(every, every).notes)


@pytest.mark.parametrize(
    ("b", "options", "problem"),
    [
        (curves("b", lm_loss={7: 1.0}), {}, "no common iterations: a has 1 to 2, b has 7"),
        (curves("b", lm_loss=losses(1)), {"quantities": ("grad_nrom",)}, "a: no grad_nrom in it"),
        (curves("b", grad_norm=losses(1)), {}, "b: no lm_loss in it"),
        (curves("b", lm_loss=losses(1)), {"max_rel": -0.1}, "--max-rel -0.1 is no limit"),
        (curves("b", lm_loss=losses(1)), {"max_rel": math.nan}, "--max-rel nan is no limit"),
        (curves("b", lm_loss={7: 1.0}, grad_norm=losses(1)), {}, "no common iterations of lm_loss"),
    ],
)
def test_what_cannot_be_compared(b: Curves, options: dict[str, object], problem: str) -> None:
    a = curves("a", lm_loss=losses(1, 2), grad_norm=losses(1, 2))
    with pytest.raises(UserError, match=problem) as raised:
        compare_runs(a, b, **options)  # type: ignore[arg-type]
    assert raised.value.fix


def test_the_nearest_quantity_is_named() -> None:
    a = curves("a", lm_loss=losses(1), grad_norm=losses(1))
    with pytest.raises(UserError, match="did you mean 'grad_norm'"):
        compare_runs(a, a, quantities=("grad_nrom",))
