"""Lets tests import the helpers that lie beside this file, and those of the parts that several parts use."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "parallel"), str(HERE / "weights")]
