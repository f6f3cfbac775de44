"""The command line: verb -> the function that does it. Nothing heavy is imported before a verb is known."""

from __future__ import annotations

import importlib
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
    """Where a verb is done: `module.run` takes an `arguments` dataclass, or the bare words when that is empty."""

    module: str
    arguments: str
    summary: str
    result: Literal["files", "output"] = "output"
    """What the verb is for. One that makes files goes on when its output can no longer be written."""


VERBS = {
    "demo": Verb(
        "arriero.cli.demo", "DemoArgs", "the whole path on Python's documentation, in under three minutes", "files"
    ),
    "doctor": Verb(
        "arriero.cli.doctor", "DoctorArgs", "what this machine has, what is missing, and the line that fixes it"
    ),
    "prepare": Verb("arriero.cli.prepare", "PrepareArgs", "text, JSON or parquet -> token files", "files"),
    "inspect": Verb("arriero.cli.inspect.command", "InspectArgs", "what a path is, and whether it is whole"),
    "pretrain": Verb("arriero.cli.pretrain", "", "train a recipe, on one process or many", "files"),
    "bench": Verb("arriero.cli.bench.command", "", "a recipe's speed here, the matmul peak, the best settings"),
    "launch": Verb("arriero.cli.launch_slurm", "", "a SLURM batch file for a recipe"),
    "convert": Verb(
        "arriero.cli.convert", "ConvertArgs", "weights between Hugging Face, Megatron, AscendSpeed", "files"
    ),
    "export": Verb("arriero.cli.export", "ExportArgs", "a run or checkpoint -> a Hugging Face directory", "files"),
    "compare": Verb("arriero.cli.compare.command", "CompareArgs", "two runs or logs: figure, table, verdict"),
    "torture": Verb(
        "arriero.cli.torture.command", "TortureArgs", "kill a small run again and again: does it always end the same?"
    ),
    "generate": Verb("arriero.cli.generate", "GenerateArgs", "text from a run or a Hugging Face directory"),
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
    shows = not {"-h", "--help", "--verify-layout"}.isdisjoint(words)
    with guarded_output(required=verb is None or verb.result == "output" or shows), interrupt_on_signals(last=last):
        try:
            return _printed(words)
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


def _printed(words: list[str]) -> int:
    """Runs the command line until all that it prints has left this process."""
    code = EXIT_OK
    try:
        if not words or words[0] in ("-h", "--help", "help", "-V", "--version"):
            print(f"arriero {__version__}" if words and words[0] in ("-V", "--version") else overview())
        else:
            code = run_verb(words[0], words[1:])
    except SystemExit:  # tyro has printed its help, or what is wrong with the arguments
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


def run_verb(name: str, words: list[str]) -> int:
    """Imports the verb's module, parses its arguments with tyro and runs it."""
    if name not in VERBS:
        raise UserError(f"unknown verb '{escape(name)}'", closest_match(name, VERBS))
    verb = VERBS[name]
    module = importlib.import_module(verb.module)
    if not verb.arguments:
        return int(module.run(words))
    from arriero.common.settings import parse_verb

    cls = getattr(module, verb.arguments)
    return int(module.run(parse_verb(cls, words, prog=f"arriero {name}", description=f"{verb.summary}.")))


def overview() -> str:
    """The list of verbs."""
    lines = [f"  {name:10}{verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        ["usage: arriero VERB ... (arriero VERB --help tells more)", "", "Pre-train LLaMA models.", "", *lines]
    )


if __name__ == "__main__":
    main()
