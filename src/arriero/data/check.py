"""Whether a data set fits a model and its tokenizer, before the first step."""

from __future__ import annotations

from arriero.common.errors import UserError
from arriero.data.batches import DataConfig, is_instruction, parse_prefix
from arriero.data.instruct import INSTRUCTION_FIELDS
from arriero.data.manifest import largest_id, manifest_of


def check_data_against(config: DataConfig, vocab_size: int, tokenizer_fingerprint: str | None = None) -> None:
    """Refuses data whose token ids the model has no row for, or that another tokenizer made.

    A data set with a manifest is judged by it; a foreign one is read through once, about 1 GB/s.

    Args:
        config: the data.
        vocab_size: rows of the model's embedding.
        tokenizer_fingerprint: of the tokenizer that goes with the model, if there is one.

    Raises:
        UserError: names both vocabularies, or both tokenizers.
    """
    for _, prefix in parse_prefix(config.prefix):
        name = f"{prefix}_packed_{INSTRUCTION_FIELDS[0]}_document" if is_instruction(prefix) else prefix
        found = manifest_of(name)
        if found is None:
            largest = largest_id(name)
            if largest >= vocab_size:
                raise UserError(
                    f"{prefix} holds token id {largest}, the model's vocabulary has {vocab_size} entries",
                    "prepare the text with the model's own tokenizer",
                )
            continue
        manifest = found[1]
        made_by = manifest["tokenizer"]
        fix = f"prepare the text with the model's own tokenizer, not {made_by['path']}"
        if made_by["vocab_size"] > vocab_size and manifest["largest_id"] >= vocab_size:
            raise UserError(
                f"{prefix} was made with a vocabulary of {made_by['vocab_size']} entries (it holds token id "
                f"{manifest['largest_id']}), the model's vocabulary has {vocab_size}",
                fix,
            )
        if tokenizer_fingerprint is not None and made_by["fingerprint"] != tokenizer_fingerprint:
            raise UserError(
                f"{prefix} was made with another tokenizer: {made_by['path']} ({made_by['fingerprint'][:12]}), "
                f"the model's has vocabulary {tokenizer_fingerprint[:12]}",
                fix,
            )
