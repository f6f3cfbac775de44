"""All that depends on the kind of device: cpu with gloo, cuda with nccl, npu with hccl.

Devices are reached through `torch.accelerator`; torch imports a vendor's package itself (autoload entry point). torch
is imported inside the functions, so that importing this module is cheap.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, Annotated, Any

from arriero.common.registry import Registry

if TYPE_CHECKING:
    import torch

DEVICES: Registry[str] = Registry("device", {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}, words=("auto",))
"""The back end of each kind of device for collectives, by the name that torch.accelerator gives to the kind."""
DeviceChoice = Annotated[str, DEVICES]
_process_contexts = contextlib.ExitStack()
"""Context managers that stay entered as long as the process."""


def device_type(wanted: str = "auto") -> str:
    """The device type to train on: `wanted`, or for auto the available accelerator, else cpu.

    `check_available` matters: with torch_npu installed and no device, torch still names npu as current.

    Raises:
        UserError: the wanted device is not available.
    """
    import torch

    from arriero.common.errors import UserError

    # Asks NVML instead of CUDA: a process in which CUDA is initialized cannot be forked.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    found = torch.accelerator.current_accelerator(check_available=True)
    if wanted == "auto":
        return found.type if found else "cpu"
    if wanted != "cpu" and (found is None or found.type != wanted):
        have = found.type if found else "no accelerator"
        raise UserError(f"device {wanted!r} is not available: torch {torch.__version__} sees {have}", "arriero doctor")
    return wanted


def device_count(kind: str) -> int:
    """Devices of this kind on this machine; 1 for cpu."""
    import torch

    return 1 if kind == "cpu" else torch.accelerator.device_count()


def device_name(kind: str) -> str:
    """The name under which observe/throughput.py lists its peak, such as `NVIDIA H100 80GB HBM3`; `cpu` for the CPU."""
    import torch

    return "cpu" if kind == "cpu" else str(torch.get_device_module(kind).get_device_name())


def select_device(kind: str, local_rank: int) -> torch.device:
    """Selects device number `local_rank` for this process and returns it."""
    import torch

    if kind == "cpu":
        return torch.device("cpu")
    torch.accelerator.set_device_index(local_rank)
    if kind == "cuda":
        prefer_cudnn_attention()
    return torch.device(kind, local_rank)


@functools.cache
def prefer_cudnn_attention() -> None:
    """From Hopper on, prefers cuDNN's attention to the flash kernel: it takes 0.6 of its time on an H100.

    Set for the whole process, not around each call, because torch.compile reads the setting when it traces.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if torch.cuda.get_device_capability()[0] >= 9:
        order = [
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        ]
        _process_contexts.enter_context(sdpa_kernel(order, set_priority=True))


def process_group_backend(kind: str) -> str:
    """The backend string for `init_process_group`: CPU tensors always go through gloo beside the device's own."""
    return "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{DEVICES.get(kind)}"


def fused_operators(kind: str) -> Any:
    """The vendor's package whose fused operators model/npu.py calls: torch_npu on npu, None elsewhere or without it."""
    return _torch_npu() if kind == "npu" else None  # not cached itself: torch.compile warns of cached functions


@functools.cache
def _torch_npu() -> Any:
    return importlib.import_module("torch_npu") if importlib.util.find_spec("torch_npu") else None


def reduces_on_host(kind: str, dtype: torch.dtype) -> bool:
    """Whether a collective sum of this dtype must be done on the CPU: HCCL's all-reduce has no float64."""
    import torch

    return kind == "npu" and dtype == torch.float64


def synchronize(kind: str) -> None:
    """Waits until the device has completed all queued work."""
    import torch

    if kind != "cpu":
        torch.accelerator.synchronize()


def empty_host_tensor(like: torch.Tensor) -> torch.Tensor:
    """An uninitialized host tensor for a copy of `like`; pinned on CUDA, so that the copy overlaps computation."""
    import torch

    return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")


def expands_kv_heads_under_mask(kind: str) -> bool:
    """Whether keys and values are repeated for every query head where attention has a mask.

    On CUDA only the flash kernel supports grouped heads, and it takes no mask; torch would materialize all scores.
    """
    return kind == "cuda"


def logits_chunk_size(kind: str) -> int:
    """Logits computed by one matmul of the output head, and of its gradient: large enough to fill the device."""
    return 2**27 if kind == "cpu" else 2**28


def softmax_chunk_size(kind: str) -> int:
    """Logits of one softmax: on a CPU as many as its caches hold in float32, elsewhere all of a matmul's."""
    return 2**20 if kind == "cpu" else 2**28


def fused_adamw_takes_grad_scale(kind: str) -> bool:
    """Whether torch's fused AdamW takes `grad_scale` and divides float32 gradients itself, which saves a pass."""
    return kind in ("cpu", "cuda")


@functools.cache
def prefers_onednn() -> bool:
    """Whether this CPU multiplies float32 faster in oneDNN than in MKL, which serves AMD at down to half its speed."""
    import torch

    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return there and _proc("cpuinfo", "vendor_id") == "AuthenticAMD"


def matmul_dtypes(kind: str) -> tuple[str, ...]:
    """The dtypes whose matmul is worth measuring: float16 on a CPU runs a hundred times slower than bfloat16."""
    return {"cpu": ("bfloat16", "float32"), "cuda": ("bfloat16", "float16", "tf32", "float32")}.get(
        kind, ("bfloat16", "float16", "float32")
    )


def supports_float8_casts(kind: str) -> bool:
    """Whether torch casts to 8-bit floats on this device; untested on an NPU, so taken as no."""
    return kind in ("cpu", "cuda")


def has_float8_units(kind: str) -> bool:
    """Whether this process's device has 8-bit float matmuls: NVIDIA's from compute capability 8.9 (Ada)."""
    import torch

    return kind == "cuda" and torch.cuda.get_device_capability() >= (8, 9)


def device_description(kind: str) -> str:
    """The device's name for tables; for a CPU with the number of this process's threads."""
    import torch

    if kind != "cpu":
        return device_name(kind)
    threads = torch.get_num_threads()
    return f"{_proc('cpuinfo', 'model name') or 'CPU'}, {threads} thread{'s' * (threads > 1)}"


def peak_memory(kind: str) -> float:
    """Peak bytes of this process: the device's allocations, or on the CPU the resident set."""
    import torch

    return _kilobytes("VmHWM") if kind == "cpu" else float(torch.get_device_module(kind).max_memory_allocated())


def resident_memory() -> float:
    """Bytes of this process's resident set now."""
    return _kilobytes("VmRSS")


def available_memory() -> float:
    """The kernel's estimate of the bytes that processes can still allocate (MemAvailable); 0 if unknown."""
    return float(_proc("meminfo", "MemAvailable").removesuffix("kB") or 0) * 1024


def machine_memory() -> float:
    """Bytes of memory and swap that this process's machine or container has; 0 if unknown."""
    total = sum(float(_proc("meminfo", key).removesuffix("kB") or 0) * 1024 for key in ("MemTotal", "SwapTotal"))
    limits = [total] if total else []
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container: control groups, version 2 and 1
        with contextlib.suppress(OSError, ValueError), open(f"/sys/fs/cgroup/{file}", encoding="utf-8") as text:
            limits.append(float(text.read()))  # "max": no limit
    return min(limits, default=0.0)


def _kilobytes(key: str) -> float:
    return float(_proc("self/status", key).removesuffix("kB") or 0) * 1024


def _proc(file: str, key: str) -> str:
    """The value after `key:` in a file of Linux's /proc; empty elsewhere."""
    try:
        with open(f"/proc/{file}", encoding="utf-8") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
    except OSError:
        return ""


def tune_allocator() -> None:
    """Stops glibc from returning memory to the kernel at every step, which takes a quarter of a CPU step's time.

    By `mallopt`, as MALLOC_MMAP_MAX_, MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_ would; without glibc it does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 256 * 2**20)


def trim_memory() -> None:
    """Returns freed memory to the kernel, after something large was freed; without glibc it does nothing."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
