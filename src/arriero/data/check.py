"""Whether a data set fits a model and its tokenizer, before the first step."""

from __future__ import annotations

from typing import Any

from arriero.common.errors import UserError
from arriero.common.text import escape
from arriero.data.batches import Batches
from arriero.data.config import DataConfig
from arriero.data.indexed import IndexedDataset
from arriero.data.instruct import InstructionSet
from arriero.data.manifest import find_manifest
from arriero.data.prefix import indexed_sets, parse_prefix

MAX_SCANNED_TOKENS = 1 << 28
"""Tokens of a foreign data set that are looked at before the start; all ids are looked at when they are read."""
_SCANNED_RANGES = 64


def check_data_against(config: DataConfig, vocab_size: int, tokenizer_fingerprint: str | None = None) -> None:
    """Refuses data whose token ids the model has no row for, or that another tokenizer made.

    A data set with a manifest is checked by it; of one without up to MAX_SCANNED_TOKENS tokens are read, about 1 GB/s.

    Args:
        config: the data.
        vocab_size: rows of the model's embedding.
        tokenizer_fingerprint: of the tokenizer that goes with the model, if there is one.

    Raises:
        UserError: names both vocabularies, or both tokenizers.
    """
    for prefix in parse_prefix(config.prefix).prefixes:
        sets = indexed_sets(prefix)
        found = find_manifest(next(iter(sets.values())))
        if found is None:
            for end, name in sets.items():
                ignored = -100 if end.endswith("_labels_document") else None
                check_token_ids(IndexedDataset(name), vocab_size, ignored=ignored)
            continue
        manifest = found[1]
        made_by = manifest["tokenizer"]
        fix = f"prepare the text with the model's own tokenizer, not {escape(made_by['path'])}"
        if manifest["largest_id"] >= vocab_size:
            raise UserError(
                f"{escape(prefix)} was made with a vocabulary of {made_by['vocab_size']} entries (it holds token id "
                f"{manifest['largest_id']}), the model's vocabulary has {vocab_size}",
                fix,
            )
        if tokenizer_fingerprint is not None and made_by["fingerprint"] != tokenizer_fingerprint:
            raise UserError(
                f"{escape(prefix)} was made with another tokenizer: {escape(made_by['path'])} "
                f"({escape(made_by['fingerprint'][:12])}), the model's has vocabulary {tokenizer_fingerprint[:12]}",
                fix,
            )


def check_token_ids(data: IndexedDataset, vocab_size: int | None, *, whole: bool = False, **how: Any) -> None:
    """Checks all ids of a set or, unless `whole`, those of evenly spaced ranges of a large one.

    Raises:
        OutsideVocabulary: as `IndexedDataset.check_ids`, which takes `how`.
    """
    total = len(data.tokens)
    if whole or total <= MAX_SCANNED_TOKENS:
        data.check_ids(vocab_size, **how)
        return
    for i in range(_SCANNED_RANGES):
        first = (total - MAX_SCANNED_TOKENS // _SCANNED_RANGES) * i // (_SCANNED_RANGES - 1)
        data.check_ids(vocab_size, first=first, end=first + MAX_SCANNED_TOKENS // _SCANNED_RANGES, **how)


def batch_notices(batches: Batches) -> list[str]:
    """Lines about a split that is read more often than it seems, about records that are cut or left out, and about
    samples in which no label carries a loss.

    Raises:
        UserError: no sample of a set keeps one.
    """
    lines = [f" NOTICE: {batches.split}: {note}" for note in batches.notices()]
    blend = batches.blend
    if blend is not None and blend.total < blend.samples:
        lines.append(
            f" NOTICE: data.prefix: without weights Megatron-LM passes over a blend once, which is {blend.total} "
            f"samples; the run reads {blend.samples}, and starts over: give weights, or fewer steps"
        )
    for prefix, one in zip(parse_prefix(batches.config.prefix).prefixes, batches.sets, strict=True):
        if not isinstance(one, InstructionSet):
            continue
        found = one.label_coverage()
        if not found.without_labels:
            continue
        length, never = batches.sequence_length, f"{found.never:,} have none at any length" if found.never else ""
        fix = (
            f"train.sequence_length {found.sufficient_length} keeps one in each that has any"
            if found.sufficient_length
            else ""
        )
        if found.without_labels == found.samples:
            problem = (
                f"{escape(prefix)}: no sample of the {batches.split} split keeps a label at train.sequence_length "
            )
            raise UserError(
                f"{problem}{length}: nothing could be learned from it", fix or "look at how it was prepared"
            )
        lines.append(
            f" NOTICE: {escape(prefix)}: {found.without_labels:,} of {found.samples:,} {batches.split} samples keep no "
            f"label at train.sequence_length {length}, and nothing is learned from them: "
            + "; ".join(part for part in (fix, never) if part)
        )
    return lines


def size_notices(
    vocab_size: int, positions: int, *, length: int, tokenizer_size: int | None = None, tokenizer: str = ""
) -> list[str]:  # fmt: skip
    """Lines about a model that is smaller than what is used with it.

    Args:
        vocab_size: rows of the model's embedding.
        positions: its max_position_embeddings.
        length: train.sequence_length.
        tokenizer_size: entries of the run's tokenizer, if it has one.
        tokenizer: its path.
    """
    lines = []
    if length > positions:
        lines.append(
            f" NOTICE: train.sequence_length {length} is above the model's max_position_embeddings {positions}: "
            f"set max_position_embeddings {length} in config.json if the model is meant for it"
        )
    if tokenizer_size is not None and tokenizer_size > vocab_size:
        lines.append(
            f" NOTICE: {escape(tokenizer)} has {tokenizer_size} entries, the model {vocab_size} rows: the model can "
            f"neither read nor write ids from {vocab_size} on; set vocab_size {tokenizer_size} or more in config.json"
        )
    return lines
