"""The one place that knows devices: cpu with gloo, cuda with nccl, npu with hccl.

Everything goes through `torch.accelerator`; a vendor's package is imported by torch itself (its autoload entry point).
torch is imported inside the functions, so that the command line can read this module's names at no cost.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
_KEPT = contextlib.ExitStack()
"""Settings that hold as long as the process."""
DEVICE_CHOICES = ("auto", *BACKENDS)


def device_type(wanted: str = "auto") -> str:
    """The device type to train on: `wanted`, or the accelerator that is there, or cpu.

    `check_available` matters: with torch_npu installed and no device, torch still names npu as current.

    Raises:
        UserError: the wanted device is not there.
    """
    import torch

    from arriero.common.errors import UserError

    # By the driver's management library, which leaves this process free to fork: CUDA itself does not survive that.
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
    """The name that the peak table knows, such as `NVIDIA H100 80GB HBM3`; `cpu` for the CPU."""
    import torch

    return "cpu" if kind == "cpu" else str(torch.get_device_module(kind).get_device_name())


def take_device(kind: str, local_rank: int) -> torch.device:
    """Makes device number `local_rank` this process's own and returns it."""
    import torch

    if kind == "cpu":
        return torch.device("cpu")
    torch.accelerator.set_device_index(local_rank)
    if kind == "cuda":
        prefer_cudnn_attention()
    return torch.device(kind, local_rank)


@functools.cache
def prefer_cudnn_attention() -> None:
    """From Hopper on, has cuDNN's attention tried before the flash kernel: it takes 0.6 of its time on an H100.

    For good, and not around each call: torch.compile looks at it when it traces.
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
        _KEPT.enter_context(sdpa_kernel(order, set_priority=True))


def process_group_backend(kind: str) -> str:
    """The backend string for `init_process_group`: CPU tensors always go through gloo beside the device's own."""
    return "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{BACKENDS[kind]}"


def fused_operators(kind: str) -> Any:
    """The vendor's package whose fused operators model/npu.py calls: torch_npu on npu, None elsewhere or without it."""
    return _torch_npu() if kind == "npu" else None  # apart from the cached function, which torch.compile warns of


@functools.cache
def _torch_npu() -> Any:
    return importlib.import_module("torch_npu") if importlib.util.find_spec("torch_npu") else None


def sums_on_host(kind: str, dtype: torch.dtype) -> bool:
    """Whether a collective sum of this dtype must be done on the CPU: HCCL's all-reduce knows no float64."""
    import torch

    return kind == "npu" and dtype == torch.float64


def synchronize(kind: str) -> None:
    """Waits until the device has done all that it was given."""
    import torch

    if kind != "cpu":
        torch.accelerator.synchronize()


def host_room(like: torch.Tensor) -> torch.Tensor:
    """Memory on the host for a copy of a tensor, page-locked where that lets the copy run beside the computation."""
    import torch

    return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")


def masked_heads_are_spread(kind: str) -> bool:
    """Whether attention under a mask should be given keys and values for every query head.

    On CUDA the flash kernel alone shares heads, and it takes no mask; torch would then hold all scores in memory.
    """
    return kind == "cuda"


def logits_at_once(kind: str) -> int:
    """Logits of one matmul of the output head, and of its gradient's: large enough to keep the device busy."""
    return 2**27 if kind == "cpu" else 2**28


def softmax_at_once(kind: str) -> int:
    """Logits whose softmax is taken in one go: on a CPU what its caches hold in float32, elsewhere all of them."""
    return 2**20 if kind == "cpu" else 2**28


def fused_update_divides(kind: str) -> bool:
    """Whether torch's fused AdamW divides float32 gradients itself, by its `grad_scale`: it saves a pass over them."""
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


def float8_casts(kind: str) -> bool:
    """Whether torch casts to 8-bit floats on this device: an NPU's was never seen to."""
    return kind != "npu"


def float8_units(kind: str) -> bool:
    """Whether this process's device multiplies 8-bit floats itself: NVIDIA's from compute capability 8.9 (Ada)."""
    import torch

    return kind == "cuda" and torch.cuda.get_device_capability() >= (8, 9)


def describe(kind: str) -> str:
    """The device for a person: its own name, or the CPU's with the threads of this process."""
    import torch

    if kind != "cpu":
        return device_name(kind)
    threads = torch.get_num_threads()
    return f"{_proc('cpuinfo', 'model name') or 'CPU'}, {threads} thread{'s' * (threads > 1)}"


def peak_memory(kind: str) -> float:
    """Bytes that this process held at most: the device's allocations, or on the CPU the resident set."""
    import torch

    return _kilobytes("VmHWM") if kind == "cpu" else float(torch.get_device_module(kind).max_memory_allocated())


def resident_memory() -> float:
    """Bytes of this process's resident set now."""
    return _kilobytes("VmRSS")


def available_memory() -> float:
    """Bytes that the kernel can still give to all processes together, by its own estimate; 0 where it says none."""
    return float(_proc("meminfo", "MemAvailable").removesuffix("kB") or 0) * 1024


def machine_memory() -> float:
    """Bytes of memory and swap that this process's machine or container has; 0 where the kernel says none."""
    total = sum(float(_proc("meminfo", key).removesuffix("kB") or 0) * 1024 for key in ("MemTotal", "SwapTotal"))
    limits = [total] if total else []
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container: control groups, version 2 and 1
        with contextlib.suppress(OSError, ValueError), open(f"/sys/fs/cgroup/{file}", encoding="utf-8") as text:
            limits.append(float(text.read()))  # "max" is no number
    return min(limits, default=0.0)


def _kilobytes(key: str) -> float:
    return float(_proc("self/status", key).removesuffix("kB") or 0) * 1024


def _proc(file: str, key: str) -> str:
    """What stands behind `key:` in a file of Linux's /proc; empty elsewhere."""
    try:
        with open(f"/proc/{file}", encoding="utf-8") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
    except OSError:
        return ""


def tune_allocator() -> None:
    """Keeps glibc from giving memory back to the kernel at every step: a quarter of a CPU step's time.

    The settings are those of MALLOC_MMAP_MAX_, MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_, made by `mallopt` so that no
    environment variable is needed; without glibc it does nothing.
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
    """Gives memory that was freed back to the kernel, where glibc keeps it: after something large has gone."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
