"""What belongs to a tokenizer and to its model's sampling: read once, written everywhere."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from small_models import TINY, assert_same, random_weights, save_hf, save_run
from test_tokenizer_json import train

from arriero.checkpoint.formats.foreign_config import ConfigHints
from arriero.checkpoint.formats.huggingface import copy_tokenizer
from arriero.checkpoint.open_model import end_ids, open_model
from arriero.cli import convert, export, generate
from arriero.cli.convert import ConvertArgs
from arriero.cli.export import ExportArgs
from arriero.cli.generate import GenerateArgs
from arriero.cli.inspect.weights import inspect
from arriero.common.errors import UserError
from arriero.data.tokenizer import load_tokenizer
from arriero.data.tokenizer_files import (
    CHAT_TEMPLATE_DIRECTORY,
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    copy_tokenizer_files,
)
from arriero.data.tokenizer_json import vocabulary_size
from arriero.model.config import LlamaConfig
from arriero.train.directory import prepare_run_directory
from arriero.train.recipe import Recipe

WIDE = replace(
    TINY, hidden_size=256, num_attention_heads=2, num_key_value_heads=1, head_dim=128, num_hidden_layers=1,
    intermediate_size=8,
)  # fmt: skip
"""A model whose heads are guessed right where nothing tells them."""
GENERATION = {"eos_token_id": [2, 264], "bos_token_id": 1, "temperature": 0.6, "top_p": 0.9, "do_sample": True}


def remove_shape(checkpoint):
    """Removes config.json and the saved arguments, which other programs do not write."""
    (checkpoint / "config.json").unlink()
    for file in checkpoint.rglob("*.pt"):
        payload = torch.load(file, weights_only=False)
        payload.pop("args", None)
        torch.save(payload, file)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A directory with a tokenizer.model of 400 ids or fewer, and nothing else."""
    return train(tmp_path_factory.mktemp("sp"))


@pytest.fixture
def full(tmp_path, pieces):
    """A tokenizer with every file that a tokenizer has, and a model's generation_config.json."""
    home = tmp_path / "full"
    home.mkdir()
    assert copy_tokenizer(pieces, home) == ""
    size = vocabulary_size(home)
    for name in TOKENIZER_FILES:
        if not (home / name).exists():
            (home / name).write_text(json.dumps({}) if name.endswith(".json") else f"{name}\n{{{{ messages }}}}")
    (home / "added_tokens.json").write_text(json.dumps({"[PAD]": size}))
    (home / CHAT_TEMPLATE_DIRECTORY).mkdir()
    (home / CHAT_TEMPLATE_DIRECTORY / "tools.jinja").write_text("{{ tools }}")
    (home / "generation_config.json").write_text(json.dumps(GENERATION))
    return home


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_every_way_carries_every_file(tmp_path, full):
    """Into a run and out of it, from a Hugging Face directory, and through Megatron's files."""
    wanted = {name: (full / name).read_bytes() for name in listing(full)}
    config = replace(TINY, vocab_size=500, eos_token_id=(2, 264), pad_token_id=0)
    save_hf(tmp_path / "hf", config, random_weights(config))
    shutil.copytree(full, tmp_path / "hf", dirs_exist_ok=True)
    save_run(tmp_path / "run", config, random_weights(config))
    load_tokenizer(full).save_to(tmp_path / "run" / "tokenizer")
    assert listing(tmp_path / "run" / "tokenizer") == sorted(wanted)
    export.run(ExportArgs(tmp_path / "run", tmp_path / "of-run"))
    export.run(ExportArgs(tmp_path / "hf", tmp_path / "of-hf"))
    convert.run(ConvertArgs(tmp_path / "hf", tmp_path / "megatron", "megatron", tp=2))
    convert.run(ConvertArgs(tmp_path / "megatron", tmp_path / "back", "hf"))
    for out in ("of-run", "of-hf", "megatron", "back"):
        for name, content in wanted.items():
            assert (tmp_path / out / name).read_bytes() == content, (out, name)
        assert LlamaConfig.from_json(tmp_path / out) == config
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "back")
    assert (theirs.eos_token_id, theirs.temperature) == ([2, 264], 0.6)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "back").pad_token_id == 0


def test_transformers_reads_the_chat_template_of_an_exported_run(tmp_path, pieces):
    home = tmp_path / "tokenizer"
    copy_tokenizer(pieces, home)
    (home / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    config = replace(TINY, vocab_size=500)
    save_run(tmp_path / "run", config, random_weights(config))
    load_tokenizer(home).save_to(tmp_path / "run" / "tokenizer")
    export.run(ExportArgs(tmp_path / "run", tmp_path / "out"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<user>hi"


def test_a_model_without_generation_config_gets_one_of_its_ids(tmp_path):
    config = replace(TINY, eos_token_id=(2, 7), pad_token_id=3)
    save_hf(tmp_path / "hf", config, random_weights(config))
    (tmp_path / "hf" / "generation_config.json").unlink()
    export.run(ExportArgs(tmp_path / "hf", tmp_path / "out"))
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, [2, 7], 3)


@pytest.mark.parametrize(
    ("config_ends", "file", "tokenizer_end", "ends"),
    [
        ([2, 264], None, 2, {2, 264}),
        (2, {"eos_token_id": [2, 264]}, 2, {2, 264}),
        (2, {"eos_token_id": 264}, 2, {2, 264}),
        (2, {"eos_token_id": None}, 2, {2}),
        ([2, 264], None, None, {2, 264}),
        (2, None, 17, {17}),  # a shape from elsewhere with a tokenizer of another vocabulary
        (None, None, None, set()),
    ],
)
def test_every_end_of_a_text_counts(tmp_path, config_ends, file, tokenizer_end, ends):
    raw = {**TINY.to_json(), "eos_token_id": config_ends}
    save_hf(tmp_path, TINY, random_weights(TINY))
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "generation_config.json").unlink()
    if file is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(file))
    assert end_ids(open_model(tmp_path), tokenizer_end) == ends


def test_generate_stops_at_any_of_them(tmp_path, pieces, capsys):
    config = replace(TINY, vocab_size=vocabulary_size(pieces))
    save_hf(tmp_path, config, random_weights(config))
    shutil.copy(pieces / "tokenizer.model", tmp_path)

    def answer():
        generate.run(GenerateArgs(tmp_path, "the llama", max_new_tokens=8, json=True))
        return json.loads(capsys.readouterr().out)

    free = answer()
    assert (free["finish"], len(free["tokens"])) == ("length", 8)
    raw = {**config.to_json(), "eos_token_id": [2, free["tokens"][3]]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    first = free["tokens"].index(free["tokens"][3])
    assert (answer()["finish"], answer()["tokens"]) == ("eos", free["tokens"][:first])


def test_a_broken_generation_config_is_refused_by_name(tmp_path):
    save_hf(tmp_path / "hf", TINY, random_weights(TINY))
    for text in ("{", "[]", '{"eos_token_id": "two"}', '{"eos_token_id": [1.5]}'):
        (tmp_path / "hf" / "generation_config.json").write_text(text)
        with pytest.raises(UserError, match=r"generation_config\.json"):
            end_ids(open_model(tmp_path / "hf"), 2)
    (tmp_path / "hf" / "generation_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"generation_config\.json"):
        export.run(ExportArgs(tmp_path / "hf", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["added_tokens.json", "tokenizer_config.json", "neither"])
@pytest.mark.parametrize("named", ["directory", "file"])
def test_a_row_for_an_added_token_comes_back_through_megatrons_files(tmp_path, pieces, how, named):
    """Alpaca: 32,000 pieces and a [PAD], 32,001 rows, padded to 32,128, and no config.json to tell."""
    home = tmp_path / "tokenizer"
    shutil.copytree(pieces, home)
    size = vocabulary_size(home)
    rows = size + (how != "neither")
    if how == "added_tokens.json":
        (home / how).write_text(json.dumps({"[PAD]": size}))
    elif how == "tokenizer_config.json":
        (home / how).write_text(json.dumps({"added_tokens_decoder": {str(size): {"content": "[PAD]"}}}))
    config = replace(WIDE, vocab_size=rows)
    weights = random_weights(config)
    save_hf(tmp_path / "hf", config, weights)
    convert.run(ConvertArgs(tmp_path / "hf", tmp_path / "mg", "megatron"))
    remove_shape(tmp_path / "mg")
    tokenizer = home if named == "directory" else home / "tokenizer.model"
    opened = open_model(tmp_path / "mg", hints=ConfigHints(tokenizer=tokenizer))
    assert opened.config.vocab_size == rows
    if how == "added_tokens.json":
        assert torch.equal(opened.reader.read("lm_head.weight"), weights["lm_head.weight"])
        convert.run(ConvertArgs(tmp_path / "mg", tmp_path / "back", "hf", tokenizer=home))
        fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
        assert (fast.convert_tokens_to_ids("[PAD]"), len(fast)) == (size, rows)


def test_a_tokenizer_with_more_ids_than_rows_leaves_all_rows(tmp_path, pieces):
    home = tmp_path / "tokenizer"
    shutil.copytree(pieces, home)
    size = vocabulary_size(home)
    (home / "added_tokens.json").write_text(json.dumps({"[PAD]": size}))
    config = replace(WIDE, vocab_size=size)
    save_hf(tmp_path / "hf", config, random_weights(config))
    shutil.copytree(home, tmp_path / "hf", dirs_exist_ok=True)
    assert inspect(tmp_path / "hf", json=True, verify=False) == 0
    convert.run(ConvertArgs(tmp_path / "hf", tmp_path / "mg", "megatron", make_vocab_size_divisible_by=1))
    remove_shape(tmp_path / "mg")
    opened = open_model(tmp_path / "mg", hints=ConfigHints(tokenizer=home))
    assert opened.config.vocab_size == size
    assert "all rows were kept" in " ".join(opened.notes)


@pytest.mark.parametrize("value", [2**31, 2**70, -5, 1.5, "7", None, [1]])
@pytest.mark.parametrize("place", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json"])
def test_an_impossible_id_is_refused_and_takes_no_memory(tmp_path, place, value):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    content = {
        "added_tokens.json": {"[PAD]": value},
        "tokenizer_config.json": {"added_tokens_decoder": {str(value): {"content": "[PAD]"}}},
        "tokenizer.json": {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": value, "content": "[PAD]"}]},
    }[place]
    (tmp_path / place).write_text(json.dumps(content))
    if (isinstance(value, int) and value < 0) or (place == "tokenizer_config.json" and not isinstance(value, int)):
        return  # a negative id never decides the size; a key that is no number is no id
    if place == "tokenizer_config.json" and value == "7":
        return
    with pytest.raises(UserError):
        vocabulary_size(tmp_path)


def test_a_file_that_the_user_names_decides_in_the_copy_too(tmp_path, full, pieces):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(pieces / "tokenizer.model", other / "llama.model")
    (other / "tokenizer.json").write_text("{}")
    (other / "chat_template.jinja").write_text("x")
    load_tokenizer(other / "llama.model").save_to(tmp_path / "copy")
    assert listing(tmp_path / "copy") == ["chat_template.jinja", "tokenizer.model"]
    load_tokenizer(full / "tokenizer.json").save_to(tmp_path / "fast")
    assert load_tokenizer(tmp_path / "fast").engine == "tokenizers"
    assert copy_tokenizer(full / "tokenizer.json", tmp_path / "third") == ""
    assert load_tokenizer(tmp_path / "third").engine == "tokenizers"


@pytest.mark.parametrize("kind", ["directory", "fifo", "dangling link", "link out"])
@pytest.mark.parametrize("name", ["chat_template.jinja", "added_tokens.json", "tokenizer_config.json"])
def test_only_regular_files_inside_are_copied(tmp_path, pieces, kind, name):
    home = tmp_path / "home"
    shutil.copytree(pieces, home)
    tokenizer = load_tokenizer(home)
    (tmp_path / "secret").write_text("secret")
    path = home / name
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / ("nowhere" if "dangling" in kind else "secret"))
    with pytest.raises(UserError, match=name):
        tokenizer.save_to(tmp_path / "out")
    assert not (tmp_path / "out" / name).exists()


def test_a_link_in_the_way_is_replaced_and_not_followed(tmp_path, pieces):
    (tmp_path / "foreign").write_text("keep")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.model").symlink_to(tmp_path / "foreign")
    copy_tokenizer_files(pieces, tmp_path / "out")
    assert (tmp_path / "foreign").read_text() == "keep"
    assert load_tokenizer(tmp_path / "out").engine == "sentencepiece"


def test_there_is_one_list_of_a_tokenizers_files():
    """The names that transformers itself looks for are in it."""
    from transformers import tokenization_utils_base as base
    from transformers.utils import hub

    theirs = {base.SPECIAL_TOKENS_MAP_FILE, base.ADDED_TOKENS_FILE, base.TOKENIZER_CONFIG_FILE,
              base.FULL_TOKENIZER_FILE, hub.CHAT_TEMPLATE_FILE, *VOCABULARY_FILES}  # fmt: skip
    assert theirs <= set(TOKENIZER_FILES)
    assert hub.CHAT_TEMPLATE_DIR == CHAT_TEMPLATE_DIRECTORY


def test_max_shard_gb_has_a_range(tmp_path):
    save_hf(tmp_path / "hf", TINY, random_weights(TINY))
    for value in (0, -1, float("nan"), float("inf"), 1e30):
        for verb in (
            lambda v: export.run(ExportArgs(tmp_path / "hf", tmp_path / "out", max_shard_gb=v)),
            lambda v: convert.run(ConvertArgs(tmp_path / "hf", tmp_path / "out", "hf", max_shard_gb=v)),
        ):
            with pytest.raises(UserError, match="max-shard-gb"):
                verb(value)
    export.run(ExportArgs(tmp_path / "hf", tmp_path / "out", max_shard_gb=0.00002))
    assert_same(open_model(tmp_path / "out").reader, random_weights(TINY))


def test_a_broken_tokenizer_model_is_named_at_its_source(tmp_path):
    save_hf(tmp_path / "hf", TINY, random_weights(TINY))
    for content in (b"nonsense", b"", b"\x0a\x05\x0a\x03abc", b"\xff" * 100):
        (tmp_path / "hf" / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError) as error:
            export.run(ExportArgs(tmp_path / "hf", tmp_path / "out"))
        assert str(tmp_path / "hf") in str(error.value)
        assert "partial" not in str(error.value)
        assert not (tmp_path / "out").exists()


def test_a_run_keeps_what_its_tokenizer_and_its_first_model_came_with(tmp_path, full):
    """Chat templates in their folder; the generation_config.json of the model that it starts from."""
    save_hf(tmp_path / "init", TINY, random_weights(TINY))
    (tmp_path / "init" / "generation_config.json").write_text('{"top_k": 7}')
    run = tmp_path / "run"
    prepare_run_directory(Recipe(out=str(run), tokenizer=str(full), init=str(tmp_path / "init")))
    assert listing(run / "tokenizer") == listing(full)
    assert json.loads((run / "tokenizer" / "generation_config.json").read_text()) == {"top_k": 7}
    prepare_run_directory(Recipe(out=str(tmp_path / "second"), tokenizer=str(full)))
    assert json.loads((tmp_path / "second" / "tokenizer" / "generation_config.json").read_text()) == GENERATION
