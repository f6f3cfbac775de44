from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import arriero
from arriero.cli import doctor
from arriero.cli.doctor import DoctorArgs, examine, run

pytestmark = pytest.mark.slow

SOURCES = str(Path(arriero.__file__).parents[1])


def findings() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in examine()}


def test_this_machine_can_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(DoctorArgs(json=True)) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] is True
    found = {finding["name"]: finding for finding in result["findings"]}
    assert found["torch"]["status"] == found["two processes"]["status"] == "ok"
    assert "gloo" in found["back ends"]["found"]
    assert {"Python", "CPU", "memory", "disk", "accelerator"} <= set(found)


def test_what_a_person_reads_fits_60_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(doctor, "_two_processes", lambda back_end: "address family not supported")
    assert run(DoctorArgs()) == 1
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= 60
    assert "FAIL" in out
    assert "GLOO_SOCKET_IFNAME" in out
    assert out.rstrip().endswith("fix what says FAIL")


def test_packages_missing_old_and_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = [
        "numpy>=99", "nosuchpackage>=1.5", "torch>=2.11", 'nosuchextra; extra == "fast"', 'ruff; extra == "dev"',
        'torch-nosuchnpu; extra == "npu"',
    ]  # fmt: skip
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: declared)
    monkeypatch.setattr(doctor, "_two_processes", lambda back_end: "")
    found = findings()
    assert found["numpy"].status == "FAIL"
    assert "older than 99" in found["numpy"].found
    assert found["numpy"].fix == "pip install 'numpy>=99'"
    assert (found["nosuchpackage"].status, found["nosuchpackage"].fix) == ("FAIL", "pip install 'nosuchpackage>=1.5'")
    assert (found["nosuchextra"].status, found["nosuchextra"].fix) == ("absent", "pip install 'arriero[fast]'")
    assert "tokenises" in found["nosuchextra"].found
    assert (found["torch-nosuchnpu"].status, found["torch-nosuchnpu"].fix) == ("absent", "")
    assert "ruff" not in found


def test_an_old_torch_and_an_uninstalled_arriero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=99.1"])
    assert findings()["torch"].fix == "pip install 'torch>=99.1'"

    def absent(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    monkeypatch.setattr(doctor, "_two_processes", lambda back_end: "")
    assert findings()["arriero"].fix == "pip install -e ."


def test_a_driver_without_a_device_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_DRIVERS", {str(tmp_path): "install the other build"})
    monkeypatch.setattr(doctor, "device_type", lambda: "cpu")
    monkeypatch.setattr(doctor, "_two_processes", lambda back_end: "")
    assert (findings()["accelerator"].status, findings()["accelerator"].fix) == ("warn", "install the other build")
    assert run(DoctorArgs()) == 0


def test_an_accelerator_is_named_with_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "device_type", lambda: "cuda")
    monkeypatch.setattr(doctor, "device_count", lambda kind: 8)
    monkeypatch.setattr(doctor, "device_name", lambda kind: "NVIDIA H100 80GB HBM3")
    (finding,) = doctor._devices()
    assert finding.found == "8 x NVIDIA H100 80GB HBM3 (cuda), bf16 peak 989 TFLOP/s"
    monkeypatch.setattr(doctor, "device_name", lambda kind: "some card")
    (finding,) = doctor._devices()
    assert "peak unknown" in finding.found


def test_two_processes_report_why_they_failed() -> None:
    assert "nosuchbackend" in doctor._two_processes("nosuchbackend").lower()


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        ('ImportError("libascendcl.so: cannot open shared object file")', "TORCH_DEVICE_BACKEND_AUTOLOAD=0"),
        ('RuntimeError("Two accelerators cannot be used at the same time in PyTorch: npu and cuda.")', "CPU build"),
    ],
)
def test_a_torch_npu_that_cannot_load_is_explained(tmp_path: Path, error: str, fix: str) -> None:
    """A package under torch's entry point, broken as torch_npu is without its libraries: torch itself trips over it."""
    (tmp_path / "broken_npu.py").write_text(f"raise {error}\n")
    metadata = tmp_path / "broken_npu-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-npu\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\nbroken_npu = broken_npu:_autoload\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{SOURCES}"}
    environment.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    code = "import sys; from arriero.cli.doctor import *; sys.exit(run(DoctorArgs(json=True)))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    found = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert found["torch"]["status"] == "FAIL"
    assert fix in found["torch"]["fix"]
    assert "back ends" not in found
    assert "numpy" in found or "arriero" in found
