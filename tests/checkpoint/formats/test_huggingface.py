import json
from dataclasses import replace

import pytest
import torch
import transformers
from small_models import TINY, VARIANTS, assert_same, random_weights, save_hf, unchanged

from arriero.checkpoint.formats.huggingface import open_huggingface, write_huggingface
from arriero.checkpoint.tensors.in_memory import in_memory
from arriero.common.errors import UserError
from arriero.model.config import LlamaConfig


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_opens_safetensors(tmp_path, variant, shards):
    config = VARIANTS[variant]
    weights = random_weights(config)
    assert_same(open_huggingface(save_hf(tmp_path / "m", config, weights, shards=shards)), weights)


def test_opens_old_pytorch_bins_with_inv_freq(tmp_path):
    weights = random_weights(TINY, dtype=torch.float16)
    names = list(weights)
    parts = [dict.fromkeys(names[:20]), dict.fromkeys(names[20:])]
    weight_map = {}
    for i, part in enumerate(parts):
        file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        content = {name: weights[name] for name in part}
        content[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        torch.save(content, tmp_path / file)
        weight_map.update(dict.fromkeys(content, file))
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_json()))
    assert_same(open_huggingface(tmp_path), weights)


def test_a_tied_models_spare_head_is_left_out(tmp_path):
    config = VARIANTS["tied"]
    weights = random_weights(config)
    save_hf(tmp_path, config, {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    assert_same(open_huggingface(tmp_path), weights)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("max_shard_bytes", [5e9, 8000, 1])
def test_what_we_write_transformers_loads(tmp_path, variant, max_shard_bytes):
    config = VARIANTS[variant]
    weights = random_weights(config)
    out = tmp_path / "out"
    write_huggingface(out, in_memory(weights), config=config, max_shard_bytes=max_shard_bytes)
    assert_same(open_huggingface(out), weights)
    assert LlamaConfig.from_json(out) == config
    model = transformers.LlamaForCausalLM.from_pretrained(out)
    for name, tensor in weights.items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert (max_shard_bytes == 5e9) == (out / "model.safetensors").exists()


@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_cast_as_torch_casts(tmp_path, source, target):
    weights = random_weights(TINY, dtype=source)
    write_huggingface(tmp_path / "out", in_memory(weights), config=TINY, dtype=target)
    assert_same(open_huggingface(tmp_path / "out"), {name: t.to(target) for name, t in weights.items()})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_refused(tmp_path, value, dtype):
    weights = random_weights(TINY, dtype=dtype)
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = value
    with unchanged(tmp_path), pytest.raises(UserError, match=r"model\.layers\.2\.mlp\.up_proj\.weight holds NaN"):
        write_huggingface(tmp_path / "out", in_memory(weights), config=TINY)


def test_values_too_large_for_the_dtype_are_refused(tmp_path):
    weights = random_weights(TINY)
    weights["model.norm.weight"][0] = 1e5
    with unchanged(tmp_path), pytest.raises(UserError, match=r"model\.norm\.weight holds values too large for F16"):
        write_huggingface(tmp_path / "out", in_memory(weights), config=TINY, dtype=torch.float16)


def test_an_existing_directory_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(UserError, match="already exists"):
        write_huggingface(tmp_path / "out", in_memory(random_weights(TINY)), config=TINY)
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_a_leftover_of_a_killed_writer_is_replaced(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model.safetensors").write_bytes(b"half")
    weights = random_weights(TINY)
    write_huggingface(tmp_path / "out", in_memory(weights), config=TINY)
    assert_same(open_huggingface(tmp_path / "out"), weights)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def break_index(directory, change):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: (d / "model-00002-of-00003.safetensors").unlink(), "1 of 3 shards are missing: model-00002"),
        (lambda d: break_index(d, lambda m: m.update(extra="model-00001-of-00003.safetensors")), "lacks extra"),
        (lambda d: break_index(d, lambda m: m.update(extra="../secret.safetensors")), "outside its directory"),
        (lambda d: break_index(d, lambda m: m.update(extra="/etc/passwd")), "outside its directory"),
        (lambda d: break_index(d, lambda m: m.update(extra="..")), "outside its directory"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "lacks 'weight_map"),
        (lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": [1]}'), "weight_map is a list"),
    ],
)
def test_broken_shards_are_refused_by_name(tmp_path, damage, says):
    save_hf(tmp_path, TINY, random_weights(TINY), shards=3)
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        open_huggingface(tmp_path)
    assert says in str(error.value)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    weights = random_weights(TINY)
    save_hf(tmp_path, TINY, weights, shards=2)
    save_hf(tmp_path / "other", TINY, weights)
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match="again"):
        open_huggingface(tmp_path)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (replace(TINY, num_hidden_layers=5), "lacks model.layers.4"),
        (replace(TINY, num_hidden_layers=3), "holds model.layers.3"),
        (replace(TINY, num_key_value_heads=4), "k_proj.weight is [16, 32], config.json says [32, 32]"),
        (replace(TINY, vocab_size=99), "embed_tokens.weight is [100, 32]"),
        (replace(TINY, attention_bias=True), "q_proj.bias"),
    ],
)
def test_a_disagreeing_config_is_refused(tmp_path, config, says):
    save_hf(tmp_path, config, random_weights(TINY))
    with pytest.raises(UserError) as error:
        open_huggingface(tmp_path)
    assert says in str(error.value)


def test_a_missing_head_names_the_tying(tmp_path):
    save_hf(tmp_path, TINY, random_weights(VARIANTS["tied"]))
    with pytest.raises(UserError, match="tie_word_embeddings"):
        open_huggingface(tmp_path)


def test_no_weights_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_json()))
    with pytest.raises(UserError, match="holds no weights"):
        open_huggingface(tmp_path)
