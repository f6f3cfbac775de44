"""The state of a run read from its files: the last step, and the final state and losses to the last bit."""

from __future__ import annotations

import json
from pathlib import Path

from arriero.common.errors import CheckFailed

STEPS, CHECKPOINT_EVERY = 40, 3
"""Steps of a run, and steps between its checkpoints."""
MIDDLE_STEP = CHECKPOINT_EVERY * (STEPS // CHECKPOINT_EVERY // 2)
"""The checkpoint that is kept for other layouts."""


Outcome = tuple[str, list[tuple[int, str]]]
"""SHA-256 of the final state, and the loss of every step to the last bit."""


def log_size(out: Path) -> int:
    """Bytes that all starts of a run have printed."""
    path = out.with_suffix(".log")
    return path.stat().st_size if path.exists() else 0


def log_tail(out: Path, since: int = -1) -> str:
    """The log of a run from byte `since` on, or its last 2000 bytes."""
    data = out.with_suffix(".log").read_bytes()
    return data[since if since >= 0 else -2000 :].decode(errors="replace")


def last_step(out: Path) -> int:
    """The last step in metrics.jsonl."""
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["iteration"])
        except ValueError:  # cut off by a kill
            continue
    return 0


def run_outcome(out: Path) -> Outcome:
    """SHA-256 of the final state, and the loss of every step to the last bit."""
    from arriero.checkpoint.digest import state_sha256
    from arriero.checkpoint.directory import step_directory
    from arriero.checkpoint.verify import verify_checkpoint
    from arriero.observe.metrics import read_metrics

    final = step_directory(out / "checkpoints", STEPS)
    if wrong := verify_checkpoint(final):
        raise CheckFailed("\n".join(wrong))
    losses = [(m["iteration"], repr(m["lm_loss"])) for m in read_metrics(out / "metrics.jsonl") if m["kind"] == "step"]
    return state_sha256(final), losses


def largest_difference(a: Path, b: Path) -> float:
    """Between two states, relative to each tensor's norm."""
    from arriero.checkpoint.load import CheckpointReader

    one, other = CheckpointReader(a), CheckpointReader(b)
    return max(
        ((x - y).norm() / y.norm().clamp_min(1e-300)).item()
        for x, y in ((one.read(key), other.read(key)) for key in other.keys())  # noqa: SIM118
    )
