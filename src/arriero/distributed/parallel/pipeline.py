"""Pipeline parallelism by torch.distributed.pipelining: stages of consecutive layers, fed with micro-batches.

The schedules are torch's, by torch's names. Which of them pass the proof of equality is in tests/distributed/parallel.

Every stage is given the shapes and dtypes of what it receives and sends. Without them torch infers them at the first
step, and the stages send them to each other as pickles, which run code where they are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from arriero.distributed.parallel.config import V_SHAPED, ParallelConfig, stage_layers
from arriero.distributed.parallel.mesh import Ranks
from arriero.distributed.parallel.microbatch import MicroBatch
from arriero.distributed.parallel.shards import local_gradient
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama


def stages_of(config: ParallelConfig, rank: int) -> list[int]:
    """The stages that pipeline rank `rank` holds."""
    if config.pipeline_schedule in V_SHAPED:
        return [rank, config.stages - 1 - rank]
    return list(range(rank, config.stages, config.pipeline_parallel))


def prune_to_stage(model: Llama, stage: int, config: ParallelConfig) -> None:
    """Drops from the whole model what stage `stage` does not hold, in place."""
    own = stage_layers(config, model.config.num_hidden_layers)[stage]
    for name in list(model.model.layers):
        if int(name) not in own:
            del model.model.layers[name]
    if stage > 0:
        model.model.embed_tokens = None  # type: ignore[assignment]
    if stage < config.stages - 1:
        model.model.norm = None  # type: ignore[assignment]
        model.lm_head = None  # type: ignore[assignment]


def stage_shapes(
    stage: int, config: ParallelConfig, *, rows: int, length: int, width: int, compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Input and output of stage `stage` for one micro-batch, as meta tensors.

    Args:
        stage: its number.
        config: the layout.
        rows: samples of a micro-batch, B.
        length: positions of a row, all context ranks together.
        width: of the stream, D.
        compute: dtype of the stream.

    Returns:
        The input: token ids int64 [B, P] of the first stage, else the stream [B, S, D]; P positions are this process's,
        S its share of them under sequence parallelism. The output: the summed loss [1] of the last stage, in float32
        at least, else the stream.
    """
    positions = length // config.context_parallel
    share = positions // config.tensor_parallel if config.sequence_parallel else positions

    def stream() -> Tensor:
        return torch.empty(rows, share, width, dtype=compute, device="meta", requires_grad=True)

    tokens = torch.empty(rows, positions, dtype=torch.int64, device="meta")
    loss = torch.empty(1, dtype=torch.promote_types(compute, torch.float32), device="meta", requires_grad=True)
    return tokens if stage == 0 else stream(), loss if stage == config.stages - 1 else stream()


class Pipeline:
    """This process's stages and their schedule.

    Args:
        parts: the stages' models, laid out.
        forwards: for each, the module to call: itself, or itself in the compute dtype.
        micro_batches: how many a step has.
        rows: samples of a micro-batch.
        length: positions of a row, all context ranks together.
        compute: dtype of the stream between the stages.
    """

    def __init__(
        self, parts: list[Llama], forwards: list[nn.Module], *, config: ParallelConfig, ranks: Ranks,
        device: torch.device, micro_batches: int, rows: int, length: int, compute: torch.dtype,
    ) -> None:  # fmt: skip
        # Here, because it imports the compiler, which takes seconds, and most layouts have no pipeline.
        from torch.distributed.pipelining import PipelineStage
        from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

        assert ranks.mesh is not None
        self.parts, self.device = parts, device
        self.v_shaped = config.pipeline_schedule in V_SHAPED
        own = stages_of(config, ranks.coordinates["pipeline"])
        group = ranks.mesh.get_group("pipeline")
        width = parts[0].config.hidden_size
        self.stages: list[PipelineStage] = []
        for forward, number in zip(forwards, own, strict=True):
            stage_input, stage_output = stage_shapes(
                number, config, rows=rows, length=length, width=width, compute=compute
            )
            stage = PipelineStage(
                forward, number, config.stages, device, input_args=stage_input, output_args=stage_output, group=group
            )
            self.stages.append(stage)
        self.holds_first, self.holds_last = 0 in own, config.stages - 1 in own
        kind = get_schedule_class(config.pipeline_schedule)
        one = issubclass(kind, PipelineScheduleSingle)
        self.schedule: Any = kind(
            self.stages[0] if one else self.stages, n_microbatches=micro_batches, scale_grads=False,
            loss_fn=lambda loss, labels: loss.sum(),  # the last stage has taken the labels, and returns the loss
        )  # fmt: skip

    def time_phases(self, timed: Callable[..., Callable[..., Any]]) -> None:
        """Times the schedule's calls by `timed(call, phase, before)`; the time between them is communication."""
        for stage in self.stages:
            for name in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"):
                setattr(stage, name, timed(getattr(stage, name), name.partition("_")[0], "communication"))

    def run(self, micro: list[MicroBatch], *, weight: float, train: bool) -> Tensor:
        """The summed loss over all micro-batches, float64; zero but on the last stage.

        With `train` the gradient of weight x loss is added to the parameters. torch's V-shaped schedules cannot run
        forward alone: there, a validation runs backward too, and drops the gradient.
        """
        for part in self.parts:
            part.loss_scale = weight  # not an argument: torch 2.11 takes tensors alone, and FSDP would round one
        keywords = {
            name: torch.cat([getattr(m, name) for m in micro])
            for name in ("positions", "mask")
            if getattr(micro[0], name) is not None
        }
        inputs = (torch.cat([m.tokens for m in micro]),) if self.holds_first else ()
        target = torch.cat([m.labels for m in micro]) if self.holds_last else None
        if target is not None:
            keywords["labels"] = target
        losses: list[Tensor] = []
        backward = train or self.v_shaped
        run_schedule = self.schedule.step if backward else self.schedule.eval
        with torch.set_grad_enabled(backward):
            run_schedule(*inputs, target=target, losses=losses if self.holds_last else None, **keywords)
        if backward and not train:
            for part in self.parts:
                part.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for loss in losses:
            total += loss.detach().double()
        return total / weight


def sum_tied_gradients(parts: list[Llama], config: LlamaConfig, ranks: Ranks) -> None:
    """Where embedding and head are one matrix on two stages, sets both gradients to their sum."""
    if not config.tie_word_embeddings or ranks.sizes["pipeline"] == 1:
        return
    weights = [p.model.embed_tokens.weight for p in parts if p.model.embed_tokens is not None]
    weights += [p.lm_head.weight for p in parts if p.lm_head is not None]
    gradients = [local_gradient(w) for w in weights]  # type: ignore[arg-type]
    found = [g for g in gradients if g is not None]
    if len(found) == 2:  # a schedule whose first rank holds the first and the last stage
        total = found[0] + found[1]
        for gradient in found:
            gradient.copy_(total)
    elif found and ranks.embedding_group is not None:
        dist.all_reduce(found[0], group=ranks.embedding_group)
