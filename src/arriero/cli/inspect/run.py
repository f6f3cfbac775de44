"""What a run directory or one of its checkpoints holds, for `arriero inspect`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Any

from arriero.checkpoint.directory import is_checkpoint_file, read_json
from arriero.checkpoint.find import committed
from arriero.checkpoint.verify import verify_checkpoint
from arriero.common.checkpoint_names import MARKER, STATE, step_of
from arriero.common.errors import EXIT_CHECK_FAILED, EXIT_OK, UserError
from arriero.common.text import escape, escape_message
from arriero.model.config import LlamaConfig, count_parameters
from arriero.observe.events import goodput_line
from arriero.observe.metrics import iterate_metrics


def recognises(path: Path) -> bool:
    """Whether `path` is a run directory or a checkpoint of one."""
    return path.is_dir() and ((path / STATE).is_file() or (path / "recipe.toml").is_file())


def inspect(path: Path, *, json: bool, verify: bool) -> int:
    """Prints what it is; returns 1 if something in it is damaged or incomplete."""
    facts, wrong = _checkpoint(path, verify) if (path / STATE).is_file() else _run(path, verify)
    if json:
        print(json_module.dumps(facts | {"wrong": wrong}, indent=1))
    else:
        for key, value in facts.items():
            print(f"{key:14}{value:,}" if isinstance(value, int) else f"{key:14}{escape(value, max_length=2000)}")
        for line in wrong:
            print(escape_message(f"WRONG         {line}"))
    return EXIT_CHECK_FAILED if wrong else EXIT_OK


def _run(path: Path, verify: bool) -> tuple[dict[str, Any], list[str]]:
    root = path / "checkpoints"
    checkpoints = committed(root)
    cut_off = [p for p in sorted(root.glob("step-*")) if step_of(p) >= 0 and not (p / MARKER).is_file()]
    facts: dict[str, Any] = {"kind": "run", "path": str(path)}
    wrong: list[str] = []
    if (path / "metrics.jsonl").is_file():
        last: dict[str, Any] = {}
        try:
            for record in iterate_metrics(path / "metrics.jsonl", skipped=wrong):
                last = record if record.get("kind") == "step" else last
        except UserError as error:
            last = {}
            wrong.append(error.problem)
        if last:
            facts |= {"steps": last["iteration"], "of": last.get("iterations")}
            facts |= {"lm loss": str(last.get("lm_loss"))[:7], "tokens": last.get("consumed_tokens")}
    if line := goodput_line(path):
        facts["time"] = line
    facts["checkpoints"] = ", ".join(p.name for p in checkpoints) or "none"
    wrong += [f"{p}: not committed, its writing was cut off" for p in cut_off]
    for checkpoint in checkpoints if verify else []:
        wrong += verify_checkpoint(checkpoint)
    if verify:
        facts["verified"] = f"SHA-256 of {len(checkpoints)} checkpoints"
    return facts, wrong


def _checkpoint(path: Path, verify: bool) -> tuple[dict[str, Any], list[str]]:
    config, parts = LlamaConfig.from_json(path), sorted(path.glob("rank-*.safetensors"))
    facts: dict[str, Any] = {
        "kind": "checkpoint",
        "path": str(path),
        "step": read_json(path / STATE, {"step": int})["step"],
        "parameters": count_parameters(config),
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "vocabulary": config.vocab_size,
        "written by": f"{len(parts)} processes",
        "bytes": sum(p.stat().st_size for p in parts),
        "committed": "yes" if (path / MARKER).is_file() else "no",
    }
    if others := sorted(p.name for p in path.iterdir() if not is_checkpoint_file(p.name)):
        facts["other files"] = ", ".join(others)
    if verify:
        facts["verified"] = "SHA-256 of every file"
    wrong = verify_checkpoint(path) if verify else []
    if not verify and not (path / MARKER).is_file():
        wrong = [f"{path}: not committed, its writing was cut off"]
    return facts, wrong
