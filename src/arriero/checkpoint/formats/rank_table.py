"""How a model is cut over tensor and pipeline ranks, as one table that is read in both directions.

A `Slot` is one tensor of one rank's file and says which rectangles of which Hugging Face tensors its rows are. Writing
follows it from right to left, reading from left to right, so a round trip cannot disagree with itself.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace

from arriero.checkpoint.formats.dialects import Dialect
from arriero.checkpoint.formats.tied import EMBEDDING, HEAD
from arriero.checkpoint.tensors.stream import Assembly, Piece, matrix_shape
from arriero.common.errors import UserError, join_problems
from arriero.model.config import LlamaConfig, layer_shapes


@dataclass(frozen=True)
class Part:
    """A rectangle of a Hugging Face tensor that fills `rows` whole rows of a slot from `at_row` on."""

    name: str
    row: int
    rows: int
    column: int
    columns: int
    at_row: int = 0
    step: int = 1  # 0: row `row` again and again
    padding: bool = False  # rows beyond the vocabulary: written, never read


@dataclass(frozen=True)
class Slot:
    """One tensor of one rank's file."""

    key: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    replica: bool = False  # every tensor rank holds the same
    tied: bool = False  # a copy of the embedding


@dataclass(frozen=True)
class Cut:
    """Degrees of parallelism and the padding of the vocabulary."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    padded_vocab: int = 0

    def words(self) -> str:
        """As a person says it."""
        text = f"TP{self.tensor} x PP{self.pipeline}"
        return text + (f" x VPP{self.virtual}" if self.virtual > 1 else "")


def padded(vocab: int, multiple: int, tensor: int) -> int:
    """The vocabulary rounded up to a multiple of `multiple` x `tensor`: Megatron's rule."""
    unit = multiple * tensor
    return -(-vocab // unit) * unit


def check_cut(config: LlamaConfig, cut: Cut) -> None:
    """Raises UserError, with the degrees that are possible, if the model cannot be cut so."""
    problems = []
    for what, count in (
        ("attention heads", config.num_attention_heads),
        ("key-value heads", config.num_key_value_heads),
        ("feed-forward columns", config.intermediate_size),
    ):
        if cut.tensor < 1 or count % cut.tensor:
            problems.append(UserError(f"{count} {what} do not divide over {cut.tensor} tensor ranks", ""))
    if problems:
        sizes = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
        possible = [n for n in range(1, sizes[1] + 1) if not any(size % n for size in sizes)]
        text = "; ".join(problem.problem for problem in problems)
        problems = [UserError(text, f"possible --tp: {', '.join(map(str, possible))}")]
    layers = config.num_hidden_layers
    if min(cut.pipeline, cut.virtual) < 1 or layers % (cut.pipeline * cut.virtual):
        possible = [n for n in range(1, layers + 1) if layers % (n * max(1, cut.virtual)) == 0] or [1]
        stages = f"{cut.pipeline} stages" + (f" x {cut.virtual} virtual" if cut.virtual != 1 else "")
        fix = f"possible --pp: {', '.join(map(str, possible))}" + (" without --vpp" if layers % cut.virtual else "")
        problems.append(UserError(f"{layers} layers do not divide over {stages}", fix))
    if cut.virtual > 1 and cut.pipeline == 1:
        problems.append(UserError("virtual stages need more than one stage", "leave --vpp out, or give --pp"))
    if problems:
        raise join_problems(problems)


def even_layers(config: LlamaConfig, cut: Cut) -> dict[tuple[int, int], range]:
    """Global layer numbers of (stage, chunk): chunk v of stage p follows chunk v of stage p - 1."""
    size = config.num_hidden_layers // (cut.pipeline * cut.virtual)
    order = [(p, v) for v in range(cut.virtual) for p in range(cut.pipeline)]
    return {place: range(i * size, (i + 1) * size) for i, place in enumerate(order)}


@dataclass(frozen=True)
class RankTable:
    """The slots of one tensor rank."""

    config: LlamaConfig
    dialect: Dialect
    cut: Cut
    rank: int

    def slots(self, stage: int, chunk: int, layers: range) -> Iterator[Slot]:
        """The tensors of chunk `chunk` of stage `stage`, which has these layers, in the order of the model."""
        dialect, tied = self.dialect, self.config.tie_word_embeddings
        first = (stage, chunk) == (0, 0)
        if first:
            yield self._vocabulary(dialect.embedding, "model.embed_tokens.weight")
        for local, number in enumerate(layers):
            yield from self._layer(f"model.layers.{number}.", dialect.layer.format(local))
        if (stage, chunk) == (self.cut.pipeline - 1, self.cut.virtual - 1):
            yield self._copy(dialect.final_norm, "model.norm.weight", (self.config.hidden_size,))
            if not tied:
                yield self._vocabulary(dialect.head, "lm_head.weight")
            elif dialect.always_head or not first:
                yield replace(self._vocabulary(dialect.tied_head, "model.embed_tokens.weight"), tied=True)

    def readable_slots(self, stage: int, chunk: int, layers: range, held: Container[str]) -> Iterator[Slot]:
        """As `slots`, and the head that the last chunk of a tied model may hold besides, if `held` has its key."""
        last = None
        for last in self.slots(stage, chunk, layers):
            yield last
        at_end = (stage, chunk) == (self.cut.pipeline - 1, self.cut.virtual - 1)
        if self.config.tie_word_embeddings and at_end and not (last and last.tied):
            key = next((key for key in (self.dialect.head, self.dialect.tied_head) if key in held), None)
            if key is not None:
                yield replace(self._vocabulary(key, EMBEDDING), tied=True)

    def _vocabulary(self, key: str, name: str) -> Slot:
        vocab, width = self.config.vocab_size, self.config.hidden_size
        total = self.cut.padded_vocab or vocab
        extra = total - vocab
        rows = [Part(name, 0, vocab, 0, width)]
        if extra and self.dialect.pad_with_last_rows and extra <= vocab:
            rows.append(Part(name, vocab - extra, extra, 0, width, padding=True))
        elif extra:
            rows.append(Part(name, vocab - 1, extra, 0, width, step=0, padding=True))
        share = total // self.cut.tensor
        return Slot(key, (share, width), cut_rows(rows, self.rank * share, share))

    def _layer(self, home: str, prefix: str) -> Iterator[Slot]:
        dialect, hidden, shapes = self.dialect, self.config.hidden_size, layer_shapes(self.config)
        yield self._copy(prefix + dialect.input_norm, home + "input_layernorm.weight", (hidden,))
        for kind in ("weight", "bias"):
            if f"self_attn.q_proj.{kind}" in shapes:
                yield self._qkv(home, prefix, kind)
                name = f"self_attn.o_proj.{kind}"
                yield self._row_parallel(f"{prefix}{dialect.out}.{kind}", home + name, shapes[name])
        yield self._copy(prefix + dialect.post_norm, home + "post_attention_layernorm.weight", (hidden,))
        for kind in ("weight", "bias"):
            if f"mlp.up_proj.{kind}" in shapes:
                yield from self._gate_up(home, prefix, kind)
                name = f"mlp.down_proj.{kind}"
                yield self._row_parallel(f"{prefix}{dialect.down}.{kind}", home + name, shapes[name])

    def _copy(self, key: str, name: str, shape: tuple[int, ...]) -> Slot:
        rows, columns = matrix_shape(shape)
        return Slot(key, shape, (Part(name, 0, rows, 0, columns),), replica=True)

    def _qkv(self, home: str, prefix: str, kind: str) -> Slot:
        """Megatron's order: for each key-value group its query heads, its key head, its value head."""
        groups, size = self.config.num_key_value_heads, self.config.head_dim
        queries = self.config.num_attention_heads // groups * size
        columns = self.config.hidden_size if kind == "weight" else 1
        rows = []
        for g in range(groups):
            rows.append(Part(f"{home}self_attn.q_proj.{kind}", g * queries, queries, 0, columns))
            rows.append(Part(f"{home}self_attn.k_proj.{kind}", g * size, size, 0, columns))
            rows.append(Part(f"{home}self_attn.v_proj.{kind}", g * size, size, 0, columns))
        share = groups * (queries + 2 * size) // self.cut.tensor
        shape = (share, columns) if kind == "weight" else (share,)
        return Slot(f"{prefix}{self.dialect.qkv}.{kind}", shape, cut_rows(rows, self.rank * share, share))

    def _gate_up(self, home: str, prefix: str, kind: str) -> Iterator[Slot]:
        """A rank's own gate rows above its own up rows: not a chunk of the fused matrix."""
        share, columns = self.config.intermediate_size // self.cut.tensor, 1
        if kind == "weight":
            columns = self.config.hidden_size
        halves = [Part(f"{home}mlp.{n}.{kind}", self.rank * share, share, 0, columns) for n in ("gate_proj", "up_proj")]
        groups = [halves] if len(self.dialect.gate_up) == 1 else [[half] for half in halves]
        for key, group in zip(self.dialect.gate_up, groups, strict=True):
            rows = share * len(group)
            shape = (rows, columns) if kind == "weight" else (rows,)
            yield Slot(f"{prefix}{key}.{kind}", shape, cut_rows(group, 0, rows))

    def _row_parallel(self, key: str, name: str, shape: tuple[int, ...]) -> Slot:
        """A matrix cut by columns; its bias is whole on every rank, since it is added after the sum."""
        if len(shape) == 1:
            return self._copy(key, name, shape)
        share = shape[1] // self.cut.tensor
        return Slot(key, (shape[0], share), (Part(name, 0, shape[0], self.rank * share, share),))


def cut_rows(parts: Iterable[Part], start: int, count: int) -> tuple[Part, ...]:
    """Rows [start, start + count) of parts that are stacked on one another."""
    found, at = [], 0
    for part in parts:
        low, high = max(start, at), min(start + count, at + part.rows)
        if low < high:
            row = part.row + (low - at) * part.step
            found.append(replace(part, row=row, rows=high - low, at_row=low - start))
        at += part.rows
    return tuple(found)


def gather(pairs: Iterable[tuple[Assembly, Slot]], shapes: dict[str, tuple[int, ...]]) -> dict[str, Assembly]:
    """Hugging Face tensors out of slots that were read: the table from left to right.

    Copies of tied embeddings become the head, for `settle_head` to compare.

    Raises:
        UserError: two ranks hold parts of one tensor in different dtypes.
    """
    pieces: dict[str, list[Piece]] = {}
    dtypes: dict[str, str] = {}
    for tensor, slot in pairs:
        for part in slot.parts:
            if part.padding:
                continue
            name = HEAD if slot.tied else part.name
            if dtypes.setdefault(name, tensor.dtype) != tensor.dtype:
                raise UserError(f"{slot.key} is {tensor.dtype} on one rank and {dtypes[name]} on another", "")
            for piece in tensor.window(part.at_row, 0, part.rows, part.columns):
                placed = replace(piece, at_row=piece.at_row + part.row, at_column=piece.at_column + part.column)
                pieces.setdefault(name, []).append(placed)
    shapes = {HEAD: shapes[EMBEDDING], **shapes} if HEAD in pieces else shapes
    return {name: Assembly(dtypes[name], shapes[name], tuple(pieces[name])) for name in shapes if name in pieces}
