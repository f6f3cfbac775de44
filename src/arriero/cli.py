"""The command line: verb -> the function that does it. Nothing heavy is imported before a verb is known."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass

from arriero import __version__
from arriero.common.errors import EXIT_CHECK_FAILED, EXIT_OK, EXIT_USAGE, CheckFailed, UserError, nearest
from arriero.common.text import printable


@dataclass(frozen=True)
class Verb:
    """Where a verb is done: `module.run` takes an `arguments` dataclass, or the bare words when that is empty."""

    module: str
    arguments: str
    summary: str


VERBS = {
    "demo": Verb("arriero.demo", "DemoArgs", "the whole path on Python's documentation, in under three minutes"),
    "doctor": Verb(
        "arriero.doctor", "DoctorArgs", "what this machine has, what is missing, and the line that fixes it"
    ),
    "prepare": Verb("arriero.data.prepare", "PrepareArgs", "text, JSON or parquet -> token files"),
    "inspect": Verb("arriero.inspect", "InspectArgs", "what a path is, and whether it is whole"),
    "pretrain": Verb("arriero.train.command", "", "train a recipe, on one process or many"),
    "bench": Verb("arriero.bench.command", "", "a recipe's speed here, the matmul peak, the best settings"),
    "launch": Verb("arriero.slurm", "", "a SLURM batch file for a recipe"),
    "convert": Verb("arriero.weights.convert", "ConvertArgs", "weights between Hugging Face, Megatron, AscendSpeed"),
    "export": Verb("arriero.weights.export", "ExportArgs", "a run or checkpoint -> a Hugging Face directory"),
    "compare": Verb("arriero.compare.command", "CompareArgs", "two runs or logs against each other: figure, verdict"),
    "torture": Verb(
        "arriero.torture.command", "TortureArgs", "kill a small run again and again: does it always end the same?"
    ),
    "generate": Verb("arriero.generate", "GenerateArgs", "text from a run or a Hugging Face directory"),
}


def main(words: list[str] | None = None) -> None:
    """Runs `arriero ...` and ends the process with the verb's exit code."""
    sys.exit(dispatch(sys.argv[1:] if words is None else words))


def dispatch(words: list[str]) -> int:
    """Runs one command line; returns 0 done, 1 a check failed, 2 usage or input error."""
    if not words or words[0] in ("-h", "--help", "help", "-V", "--version"):
        print(f"arriero {__version__}" if words and words[0] in ("-V", "--version") else overview())
        return EXIT_OK
    try:
        return run_verb(words[0], words[1:])
    except UserError as error:
        print(printable(f"arriero: {error}"), file=sys.stderr)
        return EXIT_USAGE
    except CheckFailed as error:
        print(printable(f"arriero: {error}"), file=sys.stderr)
        return EXIT_CHECK_FAILED
    except BrokenPipeError:  # `arriero ... | head`
        sys.stderr.close()
        return EXIT_OK
    except KeyboardInterrupt:
        print("arriero: interrupted", file=sys.stderr)
        return 130


def run_verb(name: str, words: list[str]) -> int:
    """Imports the verb's module, parses its arguments with tyro and runs it."""
    if name not in VERBS:
        raise UserError(f"unknown verb {name!r}", nearest(name, VERBS))
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
