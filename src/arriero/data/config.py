"""Which data a run reads, and in which order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from arriero.common.errors import UserError
from arriero.common.text import escape
from arriero.data.prefix import dataset_exists, is_instruction, parse_prefix, suggest_prefix

TooLong = Literal["cut", "drop", "error"]


@dataclass(frozen=True)
class DataConfig:
    """What a run reads, and in which order."""

    prefix: str = ""
    """Data set that `arriero prepare` wrote (its path without .bin), or a blend: "0.7 A_text_document 0.3
    B_text_document"; without weights each set counts by its length. A name with blanks stands in quotes. An instruction
    set is named by the part before _packed."""
    split: str = "969,30,1"
    """Shares of train, validation and test documents; any positive scale."""
    split_by: Literal["order", "hash"] = "order"
    """order: contiguous ranges of the file, as Megatron; hash: each document by a hash of its number."""
    order: Literal["stable", "megatron"] = "stable"
    """stable: batch i depends on (seed, i) alone; megatron: Megatron-LM's order, bit for bit, which changes with the
    length of the run."""
    packing: Literal["auto", "pad", "best-fit"] = "auto"
    """Instruction sets only. pad: one record a sample; best-fit: several. auto: pad, and nothing for plain text."""
    too_long: TooLong = "cut"
    """Instruction sets only: records longer than train.sequence_length. cut: at its end, which may lose the answer;
    drop: leave them out; error: do not start. How many, and what is lost, is printed before the first step."""
    attention: Literal["window", "document"] = "window"
    """window: attention reaches over all of a packed sample; document: within each document, with positions that start
    at 0 in each."""

    def problems(self) -> list[UserError]:
        """Everything that is wrong with these values, without opening a data set (but its .idx must exist)."""
        found = []
        for parse in (lambda: parse_split(self.split), self._find):
            try:
                parse()
            except UserError as error:
                found.append(error)
        return found

    def _find(self) -> None:
        for prefix in parse_prefix(self.prefix).prefixes:
            instruction, name = is_instruction(prefix), escape(prefix)
            if not instruction and not dataset_exists(prefix):
                raise UserError(f"data.prefix: no data set at {name} ({name}.idx is missing)", suggest_prefix(prefix))
            if instruction and self.order == "megatron":
                raise UserError(
                    f'data.order = "megatron" is for plain text; {name} is an instruction set', 'use "stable"'
                )
            if not instruction and self.packing != "auto":
                raise UserError(f'data.packing = "{self.packing}" has no effect on plain text ({name})', "leave it out")
            if not instruction and self.too_long != "cut":
                raise UserError(
                    f'data.too_long = "{self.too_long}" has no effect on plain text ({name})', "leave it out"
                )


def parse_split(text: str) -> tuple[float, ...]:
    """Reads "969,30,1" (or with slashes; missing shares are 0). Raises UserError."""
    try:
        shares = [float(s) for s in text.replace("/", ",").split(",")]
    except ValueError as error:
        raise UserError(f"data.split {text!r} is not three numbers", 'write train,valid,test as "969,30,1"') from error
    shares += [0.0] * (3 - len(shares))
    if len(shares) > 3 or not all(0 <= s < float("inf") for s in shares) or not 0 < sum(shares) < float("inf"):
        raise UserError(
            f"data.split {text!r} needs up to three shares, none negative", 'write train,valid,test as "969,30,1"'
        )
    return tuple(shares)
