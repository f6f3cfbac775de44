"""How a model is sharded over tensor and pipeline ranks, as one plan for writing and for reading.

A `RankTensor` is one tensor of one rank's file and lists the regions of Hugging Face tensors that make up its rows.
Writing copies from the regions, reading copies to them, so a round trip cannot disagree with itself.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace

from arriero.checkpoint.formats.dialects import Dialect
from arriero.checkpoint.formats.tied import EMBEDDING, HEAD
from arriero.checkpoint.tensors.stream import Slice, TensorView, matrix_shape
from arriero.common.errors import UserError, join_problems
from arriero.model.config import LlamaConfig, layer_shapes


@dataclass(frozen=True)
class Region:
    """A rectangle of a Hugging Face tensor that fills `rows` whole rows of a `RankTensor` from `out_row` on."""

    name: str
    row: int
    rows: int
    column: int
    columns: int
    out_row: int = 0
    step: int = 1  # 0: row `row` again and again
    padding: bool = False  # rows beyond the vocabulary: written, never read


@dataclass(frozen=True)
class RankTensor:
    """One tensor of one rank's file."""

    key: str
    shape: tuple[int, ...]
    regions: tuple[Region, ...]
    replicated: bool = False  # every tensor rank holds the same
    tied: bool = False  # a copy of the embedding


@dataclass(frozen=True)
class ParallelDegrees:
    """Degrees of parallelism and the padding of the vocabulary."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    padded_vocab: int = 0

    def describe(self) -> str:
        """For messages: TP2 x PP2."""
        text = f"TP{self.tensor} x PP{self.pipeline}"
        return text + (f" x VPP{self.virtual}" if self.virtual > 1 else "")


def padded_vocab_size(vocab: int, multiple: int, tensor: int) -> int:
    """The vocabulary rounded up to a multiple of `multiple` x `tensor`: Megatron's rule."""
    unit = multiple * tensor
    return -(-vocab // unit) * unit


def check_degrees(config: LlamaConfig, degrees: ParallelDegrees) -> None:
    """Raises UserError, with the degrees that are possible, if the model cannot be sharded so."""
    problems = []
    for what, count in (
        ("attention heads", config.num_attention_heads),
        ("key-value heads", config.num_key_value_heads),
        ("feed-forward columns", config.intermediate_size),
    ):
        if degrees.tensor < 1 or count % degrees.tensor:
            problems.append(UserError(f"{count} {what} do not divide over {degrees.tensor} tensor ranks", ""))
    if problems:
        sizes = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
        possible = [n for n in range(1, sizes[1] + 1) if not any(size % n for size in sizes)]
        text = "; ".join(problem.problem for problem in problems)
        problems = [UserError(text, f"possible --tp: {', '.join(map(str, possible))}")]
    layers = config.num_hidden_layers
    if min(degrees.pipeline, degrees.virtual) < 1 or layers % (degrees.pipeline * degrees.virtual):
        possible = [n for n in range(1, layers + 1) if layers % (n * max(1, degrees.virtual)) == 0] or [1]
        stages = f"{degrees.pipeline} stages" + (f" x {degrees.virtual} virtual" if degrees.virtual != 1 else "")
        fix = f"possible --pp: {', '.join(map(str, possible))}" + (" without --vpp" if layers % degrees.virtual else "")
        problems.append(UserError(f"{layers} layers do not divide over {stages}", fix))
    if degrees.virtual > 1 and degrees.pipeline == 1:
        problems.append(UserError("virtual stages need more than one stage", "leave --vpp out, or give --pp"))
    if problems:
        raise join_problems(problems)


def split_layers(config: LlamaConfig, degrees: ParallelDegrees) -> dict[tuple[int, int], range]:
    """Global layer numbers of (stage, chunk): chunk v of stage p follows chunk v of stage p - 1."""
    size = config.num_hidden_layers // (degrees.pipeline * degrees.virtual)
    order = [(p, v) for v in range(degrees.virtual) for p in range(degrees.pipeline)]
    return {place: range(i * size, (i + 1) * size) for i, place in enumerate(order)}


@dataclass(frozen=True)
class ShardingPlan:
    """The rank_tensors of one tensor rank."""

    config: LlamaConfig
    dialect: Dialect
    degrees: ParallelDegrees
    rank: int

    def rank_tensors(self, stage: int, chunk: int, layers: range) -> Iterator[RankTensor]:
        """The tensors of chunk `chunk` of stage `stage`, which has these layers, in the order of the model."""
        dialect, tied = self.dialect, self.config.tie_word_embeddings
        first = (stage, chunk) == (0, 0)
        if first:
            yield self._vocabulary(dialect.embedding, "model.embed_tokens.weight")
        for local, number in enumerate(layers):
            yield from self._layer(f"model.layers.{number}.", dialect.layer.format(local))
        if (stage, chunk) == (self.degrees.pipeline - 1, self.degrees.virtual - 1):
            yield self._replicated(dialect.final_norm, "model.norm.weight", (self.config.hidden_size,))
            if not tied:
                yield self._vocabulary(dialect.head, "lm_head.weight")
            elif dialect.always_head or not first:
                yield replace(self._vocabulary(dialect.tied_head, "model.embed_tokens.weight"), tied=True)

    def readable_tensors(self, stage: int, chunk: int, layers: range, keys: Container[str]) -> Iterator[RankTensor]:
        """As `rank_tensors`, and the head that the last chunk of a tied model may hold besides, if `keys` has it."""
        last = None
        for last in self.rank_tensors(stage, chunk, layers):
            yield last
        at_end = (stage, chunk) == (self.degrees.pipeline - 1, self.degrees.virtual - 1)
        if self.config.tie_word_embeddings and at_end and not (last and last.tied):
            key = next((key for key in (self.dialect.head, self.dialect.tied_head) if key in keys), None)
            if key is not None:
                yield replace(self._vocabulary(key, EMBEDDING), tied=True)

    def _vocabulary(self, key: str, name: str) -> RankTensor:
        vocab, width = self.config.vocab_size, self.config.hidden_size
        total = self.degrees.padded_vocab or vocab
        extra = total - vocab
        rows = [Region(name, 0, vocab, 0, width)]
        if extra and self.dialect.pad_with_last_rows and extra <= vocab:
            rows.append(Region(name, vocab - extra, extra, 0, width, padding=True))
        elif extra:
            rows.append(Region(name, vocab - 1, extra, 0, width, step=0, padding=True))
        share = total // self.degrees.tensor
        return RankTensor(key, (share, width), take_rows(rows, self.rank * share, share))

    def _layer(self, source: str, prefix: str) -> Iterator[RankTensor]:
        dialect, hidden, shapes = self.dialect, self.config.hidden_size, layer_shapes(self.config)
        yield self._replicated(prefix + dialect.input_norm, source + "input_layernorm.weight", (hidden,))
        for kind in ("weight", "bias"):
            if f"self_attn.q_proj.{kind}" in shapes:
                yield self._qkv(source, prefix, kind)
                name = f"self_attn.o_proj.{kind}"
                yield self._row_parallel(f"{prefix}{dialect.out}.{kind}", source + name, shapes[name])
        yield self._replicated(prefix + dialect.post_norm, source + "post_attention_layernorm.weight", (hidden,))
        for kind in ("weight", "bias"):
            if f"mlp.up_proj.{kind}" in shapes:
                yield from self._gate_up(source, prefix, kind)
                name = f"mlp.down_proj.{kind}"
                yield self._row_parallel(f"{prefix}{dialect.down}.{kind}", source + name, shapes[name])

    def _replicated(self, key: str, name: str, shape: tuple[int, ...]) -> RankTensor:
        rows, columns = matrix_shape(shape)
        return RankTensor(key, shape, (Region(name, 0, rows, 0, columns),), replicated=True)

    def _qkv(self, source: str, prefix: str, kind: str) -> RankTensor:
        """Megatron's order: for each key-value group its query heads, its key head, its value head."""
        groups, size = self.config.num_key_value_heads, self.config.head_dim
        queries = self.config.num_attention_heads // groups * size
        columns = self.config.hidden_size if kind == "weight" else 1
        rows = []
        for g in range(groups):
            rows.append(Region(f"{source}self_attn.q_proj.{kind}", g * queries, queries, 0, columns))
            rows.append(Region(f"{source}self_attn.k_proj.{kind}", g * size, size, 0, columns))
            rows.append(Region(f"{source}self_attn.v_proj.{kind}", g * size, size, 0, columns))
        share = groups * (queries + 2 * size) // self.degrees.tensor
        shape = (share, columns) if kind == "weight" else (share,)
        return RankTensor(f"{prefix}{self.dialect.qkv}.{kind}", shape, take_rows(rows, self.rank * share, share))

    def _gate_up(self, source: str, prefix: str, kind: str) -> Iterator[RankTensor]:
        """A rank's own gate rows above its own up rows: not a chunk of the fused matrix."""
        share, columns = self.config.intermediate_size // self.degrees.tensor, 1
        if kind == "weight":
            columns = self.config.hidden_size
        halves = [
            Region(f"{source}mlp.{n}.{kind}", self.rank * share, share, 0, columns) for n in ("gate_proj", "up_proj")
        ]
        groups = [halves] if len(self.dialect.gate_up) == 1 else [[half] for half in halves]
        for key, group in zip(self.dialect.gate_up, groups, strict=True):
            rows = share * len(group)
            shape = (rows, columns) if kind == "weight" else (rows,)
            yield RankTensor(f"{prefix}{key}.{kind}", shape, take_rows(group, 0, rows))

    def _row_parallel(self, key: str, name: str, shape: tuple[int, ...]) -> RankTensor:
        """A matrix sharded by columns; its bias is whole on every rank, since it is added after the sum."""
        if len(shape) == 1:
            return self._replicated(key, name, shape)
        share = shape[1] // self.degrees.tensor
        return RankTensor(key, (shape[0], share), (Region(name, 0, shape[0], self.rank * share, share),))


def take_rows(regions: Iterable[Region], start: int, count: int) -> tuple[Region, ...]:
    """Rows [start, start + count) of regions that are stacked on one another."""
    found, at = [], 0
    for region in regions:
        low, high = max(start, at), min(start + count, at + region.rows)
        if low < high:
            row = region.row + (low - at) * region.step
            found.append(replace(region, row=row, rows=high - low, out_row=low - start))
        at += region.rows
    return tuple(found)


def merge_ranks(
    pairs: Iterable[tuple[TensorView, RankTensor]], shapes: dict[str, tuple[int, ...]]
) -> dict[str, TensorView]:
    """Hugging Face tensors out of rank_tensors that were read: the plan from left to right.

    Copies of tied embeddings become the head, for `resolve_tied_head` to compare.

    Raises:
        UserError: two ranks hold regions of one tensor in different dtypes.
    """
    slices: dict[str, list[Slice]] = {}
    dtypes: dict[str, str] = {}
    for tensor, planned in pairs:
        for region in planned.regions:
            if region.padding:
                continue
            name = HEAD if planned.tied else region.name
            if dtypes.setdefault(name, tensor.dtype) != tensor.dtype:
                raise UserError(f"{planned.key} is {tensor.dtype} on one rank and {dtypes[name]} on another", "")
            for part in tensor.window(region.out_row, 0, region.rows, region.columns):
                placed = replace(part, out_row=part.out_row + region.row, out_column=part.out_column + region.column)
                slices.setdefault(name, []).append(placed)
    shapes = {HEAD: shapes[EMBEDDING], **shapes} if HEAD in slices else shapes
    return {name: TensorView(dtypes[name], shapes[name], tuple(slices[name])) for name in shapes if name in slices}
