"""The one exception that a user is meant to see, and the exit codes of every verb."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_OK = 0
EXIT_CHECK_FAILED = 1  # a comparison or a verification ran, and its answer is no
EXIT_USAGE = 2  # the command, the recipe or an input is wrong; nothing was changed
EXIT_STOPPED = 75  # a run was asked to stop, saved its state and can be resumed (sysexits' "try again")


class UserError(Exception):
    """Something that the user can mend: printed without a traceback, exit code 2.

    Args:
        problem: what is wrong, naming the file, line or key.
        fix: what to do about it, one sentence or one command line.
    """

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(problem if not fix else f"{problem}\n  fix: {fix}")
        self.problem = problem
        self.fix = fix

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str]]:
        return (type(self), (self.problem, self.fix))


class CheckFailed(Exception):  # noqa: N818 - a verdict, not a fault
    """A check that ran to its end and failed: exit code 1."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns a sentence that names the nearest of `known`, or lists them all when none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def join_problems(problems: list[UserError]) -> UserError:
    """Makes one error of many, numbered, so that all are mended in one go."""
    if len(problems) == 1:
        return problems[0]
    lines = [f"{i}. {p!s}" for i, p in enumerate(problems, 1)]
    return UserError(f"{len(problems)} problems:\n" + "\n".join(lines))
