"""A lower bound of the memory that a run needs, compared with the machine's before anything is allocated."""

from __future__ import annotations

from arriero.common.device import available_memory, machine_memory
from arriero.common.errors import UserError
from arriero.model.config import count_parameters
from arriero.train.recipe import Recipe

MICRO_BATCH_BYTES = 2000  # of Python's and torch's objects around its tensors
WHAT_TO_REDUCE = {
    "state": "the model", "activations": "train.micro_batch", "batches": "train.global_batch", "order": "train.steps"
}  # fmt: skip
REFUSE_ABOVE = 1.2
"""Beyond this many times the machine's whole memory a run is refused."""


def state_bytes(recipe: Recipe, processes: int) -> float:
    """Bytes of parameters, gradients and moments in one process at the fullest moment of a step.

    At rest these are 16 bytes a parameter in float32 (32 in a proof's float64), cut over tensor- and pipeline-parallel
    ranks and, by FSDP, over the data-parallel ones. While a step runs, stages 1 and 2 hold the gathered parameters in
    the compute dtype, and stage 1 the whole gradient, which accumulates in float32. Without data parallelism there is a
    copy in the compute dtype alone, where that has 16 bits.
    """
    train, parallel = recipe.train, recipe.parallel
    data = max(1, processes // parallel.model_parallel)
    shards = (min(parallel.zero_group, data) or data) * parallel.context_parallel
    width, compute = _widths(train.dtype)
    gathered = {1: compute + width, 2: compute, 3: 0}[parallel.zero_stage]
    if shards == 1:
        gathered = compute if compute < width else 0
    parameters = count_parameters(recipe.model_config()) / (parallel.tensor_parallel * parallel.pipeline_parallel)
    return parameters * (gathered + 4 * width / shards)


def minimum_bytes(recipe: Recipe, processes: int) -> dict[str, float]:
    """A lower bound of one process's memory in bytes, by purpose; real runs need more.

    state: see state_bytes. activations: one hidden vector for each token of a micro-batch and each layer, which even
    full recomputation keeps. batches: tokens and labels of the step's micro-batches and of the two that are read ahead.
    order: Megatron's, which is drawn for the whole run at once.
    """
    model, train, parallel = recipe.model_config(), recipe.train, recipe.parallel
    data = max(1, processes // parallel.model_parallel)
    length = train.sequence_length / parallel.context_parallel
    layers = max(1.0, model.num_hidden_layers / parallel.pipeline_parallel)
    samples, accumulated = train.global_batch / data, train.accumulation(data)
    return {
        "state": state_bytes(recipe, processes),
        "activations": train.micro_batch * length * model.hidden_size * layers * _widths(train.dtype)[1],
        "batches": 3 * (samples * length * 16 + accumulated * MICRO_BATCH_BYTES),
        "order": 20.0 * train.steps * train.global_batch if recipe.data.order == "megatron" else 0.0,
    }


def _widths(dtype: str) -> tuple[int, int]:
    """Bytes of a number in the optimizer's state, and in the matrix multiplications."""
    return {"float64": (8, 8), "float32": (4, 4)}.get(dtype, (4, 2))


def memory_problems(recipe: Recipe, processes: int, local_processes: int) -> tuple[list[UserError], list[str]]:
    """Whether `local_processes` processes of the run fit into this machine's memory, on the CPU.

    Returns:
        An error where they are far from it; a line for the log where they hardly do. Both empty where nothing is known.
    """
    machine = machine_memory()
    train = recipe.train
    parts = {name: local_processes * share for name, share in minimum_bytes(recipe, processes).items()}
    need = sum(parts.values())
    summary = (
        f"{count_parameters(recipe.model_config()):,} parameters, train.micro_batch {train.micro_batch:,}, "
        f"train.global_batch {train.global_batch:,} and train.sequence_length {train.sequence_length:,} need "
        f"{_gigabytes(need)} or more in {local_processes} process{'es' if local_processes > 1 else ''} ("
        + ", ".join(f"{_gigabytes(count)} of {name}" for name, count in parts.items() if count)
        + ")"
    )
    if machine and need > REFUSE_ABOVE * machine:
        larger = WHAT_TO_REDUCE[max(parts, key=parts.__getitem__)]
        fix = f"make {larger} smaller, or spread it over more machines (parallel.*, --nodes)"
        return [UserError(f"{summary}, and this machine has {_gigabytes(machine)}", fix)], []
    if available_memory() and need > available_memory():
        return [], [f" MEMORY: {summary}, and {_gigabytes(available_memory())} are free"]
    return [], []


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"
