"""docs/from-ascendspeed.md names every flag of the scripts that it replaces, and only keys and options that exist."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

from arriero.cli.main import VERBS, dispatch
from arriero.common.settings import Setting, command_line_settings, field_types, parse
from arriero.common.toml import file_settings
from arriero.data.formats import FORMATS, TEMPLATES
from arriero.train.recipe import Recipe, find_bundled

PAGE = (Path(__file__).parents[1] / "docs" / "from-ascendspeed.md").read_text(encoding="utf-8")
SPANS = re.findall(r"`([^`]+)`", PAGE)
COMMANDS = [span for span in SPANS if re.match(r"arriero [a-z]", span)]
TABLES = {key.split(".")[0] for key in field_types(Recipe) if "." in key}

# What examples/llama, tools/preprocess_data.py and the two converters took.
TRAINING = """
DDP-impl tensor-model-parallel-size pipeline-model-parallel-size num-layers hidden-size ffn-hidden-size
num-attention-heads micro-batch-size global-batch-size seq-length max-position-embeddings train-iters lr-decay-iters
save load data-path tokenizer-name-or-path tokenizer-not-use-fast data-impl split distributed-backend lr lr-decay-style
min-lr weight-decay clip-grad lr-warmup-fraction checkpoint-activations log-interval save-interval eval-interval
eval-iters fp16 bf16 deepspeed no-pipeline-parallel deepspeed_config zero-stage deepspeed-activation-checkpointing
checkpoint-policy checkpoint_block_layer triangle-attn initial-loss-scale sequence-parallel mlp-layer-fusion
use-distributed-optimizer position-embedding-type normalization
"""
PREPROCESSING = """
input handler-name streaming hf-datasets-params datasets json-keys split-sentences keep-newlines tokenizer-type
tokenizer-name-or-path tokenizer-not-use-fast vocab-file merge-file append-eod seq-length make-vocab-size-divisible-by
pad-vocab-size-to output-prefix dataset-impl workers log-interval
"""
CONVERSION = """
input-model-dir output-model-dir tensor-model-parallel-size pipeline-model-parallel-size type orig-vocab-size
make-vocab-size-divisible-by added-token-num bias pse deepspeed
"""
VARIABLES = (
    "MASTER_ADDR MASTER_PORT NNODES NODE_RANK LD_LIBRARY_PATH HCCL_CONNECT_TIMEOUT COMBINED_ENABLE INF_NAN_MODE_ENABLE"
)


def section(title: str) -> str:
    start = PAGE.index(f"## {title}")
    return PAGE[start : PAGE.find("\n## ", start + 1)]


@pytest.mark.parametrize(
    ("title", "flags"),
    [("Flags of `pretrain_llama.py`", TRAINING), ("`preprocess_data.py`", PREPROCESSING),
     ("Weight conversion", CONVERSION)],
)  # fmt: skip
def test_every_flag_has_its_line(title: str, flags: str) -> None:
    first = "\n".join(line.split("|")[1] for line in section(title).splitlines() if line.startswith("| "))
    missing = [flag for flag in flags.split() if not re.search(rf"`--{re.escape(flag)}[` ]", first)]
    assert missing == []


def test_every_variable_has_its_line() -> None:
    assert [name for name in VARIABLES.split() if f"`{name}`" not in section("Environment of the scripts")] == []


def test_every_key_exists() -> None:
    keys = [match[1] for span in SPANS if (match := re.match(r"([a-z]+\.[a-z_]+)$", span))]
    keys = [key for key in keys if key.split(".")[0] in TABLES and not key.endswith(".txt")]
    assert len(keys) > 30
    assert [key for key in keys if key not in field_types(Recipe)] == []


@pytest.mark.parametrize("verb", sorted({command.split()[1] for command in COMMANDS}))
def test_every_option_exists(verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert verb in VERBS
    monkeypatch.setenv("COLUMNS", "200")
    with contextlib.suppress(SystemExit):
        dispatch([verb, *(["slurm"] if verb == "launch" else []), "--help"])
    known = set(re.findall(r"--[a-z][a-z.-]*", capsys.readouterr().out))
    used = {flag for c in COMMANDS if c.split()[1] == verb for flag in re.findall(r"--[a-z][a-z.-]*", c)}
    assert used <= known, f"arriero {verb} has no {used - known}"


def test_every_format_and_template_exists() -> None:
    for option, known in (("format", FORMATS), ("template", {*TEMPLATES, "FILE"})):
        assert {match[1] for c in COMMANDS if (match := re.search(rf"--{option} (\S+)", c))} <= set(known)


def test_every_recipe_exists_and_its_changes_parse() -> None:
    lines = [command.split()[2:] for command in COMMANDS if command.startswith("arriero pretrain llama")]
    assert len(lines) == 5
    for name, *words in lines:
        settings = file_settings(find_bundled("", name, ".toml"))
        changes = [s for s in command_line_settings(words) if s.key in field_types(Recipe)]
        assert parse(Recipe, [*settings, *changes, Setting("init", [""], "")], prog="arriero pretrain").model_config()


def test_the_keys_values_are_accepted() -> None:
    pairs = re.findall(r"`([a-z]+\.[a-z_]+)` = `?([\w-]+)`?", PAGE)
    assert len(pairs) >= 5
    for key, value in pairs:
        parse(Recipe, [Setting(key, [value], "page")], prog="arriero pretrain")
