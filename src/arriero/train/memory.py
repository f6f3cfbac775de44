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


def minimum_bytes(recipe: Recipe, processes: int) -> dict[str, float]:
    """A lower bound of one process's memory in bytes, by purpose; real runs need more.

    state: parameters, gradients and two moments in float32 (float64 in a proof), cut over tensor- and pipeline-parallel
    and, as far as the ZeRO stage does it, over data-parallel ranks. activations: one hidden vector for each token of a
    micro-batch and each layer, which even full recomputation keeps. batches: tokens and labels of the step's
    micro-batches and of the two that are read ahead. order: Megatron's, which is drawn for the whole run at once.
    """
    model, train, parallel = recipe.model_config(), recipe.train, recipe.parallel
    data = max(1, processes // parallel.model_parallel)
    shared = (min(parallel.zero_group, data) or data) * parallel.context_parallel
    width = 8 if train.dtype == "float64" else 4
    whole = {1: 2 * width, 2: width, 3: 0}[parallel.zero_stage]  # what each data-parallel rank has for itself
    parameters = count_parameters(model) / (parallel.tensor_parallel * parallel.pipeline_parallel)
    length = train.sequence_length / parallel.context_parallel
    narrow = 2 if train.dtype in ("bfloat16", "float16") else width
    layers = max(1.0, model.num_hidden_layers / parallel.pipeline_parallel)
    samples, accumulated = train.global_batch / data, train.accumulation(data)
    return {
        "state": parameters * (whole + (4 * width - whole) / shared),
        "activations": train.micro_batch * length * model.hidden_size * layers * narrow,
        "batches": 3 * (samples * length * 16 + accumulated * MICRO_BATCH_BYTES),
        "order": 20.0 * train.steps * train.global_batch if recipe.data.order == "megatron" else 0.0,
    }


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
