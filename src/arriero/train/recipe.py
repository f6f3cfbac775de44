"""The recipe's schema: the dataclasses that each part of the program owns, and the checks across them.

common/settings.py builds it from a TOML file and `--key.sub value` flags. Each field's docstring says what it means.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from arriero.checkpoint.config import CheckpointConfig
from arriero.checkpoint.formats.huggingface import read_shape
from arriero.common.device import DeviceChoice
from arriero.common.errors import UserError, closest_match
from arriero.common.ranges import PathText, path_problem, range_problems
from arriero.common.settings import parse
from arriero.common.text import escape
from arriero.common.toml import file_settings
from arriero.data.config import DataConfig
from arriero.distributed.parallel.config import ParallelConfig, RecomputeConfig
from arriero.distributed.parallel.limits import compile_layout_problems, float8_problems
from arriero.model.config import LlamaConfig
from arriero.observe.profile import profile_problems
from arriero.train.config import LogConfig, OptimConfig, ScheduleConfig, TrainConfig, WatchConfig


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run."""

    model: Annotated[str, PathText] = ""
    """A config.json, the directory that holds one, or a shape that comes with arriero; empty takes `init`'s."""
    init: Annotated[str, PathText] = ""
    """A Hugging Face directory whose weights the run starts from; empty draws them from the seed."""
    tokenizer: Annotated[str, PathText] = ""
    """Directory or file of the tokenizer that made the data; it is checked against the data and kept with the run."""
    out: Annotated[str, PathText] = ""
    """The run directory to write."""
    seed: Annotated[int, Interval(ge=0, lt=2**32)] = 1234
    """Decides the initial weights and the order of the data."""
    device: DeviceChoice = "auto"
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
        source = read_shape(Path(self.init))
        if shape is not None and shape != source:
            compared = [f.name for f in dataclasses.fields(shape) if f.compare]
            differing = [name for name in compared if getattr(shape, name) != getattr(source, name)]
            raise UserError(f"model and init differ in {', '.join(differing)}", "leave model empty: init has a shape")
        return source

    def problems(self, processes: int) -> list[UserError]:
        """All that is wrong with the recipe on this many processes, before anything is started."""
        if found := range_problems(self):
            return found
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


def recipe_of_checkpoint(checkpoint: Path) -> Recipe:
    """The recipe of the run that wrote a checkpoint. Raises UserError where it cannot be read."""
    return parse(Recipe, file_settings(checkpoint / "recipe.toml"), prog="arriero pretrain")


def find_bundled(folder: str, name: str, suffix: str) -> Path:
    """`name` as a path if it is there, else the file of that name that comes with arriero.

    Args:
        folder: `models` for shapes, empty for recipes.
        name: what the user gave.
        suffix: `.json` or `.toml`.

    Raises:
        UserError: neither exists.
    """
    if wrong := path_problem(name):
        raise UserError(f"the file {wrong}", "name a file, or one that comes with arriero")
    if Path(name).is_file() or (folder and (Path(name) / "config.json").is_file()):
        return Path(name)
    bundled = bundled_directory() / folder
    candidate = bundled / (name if name.endswith(suffix) else name + suffix)
    if "/" not in name and candidate.is_file():
        return candidate
    known = [path.stem for path in bundled.glob(f"*{suffix}")]
    raise UserError(
        f"{escape(name)}: no such file", f"{closest_match(name, known)} (these come with arriero)" if known else ""
    )


def bundled_directory() -> Path:
    """Where the recipes lie: inside the installed package, or beside `src/` in a checkout."""
    inside = Path(str(resources.files("arriero"))) / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[3] / "recipes"
