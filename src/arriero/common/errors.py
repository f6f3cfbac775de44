"""UserError, whose message is printed without a traceback, and the exit codes of every verb."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable

from arriero.common.text import escape

MAX_LISTED = 20
EXIT_OK = 0
EXIT_CHECK_FAILED = 1  # a comparison or verification ran and failed
EXIT_USAGE = 2  # the command, the recipe or an input is wrong; nothing was changed
EXIT_STOPPED = 75  # a run was asked to stop, saved its state and can be resumed (sysexits' "try again")


class UserError(Exception):
    """An error that the user can fix: printed without a traceback, exit code 2.

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


class CheckFailed(Exception):  # noqa: N818 - a result of a check, not an error of the program
    """A check that completed and failed: exit code 1."""


def closest_match(word: str, known: Iterable[str]) -> str:
    """A sentence that names the closest of `known`, or lists the first of them when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(word[:200], names, n=1, cutoff=0.6)
    more = f" and {len(names) - MAX_LISTED:,} more" if len(names) > MAX_LISTED else ""
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names[:MAX_LISTED])}{more}"


def join_problems(problems: list[UserError]) -> UserError:
    """One error from several, numbered, so that the user can fix all at once."""
    if len(problems) == 1:
        return problems[0]
    lines = [f"{i}. {p!s}" for i, p in enumerate(problems, 1)]
    return UserError(f"{len(problems)} problems:\n" + "\n".join(lines))


_RESOURCES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""Errors of the operating system whose text is enough for the user to fix them."""
_BACKEND = re.compile(r"Failed to load the backend extension: (\S+?)\.?(?:\s|$)")
_MEMORY = ("DefaultCPUAllocator", "out of memory", "Unable to allocate")


def as_user_error(error: BaseException) -> UserError | None:
    """A UserError for an unforeseen exception that the user can fix; None for a fault of the program.

    These are: a file that cannot be opened or written, too little memory, an input that is nested too deep, an invalid
    file name, a device whose libraries are missing.
    """
    if isinstance(error, UserError):
        return error
    text, found = str(error), ("", "")
    if isinstance(error, OSError) and error.strerror and (error.filename is not None or error.errno in _RESOURCES):
        names = [escape(name) for name in (error.filename, error.filename2) if name not in (None, "")]
        found = f"{' -> '.join(names)}{': ' if names else ''}{error.strerror}", _os_error_fix(error.errno)
    elif isinstance(error, RecursionError):
        found = "an input is nested too deep to be read", "look for the file with thousands of brackets"
    elif isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in text for w in _MEMORY)):
        what = escape(text.partition("\n")[0]) or "no more could be had"
        found = f"the memory does not suffice: {what}", "free some, or ask for less at a time"
    elif isinstance(error, RuntimeError) and (match := _BACKEND.search(text)):
        fix = "make its libraries known (for npu: source CANN's set_env.sh), or set TORCH_DEVICE_BACKEND_AUTOLOAD=0"
        cause = f": {escape(error.__cause__)}" if error.__cause__ else ""
        found = f"torch cannot load {escape(match[1])}{cause}", fix
    elif isinstance(error, UnicodeEncodeError) or (isinstance(error, ValueError) and "embedded null" in text):
        found = f"a file name or a text holds what cannot be written: {escape(error)}", "correct the name"
    return UserError(*found) if found[0] else None


def _os_error_fix(number: int | None) -> str:
    return {
        errno.ENOSPC: "make room, or write to another disk",
        errno.EDQUOT: "make room, or write to another disk",
        errno.EACCES: "give yourself the right to it, or name another path",
        errno.EPERM: "give yourself the right to it, or name another path",
        errno.EROFS: "name a path that can be written",
        errno.ENAMETOOLONG: "name a shorter path",
        errno.EMFILE: "raise the limit of open files: ulimit -n",
        errno.EIO: "look at the disk: the kernel's log has more",
    }.get(number or 0, "correct the path, or name another")
