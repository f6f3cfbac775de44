"""A weight format of one's own: `ARRIERO_PLUGINS=weight_format arriero convert DIR OUT --to hf`.

The format is a directory with weights.npz, numpy's archive of arrays, and Hugging Face's config.json. With the plugin
every verb that opens a model (convert, export, generate, inspect) detects and reads it. The folder of this file must be
on PYTHONPATH.
"""

from pathlib import Path

import numpy as np
import torch

from arriero.checkpoint.formats.foreign_config import ConfigHints, ForeignModel
from arriero.checkpoint.formats.huggingface import validate_tensors
from arriero.checkpoint.open_model import WEIGHT_FORMATS, WeightFormat
from arriero.checkpoint.tensors.in_memory import in_memory
from arriero.common.errors import UserError
from arriero.model.config import LlamaConfig


def holds_archive(directory: Path) -> bool:
    """Whether this is such a directory."""
    return (directory / "weights.npz").is_file()


def open_archive(directory: Path, hints: ConfigHints) -> ForeignModel:
    """The arrays under Hugging Face's names, compared with the shapes that config.json asks for."""
    config = LlamaConfig.from_json(directory)
    try:
        with np.load(directory / "weights.npz", allow_pickle=False) as archive:
            arrays = {name: torch.from_numpy(archive[name]) for name in archive.files}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{directory / 'weights.npz'}: {error}", "write it again with numpy.savez") from None
    reader = validate_tensors(in_memory(arrays), config, where=str(directory))
    return ForeignModel("npz", reader, config, layout="whole", notes=[])


WEIGHT_FORMATS.register("npz", WeightFormat(open_archive, holds_archive))
