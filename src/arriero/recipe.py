"""The recipe: one TOML file plus `--key.sub value` on the command line, one parser, all problems at once.

The file is flattened into the same flags that the command line gives, a later one replaces an earlier one, and tyro
turns them into the frozen dataclasses that each part of the program owns. What each key means stands below its field.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import tyro

from arriero.checkpoint.config import CheckpointConfig
from arriero.common.errors import UserError, join_problems, nearest
from arriero.common.untrusted import read_text
from arriero.data.batches import DataConfig
from arriero.model.config import LlamaConfig
from arriero.observe.profile import profile_problems
from arriero.parallel.compiled import compile_layout_problems
from arriero.parallel.config import ParallelConfig
from arriero.parallel.float8 import float8_problems
from arriero.parallel.recompute import RecomputeConfig
from arriero.train.config import TrainConfig
from arriero.train.optim import OptimConfig
from arriero.train.reporter import LogConfig
from arriero.train.schedule import ScheduleConfig
from arriero.train.watch import WatchConfig

T = TypeVar("T")
MAX_RECIPE_BYTES = 100_000


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run."""

    model: str = ""
    """A config.json, the directory that holds one, or a shape that comes with arriero; empty takes `init`'s."""
    init: str = ""
    """A Hugging Face directory whose weights the run starts from; empty draws them from the seed."""
    tokenizer: str = ""
    """Directory or file of the tokenizer that made the data; it is checked against the data and kept with the run."""
    out: str = ""
    """The run directory to write."""
    seed: int = 1234
    """Decides the initial weights and the order of the data."""
    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    """Where to train; auto takes the accelerator that is there, or the CPU."""
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def model_config(self) -> LlamaConfig:
        """The shape to train: `model`'s, which must be `init`'s where both are given.

        Raises:
            UserError: no shape is named, or the two differ.
        """
        if not self.model and not self.init:
            raise UserError("model: not set", "name a config.json or a shape, or give --init a Hugging Face directory")
        shape = LlamaConfig.from_json(find_bundled("models", self.model, ".json")) if self.model else None
        if not self.init:
            assert shape is not None
            return shape
        source = LlamaConfig.from_json(self.init)
        if shape is not None and shape != source:
            differing = [f.name for f in dataclasses.fields(shape) if getattr(shape, f.name) != getattr(source, f.name)]
            raise UserError(f"model and init differ in {', '.join(differing)}", "leave model empty: init has a shape")
        return source

    def problems(self, processes: int) -> list[UserError]:
        """All that is wrong with the recipe on this many processes, before anything is started."""
        found: list[UserError] = []
        if not self.out:
            found.append(UserError("out: not set", "name the run directory to write, such as --out runs/first"))
        found += self.layout_problems(processes)
        found += profile_problems(self.log.profile, self.train.steps)
        for part in (self.optim, self.schedule, self.checkpoint, self.log, self.watch, self.data):
            found += part.problems()
        if self.data.order == "megatron" and "rewind" in (self.train.on_nonfinite, self.train.on_spike):
            fix = "use data.order stable, or skip or stop instead"
            found.append(
                UserError("train: rewind leaves batches out, and data.order megatron has no more of them", fix)
            )
        return found

    def layout_problems(self, processes: int) -> list[UserError]:
        """What is wrong with model, layout and batch on this many processes."""
        found: list[UserError] = []
        data = max(1, processes // self.parallel.model_parallel)
        try:
            model, train = self.model_config(), self.train
            found += self.parallel.problems(
                model, processes, sequence_length=train.sequence_length, micro_batches=train.accumulation(data)
            )
            tokens = train.micro_batch * train.sequence_length
            found += float8_problems(train.float8, train.dtype, model, self.parallel, tokens=tokens)
        except UserError as error:
            found.append(error)
        found += self.train.problems(data)
        if self.train.compile:
            found += compile_layout_problems(self.parallel)
        return found + self.recompute.problems(self.parallel)


@dataclass(frozen=True)
class Setting:
    """One key with its values as words, and where it was given."""

    key: str
    words: list[str]
    origin: str


def parse(cls: type[T], settings: list[Setting], *, prog: str) -> T:
    """Builds `cls` from settings, the later of two with one key winning.

    Raises:
        UserError: every unknown key with the nearest name, and every value of the wrong type.
    """
    known = field_types(cls)
    problems = []
    for setting in settings:
        if setting.key not in known:
            problems.append(UserError(f"{setting.origin}: unknown key {setting.key!r}", nearest(setting.key, known)))
    last = {setting.key: setting for setting in settings if setting.key in known}
    if not problems:
        try:
            return _tyro(cls, list(last.values()), prog)
        except UserError:
            pass  # find each culprit below
    for setting in last.values():
        try:
            _tyro(cls, [setting], prog)
        except UserError as error:
            problems.append(error)
    raise join_problems(problems)


def show_flags(cls: type, prog: str) -> None:
    """Prints every flag of a dataclass with its default and its meaning, as tyro does."""
    try:
        tyro.cli(cls, prog=prog, args=["--help"], config=(tyro.conf.FlagConversionOff,))
    except SystemExit:
        sys.stdout.flush()


def _tyro(cls: type[T], settings: list[Setting], prog: str) -> T:
    kinds = field_types(cls)
    words = []
    for s in settings:
        values = (
            [w.capitalize() if w in ("true", "false") else w for w in s.words] if kinds.get(s.key) is bool else s.words
        )
        words += [f"--{s.key}", *values]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return tyro.cli(cls, prog=prog, args=words, config=(tyro.conf.FlagConversionOff,))
    except SystemExit:
        said = _first_sentence(printed.getvalue())
        where = settings[0].origin if len(settings) == 1 else prog
        wanted = f"give {_describe(field_types(cls).get(settings[0].key))}" if len(settings) == 1 else ""
        raise UserError(f"{where}: {said}", wanted) from None


def _first_sentence(box: str) -> str:
    """What tyro says between the title of its box and the help text, on one line."""
    lines = [re.sub(r"[^\x20-\x7e]", "", line).strip() for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if line and not line.strip("-")] + [len(lines)]
    start, end = (rules[0] + 1, rules[1]) if len(rules) > 2 else (1, rules[0])
    return " ".join(line for line in lines[start:end] if line) or "cannot be read"


def _describe(kind: Any) -> str:
    """A type in a person's words."""
    if getattr(kind, "__origin__", None) is Literal:
        return "one of " + ", ".join(map(str, kind.__args__))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(kind, str(kind).replace("typing.", ""))


def field_types(cls: type) -> dict[str, Any]:
    """Every key that `cls` knows, dotted, with its type."""
    found: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            found |= {f"{f.name}.{key}": kind for key, kind in field_types(hints[f.name]).items()}
        else:
            found[f.name] = hints[f.name]
    return found


def command_line_settings(words: list[str]) -> list[Setting]:
    """Reads `--key.sub value ...` and `--key.sub=value`; dashes in a key are underscores."""
    settings: list[Setting] = []
    for word in words:
        if re.match(r"--[A-Za-z]", word):
            flag, equals, value = word[2:].partition("=")
            key = flag.replace("-", "_")
            settings.append(Setting(key, [value] if equals else [], f"--{flag}"))
        elif settings:
            settings[-1].words.append(word)
        else:
            raise UserError(f"unexpected argument {word!r}", "give one recipe, then --key value pairs")
    return settings


def file_settings(path: Path) -> list[Setting]:
    """Reads a TOML recipe into settings that know their line.

    Raises:
        UserError: no such file, or not TOML.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such recipe", "name a TOML file, or one that comes with arriero")
        text = read_text(path, "name a TOML file", MAX_RECIPE_BYTES)
        tables = tomllib.loads(text)
    except RecursionError:
        raise UserError(f"{path}: not TOML that can be read: it is nested too deep", "mend it") from None
    except ValueError as error:  # TOMLDecodeError is one; so is a number of more digits than Python reads
        raise UserError(f"{path}: not TOML: {error}", "mend that line") from None
    lines = _key_lines(text)
    return [Setting(key, words, f"{path}:{lines.get(key, 1)}") for key, words in _flatten(tables)]


def _flatten(table: dict[str, Any], prefix: str = "") -> list[tuple[str, list[str]]]:
    found = []
    for name, value in table.items():
        key = f"{prefix}{name}".replace("-", "_")
        if isinstance(value, dict):
            found += _flatten(value, f"{key}.")
        else:
            found.append((key, [str(v) for v in value] if isinstance(value, list) else [str(value)]))
    return found


def _key_lines(text: str) -> dict[str, int]:
    """The line on which each dotted key stands; tomllib does not tell."""
    found: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([\w.-]+)\s*\]", line):
            table = header[1] + "."
        elif key := re.match(r"\s*([\w.-]+)\s*=", line):
            found.setdefault((table + key[1]).replace("-", "_"), number)
    return found


def find_bundled(folder: str, name: str, suffix: str) -> Path:
    """`name` as a path if it is there, else the file of that name that comes with arriero.

    Args:
        folder: `models` for shapes, empty for recipes.
        name: what the user gave.
        suffix: `.json` or `.toml`.

    Raises:
        UserError: neither exists.
    """
    if Path(name).is_file() or (folder and (Path(name) / "config.json").is_file()):
        return Path(name)
    bundled = bundled_directory() / folder
    candidate = bundled / (name if name.endswith(suffix) else name + suffix)
    if "/" not in name and candidate.is_file():
        return candidate
    known = [path.stem for path in bundled.glob(f"*{suffix}")]
    raise UserError(f"{name}: no such file", f"{nearest(name, known)} (these come with arriero)" if known else "")


def bundled_directory() -> Path:
    """Where the recipes lie: inside the installed package, or beside `src/` in a checkout."""
    inside = Path(str(resources.files("arriero"))) / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def to_toml(value: Any) -> str:
    """A recipe as TOML text, every key written out."""
    import tomli_w

    return tomli_w.dumps(_plain(value))


def _plain(part: Any) -> dict[str, Any]:
    values = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    return {key: _plain(v) if dataclasses.is_dataclass(v) else v for key, v in values.items()}
