"""Pre-train LLaMA models: one command line, one recipe file, the same numbers in every parallel layout.

The Python API, described in docs/python.md. Every function imports what it needs when it is called, so that
`import arriero` costs nothing; a UserError names what is wrong and how to fix it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from arriero.common.version import __version__

if TYPE_CHECKING:
    import pyarrow

    from arriero.checkpoint.export import ExportDtype, Exported
    from arriero.checkpoint.language_model import LanguageModel, ModelDtype
    from arriero.checkpoint.open_model import OpenedModel
    from arriero.common.device import DeviceChoice
    from arriero.common.errors import CheckFailed, UserError
    from arriero.observe.compare import Comparison
    from arriero.train.recipe import Recipe

__all__ = [
    "CheckFailed", "Recipe", "Run", "UserError", "__version__", "change_recipe", "compare", "export", "load_model",
    "load_recipe", "open_model", "prepare", "pretrain", "read_metrics", "resume",
]  # fmt: skip

_LAZY = {"Recipe": "train.recipe", "UserError": "common.errors", "CheckFailed": "common.errors"}
"""Classes of the API and the modules that define them (PEP 562): imported when they are first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'arriero' has no attribute {name!r}")
    return getattr(importlib.import_module(f"arriero.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


@dataclass(frozen=True)
class Run:
    """A run directory."""

    path: Path
    """The directory; docs/pretrain.md lists its files."""
    complete: bool
    """Whether the run reached its last step; False if it was interrupted and saved its state."""

    def metrics(self, kind: Literal["step", "validation", "ranks"] = "step") -> pyarrow.Table:
        """As `read_metrics`."""
        return read_metrics(self.path, kind)

    def checkpoints(self) -> list[Path]:
        """The committed checkpoints, in the order in which they were saved."""
        from arriero.checkpoint.find import committed

        return committed(self.path / "checkpoints")


def load_recipe(name: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Reads a recipe and checks each key.

    Args:
        name: a TOML file, or the name of a recipe that comes with arriero, such as "llama-7b-zero-8p".
        changes: values by dotted key, such as {"train.steps": 100, "out": "runs/first"}.

    Raises:
        UserError: no such recipe, or what is wrong with its keys and values, all together.
    """
    from arriero.common.settings import parse
    from arriero.common.toml import file_settings
    from arriero.train.recipe import Recipe, find_bundled

    return parse(Recipe, file_settings(find_bundled("", str(name), ".toml")) + _settings(changes), prog="arriero")


def change_recipe(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values by dotted key, checked as `load_recipe` does."""
    from arriero.common.settings import parse
    from arriero.train.facts import flat
    from arriero.train.recipe import Recipe

    return parse(Recipe, _settings(flat(recipe)) + _settings(changes), prog="arriero")


def prepare(
    inputs: str | Path | Sequence[str | Path], *, out: str | Path, tokenizer: str | Path, format: str = "text",
    keys: Sequence[str] = ("text",), template: str | None = None, per: Literal["line", "paragraph", "file"] = "line",
    bos: bool = True, eos: bool = True, workers: int = 0, overwrite: bool = False,
) -> str:  # fmt: skip
    """Writes token files from text, as `arriero prepare` does; docs/prepare.md has the formats.

    Args:
        inputs: files, directories or globs of one kind.
        out: path that the written names begin with.
        tokenizer: directory with tokenizer.model or tokenizer.json, or such a file.
        format: text, alpaca, alpaca-sft or chat.
        keys: columns of the text format; one data set for each.
        template: name or TOML file of the prompt's template.
        per: text files: what one document is.
        bos: put BOS before every document.
        eos: put EOS after every document (after every answer, in chats).
        workers: threads; 0 means one for each core.
        overwrite: replace what an earlier call with other inputs wrote.

    Returns:
        What `data.prefix` of a recipe is to be.

    Raises:
        UserError: a wrong input, tokenizer or option, or too many records that cannot be used.
    """
    import shlex

    from arriero.data.prepare import prepare as write
    from arriero.data.prepare_config import PrepareConfig

    files = [inputs] if isinstance(inputs, (str, Path)) else inputs
    config = PrepareConfig(
        tuple(map(str, files)), str(out), Path(tokenizer), format=format, keys=tuple(keys), template=template, per=per,
        bos=bos, eos=eos, workers=workers, overwrite=overwrite,
    )  # fmt: skip
    prefixes = write(config).prefixes
    return prefixes[0] if len(prefixes) == 1 else shlex.join(prefixes)


def pretrain(recipe: Recipe, *, processes: int = 0) -> Run:
    """Trains a recipe into its `out`, as `arriero pretrain` does. Interrupting it saves the state and returns.

    Args:
        recipe: what to train; `out` must be set, and hold no run.
        processes: how many; 0 means one a device, on the CPU one a model-parallel rank. A single one is this process;
            more are forked from it, so this process must not have used the device.

    Raises:
        UserError: what is wrong with the recipe, its inputs or this machine, all together.
        CheckFailed: a process failed; what it reported is on stderr.
    """
    return _train(recipe, processes=processes)


def resume(
    run: str | Path, changes: Mapping[str, Any] | None = None, *, processes: int = 0, allow_change: Iterable[str] = ()
) -> Run:
    """Goes on with a run from its newest whole checkpoint, in any layout, as `arriero pretrain --resume` does.

    Args:
        run: the run directory, or one of its checkpoints.
        changes: values by dotted key, such as {"train.steps": 200}.
        processes: see `pretrain`.
        allow_change: keys whose change makes it another run, and is meant (docs/checkpoints.md).

    Raises:
        UserError: as `pretrain`; also no checkpoint, or a change that is not allowed.
        CheckFailed: see `pretrain`.
    """
    from arriero.checkpoint.find import find_checkpoint, run_of
    from arriero.common.errors import UserError

    path, changes = Path(run), dict(changes or {})
    checkpoint, directory = find_checkpoint(path), run_of(path)
    if directory is None and "out" not in changes:
        raise UserError(f"{path}: is a checkpoint that lies in no run directory", 'set "out" to the directory to write')
    own = (directory or checkpoint) / "recipe.toml"
    recipe = load_recipe(own if own.is_file() else checkpoint / "recipe.toml", {"out": str(directory)} | changes)
    return _train(recipe, path, processes=processes, allow_change=tuple(allow_change))


def _train(recipe: Recipe, resumed: Path | None = None, *, processes: int, allow_change: tuple[str, ...] = ()) -> Run:
    from arriero.common.errors import EXIT_CHECK_FAILED, EXIT_STOPPED, CheckFailed
    from arriero.common.signals import interrupt_on_signals
    from arriero.distributed.launch.config import LaunchConfig
    from arriero.distributed.launch.worker import restart_clock
    from arriero.train.config import RunOptions
    from arriero.train.run import pretrain

    launch = LaunchConfig(nproc_per_node=processes)
    options = RunOptions(resume=str(resumed or ""), launch=launch, allow_change=allow_change)
    restart_clock()
    with interrupt_on_signals():
        code = pretrain(recipe, options)
    if code == EXIT_CHECK_FAILED:
        raise CheckFailed(f"{recipe.out}: a process of the run failed; what it reported is on stderr")
    return Run(Path(recipe.out), complete=code != EXIT_STOPPED)


def read_metrics(run: str | Path, kind: Literal["step", "validation", "ranks"] = "step") -> pyarrow.Table:
    """A run's metrics as a table, a column for each key of docs/metrics.md.

    Raises:
        UserError: the run has no metrics, or a line in them that is none.
    """
    from arriero.observe.table import metrics_table

    return metrics_table(Path(run), kind)


def compare(
    a: str | Path, b: str | Path, *, quantities: Sequence[str] = (), max_rel: float = 0.02, logging_steps: int = 0
) -> Comparison:
    """Compares two runs, or logs of other systems, step by step, as `arriero compare` does (docs/compare.md).

    Args:
        a: the reference.
        b: the run to judge.
        quantities: names such as lm_loss and grad_norm; none means these two, as far as both have them.
        max_rel: the greatest relative error |b - a| / |a| allowed at any common iteration.
        logging_steps: steps between two lines of a log whose lines name no step.

    Raises:
        UserError: the two cannot be compared.
    """
    from arriero.observe.compare import DEFAULT_QUANTITIES, compare_runs
    from arriero.observe.curves.curve import canonical_name
    from arriero.observe.curves.read import read_curves

    wanted = {*DEFAULT_QUANTITIES, *map(canonical_name, quantities)}
    first, second = read_curves(Path(a), wanted), read_curves(Path(b), wanted)
    return compare_runs(first, second, quantities=tuple(quantities), max_rel=max_rel, logging_steps=logging_steps)


def export(
    source: str | Path, destination: str | Path, *, dtype: ExportDtype = "keep", tokenizer: str | Path | None = None,
    max_shard_gb: float = 5.0,
) -> Exported:  # fmt: skip
    """Writes a run, a checkpoint or a model as a Hugging Face directory and reads it back (docs/export.md).

    Args:
        source: a run (its newest checkpoint), a checkpoint, or a Hugging Face directory.
        destination: a new directory; it appears whole or not at all.
        dtype: what the weights are written as; keep is as stored.
        tokenizer: the tokenizer's directory, if it does not lie with the source.
        max_shard_gb: largest size of one safetensors file, in GB.

    Raises:
        UserError: the source is not a whole model, or the destination cannot be written.
        CheckFailed: the directory does not hold what was written.
    """
    from arriero.checkpoint.export import export as write

    where = None if tokenizer is None else Path(tokenizer)
    return write(Path(source), Path(destination), dtype=dtype, tokenizer=where, max_shard_gb=max_shard_gb)


def load_model(
    path: str | Path, *, tokenizer: str | Path | None = None, dtype: ModelDtype = "auto", device: DeviceChoice = "auto"
) -> LanguageModel:
    """Loads a model with its tokenizer; its `generate(prompt, max_new_tokens, ...)` continues a text.

    Args:
        path: a run (its newest checkpoint), a checkpoint, or a Hugging Face directory.
        tokenizer: the tokenizer's directory, if it does not lie with the model.
        dtype: auto is as stored, but float32 for a float16 model on the CPU.
        device: auto takes the accelerator that is there, or the CPU.

    Raises:
        UserError: not a whole model, or no tokenizer.
    """
    from arriero.checkpoint.language_model import LanguageModel

    where = None if tokenizer is None else Path(tokenizer)
    return LanguageModel(Path(path), tokenizer=where, dtype=dtype, device=device)


def open_model(path: str | Path) -> OpenedModel:
    """Opens a run, a checkpoint, or a model of another system; nothing is read before a tensor is asked for.

    `opened.reader` has `names()`, `shape(name)`, `dtype(name)` and `read(name)`, under Hugging Face's names;
    `opened.config` is the shape.

    Raises:
        UserError: nothing is there, or not a whole model.
    """
    from arriero.checkpoint.open_model import open_model as open_any

    return open_any(Path(path))


def _settings(values: Mapping[str, Any] | None) -> list[Any]:
    """Values by dotted key as the words of a command line, which one parser checks."""
    from arriero.common.settings import Setting

    found = []
    for key, value in (values or {}).items():
        words = [str(one) for one in value] if isinstance(value, (list, tuple)) else [str(value)]
        found.append(Setting(key, words, f"--{key}"))
    return found
