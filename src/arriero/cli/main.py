"""The command line: finds a verb's module, reads its arguments and runs it. Only verbs that need torch import it.

A verb is a dataclass of arguments and, beside it in the same module, `run(arguments) -> exit code`. tyro reads the
arguments; a class with a classmethod `from_words(words)` reads them itself. Another package adds a verb by an entry
point of the group `arriero.verbs` that names its arguments' class: `hello = "my_package.hello:HelloArgs"`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import signal
import sys
from dataclasses import dataclass
from typing import Literal

from arriero.common.errors import (
    EXIT_CHECK_FAILED,
    EXIT_OK,
    EXIT_USAGE,
    CheckFailed,
    UserError,
    as_user_error,
    closest_match,
)
from arriero.common.output import OutputClosed, guarded_output
from arriero.common.signals import Interrupted, interrupt_on_signals
from arriero.common.text import escape, escape_message
from arriero.common.version import __version__


@dataclass(frozen=True)
class Verb:
    """Where a verb is: its module, the dataclass of its arguments in it, and a line about it."""

    module: str
    arguments: str
    summary: str
    result: Literal["files", "output"] = "output"
    """What the verb is for. One that makes files continues when its output can no longer be written."""


VERBS = {
    "demo": Verb(
        "arriero.cli.demo", "DemoArgs", "the whole path on Python's documentation, in under three minutes", "files"
    ),
    "doctor": Verb(
        "arriero.cli.doctor", "DoctorArgs", "what this machine has, what is missing, and the line that fixes it"
    ),
    "prepare": Verb("arriero.cli.prepare", "PrepareArgs", "text, JSON or parquet -> token files", "files"),
    "inspect": Verb("arriero.cli.inspect.command", "InspectArgs", "what a path is, and whether it is whole"),
    "pretrain": Verb("arriero.cli.pretrain", "PretrainArgs", "train a recipe, on one process or many", "files"),
    "bench": Verb(
        "arriero.cli.bench.command", "BenchArgs", "a recipe's speed here, the matmul peak, the best settings"
    ),
    "launch": Verb("arriero.cli.launch_slurm", "LaunchArgs", "a SLURM batch file for a recipe"),
    "convert": Verb(
        "arriero.cli.convert", "ConvertArgs", "weights between Hugging Face, Megatron, AscendSpeed", "files"
    ),
    "export": Verb("arriero.cli.export", "ExportArgs", "a run or checkpoint -> a Hugging Face directory", "files"),
    "compare": Verb("arriero.cli.compare.command", "CompareArgs", "two runs or logs: figure, table, verdict"),
    "torture": Verb(
        "arriero.cli.torture.command", "TortureArgs", "kill a small run again and again: does it always end the same?"
    ),
    "generate": Verb("arriero.cli.generate", "GenerateArgs", "text from a run or a Hugging Face directory"),
    "completion": Verb("arriero.cli.completion", "CompletionArgs", "a script that completes words in bash or zsh"),
}


def main(words: list[str] | None = None) -> None:
    """Runs `arriero ...` and ends the process with the verb's exit code."""
    sys.exit(dispatch(sys.argv[1:] if words is None else words, last=True))


def dispatch(words: list[str], *, last: bool = False) -> int:
    """Runs one command line; returns 0 done, 1 a check failed, 2 usage or input error, 128 + n ended by signal n.

    Args:
        words: the verb and what follows it.
        last: whether the process ends afterwards.
    """
    verb = VERBS.get(words[0]) if words else None
    informs = not {"-h", "--help", "--verify-layout"}.isdisjoint(words)
    with guarded_output(required=verb is None or verb.result == "output" or informs), interrupt_on_signals(last=last):
        try:
            return _run_and_flush(words)
        except CheckFailed as error:
            print(escape_message(f"arriero: {error}"), file=sys.stderr)
            return EXIT_CHECK_FAILED
        except OutputClosed:  # `arriero ... | head`
            return EXIT_OK
        except Interrupted as error:
            print(f"arriero: {error}", file=sys.stderr)
            return error.code
        except KeyboardInterrupt:
            print("arriero: interrupted", file=sys.stderr)
            return 128 + signal.SIGINT
        except Exception as error:
            known = as_user_error(error)
            if known is None:
                raise
            print(escape_message(f"arriero: {known}"), file=sys.stderr)
            return EXIT_USAGE


def _run_and_flush(words: list[str]) -> int:
    """Runs the command line and flushes standard output, whose errors count as this command's."""
    code = EXIT_OK
    try:
        if not words or words[0] in ("-h", "--help", "help", "-V", "--version"):
            print(f"arriero {__version__}" if words and words[0] in ("-V", "--version") else overview())
        else:
            code = run_verb(words[0], words[1:])
    except SystemExit:  # after the help of a verb
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


def run_verb(name: str, words: list[str]) -> int:
    """Imports the verb's module, reads its arguments and runs it."""
    verb = VERBS.get(name) or outside_verbs().get(name)
    if verb is None:
        raise UserError(f"unknown verb '{escape(name)}'", closest_match(name, VERBS))
    module = importlib.import_module(verb.module)
    arguments = getattr(module, verb.arguments)
    if hasattr(arguments, "from_words"):
        return int(module.run(arguments.from_words(words)))
    from arriero.common.settings import parse_verb

    return int(module.run(parse_verb(arguments, words, prog=f"arriero {name}", description=f"{verb.summary}.")))


def outside_verbs() -> dict[str, Verb]:
    """The verbs of other installed packages, by name."""
    return {
        point.name: Verb(
            point.module, point.attr, f"from the package {point.dist.name if point.dist else point.module}"
        )
        for point in importlib.metadata.entry_points(group="arriero.verbs")
    }


def overview() -> str:
    """The list of verbs."""
    lines = [f"  {name:11}{verb.summary}" for name, verb in (outside_verbs() | VERBS).items()]
    return "\n".join(
        ["usage: arriero VERB ... (arriero VERB --help explains it)", "", "Pre-train LLaMA models.", "", *lines]
    )


if __name__ == "__main__":
    main()
