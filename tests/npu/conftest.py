"""These tests need torch_npu and a stub of CANN: `make npu` makes both, in an environment of its own."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch_npu") else ["test_*.py"]
