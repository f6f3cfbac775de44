"""Compilation of the decoder layers, one by one, by torch.compile (torch calls it regional compilation).

All layers have one code and one shape, so the first layer's compilation serves the others: start-up does not grow with
depth. A run compiles a layer's training pass, and its pass without gradients where there is a validation; twice that
where recompute.mode "first" makes two kinds of layers.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from functools import partial
from pathlib import Path
from sys import version_info

import torch
from torch import Tensor, nn

from arriero.common.errors import UserError
from arriero.distributed.parallel.config import ZERO_BUBBLE, ParallelConfig
from arriero.model.head import loss_and_gradient, summed_loss
from arriero.model.llama import Llama


def apply_compile(model: Llama) -> None:
    """Has each layer's forward compiled when it is first called, in place; parameters keep their names.

    The forward is replaced, not the call: FSDP's hooks, which gather the layer's parameters, stay outside. A layer that
    recomputes is compiled together with its recomputation. So is the softmax of the logits, where the vocabulary is
    not cut. What cannot be compiled whole is an error (`fullgraph`), not a slow run. No shape changes during a run, so
    none is made symbolic.
    """
    for layer in model.model.layers.values():
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False)
    if model.model.embed_tokens is not None:
        model.model.embed_tokens.register_forward_hook(_arrived)
    if model.token_loss is summed_loss:
        model.token_loss = partial(summed_loss, chunk=torch.compile(loss_and_gradient, fullgraph=True, dynamic=False))


def _arrived(module: nn.Module, inputs: object, out: Tensor) -> Tensor:
    """The tensor-parallel embedding hands on a sum that is still under way; a compiled layer would lose its gradient.

    The copy waits for it, and autograd sees that.
    """
    from torch.distributed._functional_collectives import AsyncCollectiveTensor  # imports DTensors: a second

    return out.clone() if isinstance(out, AsyncCollectiveTensor) else out


def compile_layout_problems(parallel: ParallelConfig) -> list[UserError]:
    """Layouts whose layers cannot be compiled."""
    if parallel.pipeline_parallel == 1 or parallel.pipeline_schedule not in ZERO_BUBBLE:
        return []
    # The backward pass is run in halves; a compiled layer has one that frees its buffers when it is first run.
    what = f"train.compile does not work with parallel.pipeline_schedule {parallel.pipeline_schedule}"
    return [UserError(what, "use 1F1B, GPipe, Interleaved1F1B or LoopedBFS, or leave train.compile out")]


def compile_machine_problems(kind: str) -> list[UserError]:
    """What this machine lacks for compilation on a device of this kind."""
    if kind == "npu":
        return [UserError("train.compile has not been tried on npu", "leave it out")]
    lacking = {
        "a C++ compiler (install g++, or name it in CXX)" if kind == "cpu" else "a C compiler (install gcc)":
            compiler(kind),
        f"Python's headers (install python{version_info.major}.{version_info.minor}-dev)":
            (Path(sysconfig.get_path("include")) / "Python.h").exists(),
        "Triton (pip install triton)": kind == "cpu" or importlib.util.find_spec("triton"),
    }  # fmt: skip
    needed = [what for what, there in lacking.items() if not there]
    fix = "mend that, or leave train.compile out"
    return [UserError(f"train.compile needs {', '.join(needed)}", fix)] if needed else []


def compiler(kind: str) -> str:
    """The program that torch.compile builds kernels with on this kind of device; empty where there is none.

    On the CPU that is CXX, else g++; on CUDA, Triton builds its launchers with CC, gcc or clang. Nothing here may touch
    the device: processes are forked later.
    """
    names = (os.environ.get("CXX", "g++"),) if kind == "cpu" else (os.environ.get("CC", ""), "gcc", "clang")
    return next((found for name in names if name and (found := shutil.which(name))), "")
