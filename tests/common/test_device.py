"""What device.py decides for devices that this machine may not have, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from arriero.common import device

pytestmark = pytest.mark.slow


def test_looking_for_the_device_leaves_the_process_free_to_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch asks NVIDIA's management library under this variable, and CUDA, which does not survive a fork, without."""
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "")
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK")
    device.device_type()
    assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"


@pytest.mark.parametrize(("capability", "first"), [((9, 0), "CUDNN_ATTENTION"), ((8, 0), "FLASH_ATTENTION")])
def test_cudnns_attention_comes_first_from_hopper_on(capability: tuple[int, int], first: str) -> None:
    script = (
        "import torch; from torch.nn.attention import SDPBackend; from arriero.common import device\n"
        f"torch.cuda.get_device_capability = lambda: {capability}\n"
        "device.prefer_cudnn_attention()\n"
        "print(SDPBackend(torch._C._get_sdp_priority_order()[0]).name)"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == first
