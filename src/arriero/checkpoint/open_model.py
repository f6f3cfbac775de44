"""Detects what kind of model a path holds, and opens any kind under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.checkpoint import find
from arriero.checkpoint.formats import megatron, meta, torch_dist
from arriero.checkpoint.formats.foreign_config import ConfigHints, ForeignModel
from arriero.checkpoint.formats.huggingface import has_weights, open_with_config, validate_tensors
from arriero.checkpoint.load import CheckpointReader
from arriero.checkpoint.tensors.stream import ViewReader
from arriero.checkpoint.verify import verify_checkpoint
from arriero.common.errors import UserError
from arriero.common.registry import Registry
from arriero.common.untrusted import read_json, require_inside, schema_problem
from arriero.data.tokenizer_files import GENERATION_CONFIG, VOCABULARY_FILES
from arriero.model.config import FAMILIES, LlamaConfig

if TYPE_CHECKING:
    import torch

    from arriero.model.llama import Llama


@dataclass(frozen=True)
class WeightFormat:
    """Weights as another program writes them."""

    open: Callable[[Path, ConfigHints], ForeignModel]
    """Opens them under Hugging Face's names; a UserError names the file that is wrong."""
    detect: Callable[[Path], bool] = lambda path: False
    """Whether a directory holds them. It must be quick, and must not raise."""


WEIGHT_FORMATS: Registry[WeightFormat] = Registry("--from", words=("auto", "hf", "run"))
"""Other programs' formats, in the order in which they are tried."""
WEIGHT_FORMATS.register("torch_dist", WeightFormat(torch_dist.open_torch_dist, torch_dist.is_torch_dist))
WEIGHT_FORMATS.register("megatron", WeightFormat(megatron.open_ranks, megatron.is_rank_directory))
WEIGHT_FORMATS.register("ascendspeed", WeightFormat(megatron.open_ranks))
WEIGHT_FORMATS.register("meta", WeightFormat(meta.open_meta, meta.is_meta))


@dataclass(frozen=True)
class OpenedModel:
    """A model that can be read."""

    kind: str
    path: Path
    reader: ViewReader
    config: LlamaConfig
    tokenizer: Path | None = None
    """Directory of the tokenizer's files, where the source has one."""
    layout: str = "whole"
    """How the source is sharded, for messages."""
    generation: Path | None = None
    """generation_config.json, where the source has one."""
    assumed: list[str] = field(default_factory=list)
    """What was assumed, one sentence each."""

    @property
    def notes(self) -> list[str]:
        """What was assumed, and what of the config is not taken into account."""
        return [*self.assumed, *self.config.notices]


def detect_kind(path: Path) -> str:
    """The kind of model that a path is.

    Raises:
        UserError: nothing is there, or nothing of a known kind.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or directory", "name a run, a checkpoint or a model directory")
    if path.is_dir():
        if find.is_run(path) or find.is_checkpoint(path):
            return "run"
        for kind, form in WEIGHT_FORMATS.items():
            if form.detect(path):
                return kind
        if has_weights(path) or (path / "config.json").is_file():
            return "hf"
    known = "a Hugging Face directory, a run, Megatron's, AscendSpeed's or Meta's checkpoint"
    raise UserError(f"{path}: is no model that arriero knows", f"name {known}")


def open_model(path: Path, kind: str | None = None, hints: ConfigHints | None = None) -> OpenedModel:
    """Opens any model under Hugging Face's names.

    Args:
        path: a directory.
        kind: hf, run, megatron, ascendspeed (which share an opener), torch_dist or meta; None detects it.
        hints: the shape and vocabulary, for checkpoints that lack them.

    Raises:
        UserError: nothing is there, or the model is not complete; the error names the file.
    """
    path, hints = Path(path), hints or ConfigHints()
    kind = kind or detect_kind(path)
    opened = _open(path, kind, hints)
    places = [path, opened.path]
    if kind == "run":
        places.append(opened.path.parent.parent / "tokenizer")
    tokenizer = hints.tokenizer or next((place for place in places if holds_tokenizer(place)), None)
    files = [place / GENERATION_CONFIG for place in places if (place / GENERATION_CONFIG).is_file()]
    generation = require_inside(files[0].parent, files[0]) if files else None
    return replace(opened, tokenizer=tokenizer, generation=generation)


def _open(path: Path, kind: str, hints: ConfigHints) -> OpenedModel:
    """The model itself, by its kind's own opener."""
    if kind == "run":
        directory = find.find_checkpoint(path)
        config, where = LlamaConfig.from_json(directory), str(directory)
        reader = validate_tensors(CheckpointReader(directory, mapped=False).weights(), config, where=where)
        if damage := verify_checkpoint(directory):
            raise UserError(damage[0], "name an earlier checkpoint of the run: RUN/checkpoints/step-...")
        return OpenedModel("run", directory, reader, config, layout=directory.name)
    if kind != "hf":
        found = WEIGHT_FORMATS.get(kind).open(path, hints)
        return OpenedModel(found.kind, path, found.reader, found.config, layout=found.layout, assumed=found.notes)
    reader, config = open_with_config(path, None if hints.config is None else LlamaConfig.from_json(hints.config))
    return OpenedModel("hf", path, reader, config)


def holds_tokenizer(directory: Path) -> bool:
    """Whether a directory holds a tokenizer."""
    return any((directory / name).is_file() for name in VOCABULARY_FILES)


def end_ids(opened: OpenedModel, eos_id: int | None) -> frozenset[int]:
    """Every token id that ends a text of this model.

    Args:
        opened: the model; its config.json and generation_config.json may name several.
        eos_id: the tokenizer's own. Where it is none of theirs, they belong to another tokenizer, and it alone counts.

    Raises:
        UserError: generation_config.json is broken.
    """
    ends = set(opened.config.end_ids)
    if opened.generation is not None:
        form = {"eos_token_id": (int, [int], None)}
        raw = read_json(opened.generation, "restore the file, or remove it", dict)
        if wrong := schema_problem({"eos_token_id": None, **raw}, form):
            raise UserError(f"{opened.generation}: {wrong}", "restore the file, or remove it")
        given = raw.get("eos_token_id")
        ends |= set(given if isinstance(given, list) else [] if given is None else [given])
    return frozenset(ends if eos_id is None or eos_id in ends else {eos_id})


def load_model(
    path: Path, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> tuple[Llama, Path | None]:
    """Loads a model for inference; also returns the directory of its tokenizer.

    Args:
        path: a Hugging Face directory, a run or a checkpoint.
        dtype: None keeps the stored one.
        device: None is the CPU.

    Raises:
        UserError: see `open_model`.
    """
    opened = open_model(path)
    return build(opened.reader, opened.config, dtype, device), opened.tokenizer


def build(
    reader: ViewReader, config: LlamaConfig, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Llama:
    """The model in memory, one tensor read at a time, in evaluation mode."""
    import torch

    with torch.device("meta"):
        model: Llama = FAMILIES.get(config.model_type).module(config)
    weights = {name: reader.read(name).to(device=device, dtype=dtype) for name in reader.names()}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval().requires_grad_(False)
