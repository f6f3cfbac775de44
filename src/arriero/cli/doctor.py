"""`arriero doctor`: what this machine has, what is missing, and the line that fixes it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from arriero.common.device import DEVICES, device_count, device_name, device_type
from arriero.common.errors import EXIT_CHECK_FAILED, EXIT_OK

# What each extra of pyproject.toml is for; the packages and their versions are read from the installation itself.
_EXTRAS = {
    "fast": "tokenises several times faster",
    "float8": "8-bit float matmuls, faster on NVIDIA GPUs from compute capability 8.9",
    "npu": "Ascend NPUs only; its version must be torch's",
}
_NPU_DRIVER = "/dev/davinci0"
# A driver's device file with no device in torch means that torch was built for something else.
_DRIVERS = {
    "/dev/nvidia0": "install torch's CUDA build: https://pytorch.org/get-started/locally/",
    _NPU_DRIVER: "source CANN's set_env.sh, then: pip install torch-npu==VERSION, that of torch",
}
_TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
dist.init_process_group(sys.argv[3], init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
x = torch.ones(3) * (1 + dist.get_rank()); dist.all_reduce(x); assert x.tolist() == [3.0] * 3
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class DoctorArgs:
    """Check this machine: exit code 0 if training can work on it, 1 if not."""

    json: bool = False
    """Print the findings as JSON."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    status: str
    """ok; absent (optional, and not there); warn (training works, but not on all there is); FAIL (it cannot work)."""
    found: str
    """What was found, as text."""
    fix: str = ""
    """The command or sentence that fixes it."""


def run(args: DoctorArgs) -> int:
    """Examines the machine, prints the findings and returns the exit code."""
    findings = list(examine())
    passed = all(f.status != "FAIL" for f in findings)
    if args.json:
        print(json.dumps({"passed": passed, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        _print(findings, passed)
    return EXIT_OK if passed else EXIT_CHECK_FAILED


def examine() -> Iterator[Finding]:
    """Every finding, the machine first; without torch, devices and back ends are left out."""
    yield from _machine()
    packages = list(_packages())
    torch_finding = _torch()
    yield torch_finding
    if torch_finding.status == "ok":
        yield from _devices()
        yield from _back_ends()
        yield _compiler()
    yield from packages


def _machine() -> Iterator[Finding]:
    version = platform.python_version()
    new = sys.version_info >= (3, 11)
    yield Finding("Python", "ok" if new else "FAIL", f"{version}, {sys.executable}", "" if new else "use 3.11 or newer")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("CPU", "ok", f"{cores} cores for this process, {platform.machine()}")
    total, free = _memory()
    yield Finding("memory", "ok", f"{total:.1f} GiB, {free:.1f} GiB of it free")
    yield Finding("disk", "ok", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free in this directory")


def _memory() -> tuple[float, float]:
    """Total and available memory in GiB; the total is a container's limit, where it has one."""
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    total = free = page * pages
    try:
        text = Path("/proc/meminfo").read_text()
        free = int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) * 1024  # type: ignore[index]
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit.isdigit() and int(limit) < total:
            total = int(limit)
            free = min(free, total - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, TypeError):
        pass  # not Linux, or no control group: keep sysconf's numbers
    return total / 2**30, free / 2**30


def _torch() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("torch", "FAIL", f"cannot be imported: {error}", "pip install 'torch>=2.11'")
    except RuntimeError as error:  # importing torch imports torch_npu too, where that is installed
        return _broken_autoload(error)
    floor = next((floor for name, floor, _ in _declared() if name == "torch"), "")
    new = _version_tuple(torch.__version__) >= _version_tuple(floor)
    found = f"{torch.__version__}, {torch.get_num_threads()} threads a process"
    return Finding("torch", "ok" if new else "FAIL", found, "" if new else f"pip install 'torch{floor}'")


def _broken_autoload(error: RuntimeError) -> Finding:
    cause = str(error.__cause__ or error).strip().splitlines()[0]
    if "Two accelerators" in f"{error} {error.__cause__}":
        fix = "torch-npu needs torch's CPU build: install that one, or pip uninstall torch-npu"
    else:
        fix = (
            "for the NPU: source /usr/local/Ascend/ascend-toolkit/set_env.sh (CANN); "
            "without one: export TORCH_DEVICE_BACKEND_AUTOLOAD=0, or pip uninstall torch-npu"
        )
    return Finding("torch", "FAIL", f"its back end fails to load at import ({cause})", fix)


def _devices() -> Iterator[Finding]:
    from arriero.observe.throughput import peak_flops

    kind = device_type()
    if kind != "cpu":
        peak = peak_flops(device_name(kind), "bfloat16")
        speed = f"bf16 peak {peak / 1e12:.0f} TFLOP/s" if peak else "peak unknown, so no MFU"
        yield Finding("accelerator", "ok", f"{device_count(kind)} x {device_name(kind)} ({kind}), {speed}")
        return
    driver = next((path for path in _DRIVERS if os.path.exists(path)), None)
    if driver:
        yield Finding("accelerator", "warn", f"{driver} is there, but torch sees no device", _DRIVERS[driver])
    else:
        yield Finding("accelerator", "absent", "none: training runs on the CPU")


def _compiler() -> Finding:
    from arriero.train.preflight import compile_machine_problems, compiler

    kind = device_type()
    problems = compile_machine_problems(kind)
    if problems:
        return Finding("compiler", "absent", f"{problems[0].problem}", problems[0].fix)
    return Finding("compiler", "ok", f"{compiler(kind)}, for train.compile")


def _back_ends() -> Iterator[Finding]:
    import torch.distributed as dist

    there = [name for _, name in DEVICES.items() if dist.is_available() and dist.is_backend_available(name)]
    base, wanted = DEVICES.get("cpu"), DEVICES.get(device_type())
    missing = [name for name in dict.fromkeys((base, wanted)) if name not in there]
    if missing:
        fix = "install a torch that has torch.distributed with it"
        yield Finding("back ends", "FAIL", f"{', '.join(missing)} missing", fix)
        return
    yield Finding("back ends", "ok", ", ".join(there))
    reason = _two_processes(base)
    fix = "export GLOO_SOCKET_IFNAME=lo (one machine), or the name of the network interface between the machines"
    found = f"failed: {reason}" if reason else f"a sum over {base} is right"
    yield Finding("two processes", "FAIL" if reason else "ok", found, fix if reason else "")


def _two_processes(back_end: str, *, timeout: float = 60) -> str:
    """All-reduces a tensor over two processes; returns why that failed, or ""."""
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", _TWO_PROCESSES, str(rank), os.path.join(directory, "store"), back_end],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for rank in range(2)
        ]
        try:
            for process in processes:
                _, errors = process.communicate(timeout=timeout)
                if process.returncode:
                    return (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            return f"no answer within {timeout:.0f} s"
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return ""


def _packages() -> Iterator[Finding]:
    """Every dependency that the installed arriero declares, the optional ones with their purpose."""
    declared = _declared()
    if not declared:
        yield Finding("arriero", "absent", "runs from its sources, not installed", "pip install -e .")
    for name, floor, extra in declared:
        if name == "torch" or (extra and extra not in _EXTRAS):
            continue  # torch has a finding of its own; [dev] is for those who change arriero
        purpose = f" ({_EXTRAS[extra]})" if extra else ""
        fix = f"pip install 'arriero[{extra}]'" if extra else f"pip install '{name}{floor}'"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if extra == "npu" and not os.path.exists(_NPU_DRIVER):
                fix = ""  # without an NPU's software, importing torch would fail
            yield Finding(name, "absent" if extra else "FAIL", f"not installed{purpose}", fix)
            continue
        new = _version_tuple(version) >= _version_tuple(floor)
        found = f"{version}{purpose}" if new else f"{version}, older than {floor.lstrip('>=')}{purpose}"
        yield Finding(name, "ok" if new else "FAIL", found, "" if new else fix)


def _declared() -> list[tuple[str, str, str]]:
    """(package, version floor, extra) of each dependency; empty where arriero is not installed."""
    try:
        return [_requirement(line) for line in importlib.metadata.requires("arriero") or []]
    except importlib.metadata.PackageNotFoundError:
        return []


def _requirement(line: str) -> tuple[str, str, str]:
    """`tokenizers>=0.21; extra == "hf"` -> (tokenizers, >=0.21, hf)."""
    requirement, _, marker = line.partition(";")
    found = re.match(r"([\w.-]+)\s*(.*)", requirement.strip())
    extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
    return (found[1], found[2].strip(" ()"), extra[1] if extra else "") if found else (line, "", "")


def _version_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3])


def _print(findings: list[Finding], passed: bool) -> None:
    console = Console(highlight=False, markup=False)
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        style = {"warn": "yellow", "FAIL": "bold red", "absent": "dim"}.get(finding.status)
        table.add_row(finding.status, finding.name, finding.found, style=style)
        if finding.fix:
            table.add_row("", "", f"{'to add it' if finding.status == 'absent' else 'fix'}: {finding.fix}")
    console.print(table)
    verdict = "training can work here" if passed else "training cannot work here as it should: fix what says FAIL"
    console.print(f"\n{verdict}", style="bold green" if passed else "bold red")
