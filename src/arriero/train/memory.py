"""The least memory that a run needs, against what the machine has, before anything is allocated."""

from __future__ import annotations

from arriero.common.device import available_memory, machine_memory
from arriero.common.errors import UserError
from arriero.model.config import LlamaConfig, count_parameters
from arriero.parallel.config import ParallelConfig
from arriero.train.config import TrainConfig

FAR = 1.2
"""Beyond this many times the machine's whole memory a run is refused."""


def least_bytes(
    model: LlamaConfig, train: TrainConfig, parallel: ParallelConfig, processes: int
) -> tuple[float, float]:
    """What one process must hold at least, in bytes: its share of the state, and of one micro-batch's activations.

    State: parameters, gradients and two moments in float32 (float64 in a proof), cut over tensor- and pipeline-parallel
    and, as far as the ZeRO stage does it, over data-parallel ranks. Activations: one hidden vector for each token and
    layer, which even full recomputation keeps. Real runs need more.
    """
    data = max(1, processes // parallel.model_parallel)
    shared = (min(parallel.zero_group, data) or data) * parallel.context_parallel
    width = 8 if train.dtype == "float64" else 4
    whole = {1: 2 * width, 2: width, 3: 0}[parallel.zero_stage]  # what each data-parallel rank has for itself
    parameters = count_parameters(model) / (parallel.tensor_parallel * parallel.pipeline_parallel)
    state = parameters * (whole + (4 * width - whole) / shared)
    tokens = train.micro_batch * train.sequence_length / parallel.context_parallel
    narrow = 2 if train.dtype in ("bfloat16", "float16") else width
    layers = max(1.0, model.num_hidden_layers / parallel.pipeline_parallel)
    activations = tokens * (model.hidden_size * layers * narrow + 8)
    return state, activations


def memory_problems(
    model: LlamaConfig, train: TrainConfig, parallel: ParallelConfig, processes: int, here: int
) -> tuple[list[UserError], list[str]]:
    """Whether `here` processes of the run fit into this machine's memory, on the CPU.

    Returns:
        An error where they are far from it; a line for the log where they hardly do. Both empty where nothing is known.
    """
    machine = machine_memory()
    state, activations = (here * share for share in least_bytes(model, train, parallel, processes))
    need = state + activations
    where = f"{here} process{'es' if here > 1 else ''}"
    told = (
        f"{count_parameters(model):,} parameters and micro-batches of {train.micro_batch} x {train.sequence_length} "
        f"tokens need {_gigabytes(need)} or more in {where} ({_gigabytes(state)} of state, {_gigabytes(activations)} "
        "of activations)"
    )
    if machine and need > FAR * machine:
        larger = "train.micro_batch" if activations > state else "the model"
        fix = f"make {larger} smaller, or spread it over more machines (parallel.*, --nodes)"
        return [UserError(f"{told}, and this machine has {_gigabytes(machine)}", fix)], []
    if available_memory() and need > available_memory():
        return [], [f" MEMORY: {told}, and {_gigabytes(available_memory())} are free"]
    return [], []


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"
