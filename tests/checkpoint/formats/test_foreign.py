"""Checkpoints as other systems write them, made here with plain torch by their own rules, not with our writer."""

import argparse
import json
from dataclasses import replace

import pytest
import torch
from small_models import TINY, VARIANTS, assert_same, random_weights, save_hf

from arriero.checkpoint.formats.foreign_config import ConfigHints
from arriero.checkpoint.open_model import open_model
from arriero.cli.convert import ConvertArgs, run
from arriero.common.errors import UserError

MHA = replace(VARIANTS["mha"], rms_norm_eps=1e-6)


def fuse_qkv(weights, home, config):
    groups, size = config.num_key_value_heads, config.head_dim
    q, k, v = (weights[f"{home}self_attn.{n}_proj.weight"] for n in "qkv")
    parts = [q.view(groups, -1, config.hidden_size), k.view(groups, size, -1), v.view(groups, size, -1)]
    return torch.cat(parts, 1).flatten(0, 1)


def pad(table, rows):
    return torch.cat([table, table[-1:].expand(rows - len(table), -1)])


def nest(flat):
    """Megatron before core: language_model -> embedding -> word_embeddings -> weight, encoder -> flat keys, ..."""
    encoder = {k.removeprefix("encoder."): v for k, v in flat.items() if k.startswith("encoder.")}
    return {
        "language_model": {
            "embedding": {"word_embeddings": {"weight": flat["embedding"]}},
            "encoder": encoder,
            "output_layer": {"weight": flat["head"]},
        }
    }


def legacy(weights, config, *, fused_mlp, names, tp=1):
    """One flat dict a tensor rank, in the naming of `names`."""
    ranks = []
    for t in range(tp):

        def rows(name, t=t):
            return weights[name].chunk(tp, 0)[t]

        def columns(name, t=t):
            return weights[name].chunk(tp, 1)[t].contiguous()

        flat = {"embedding": pad(weights["model.embed_tokens.weight"], 128 * tp).chunk(tp)[t].clone(),
                "head": pad(weights["lm_head.weight"], 128 * tp).chunk(tp)[t].clone(),
                f"encoder.{names['final']}.weight": weights["model.norm.weight"]}  # fmt: skip
        for n in range(config.num_hidden_layers):
            home, out = f"model.layers.{n}.", f"encoder.layers.{n}."
            flat[f"{out}{names['first']}.weight"] = weights[home + "input_layernorm.weight"]
            flat[f"{out}{names['second']}.weight"] = weights[home + "post_attention_layernorm.weight"]
            flat[f"{out}self_attention.query_key_value.weight"] = fuse_qkv(weights, home, config).chunk(tp)[t].clone()
            flat[f"{out}self_attention.dense.weight"] = columns(home + "self_attn.o_proj.weight")
            gate, up = rows(home + "mlp.gate_proj.weight"), rows(home + "mlp.up_proj.weight")
            if fused_mlp:
                flat[f"{out}{fused_mlp}.weight"] = torch.cat([gate, up])
            else:
                flat[f"{out}mlp.gate_proj.weight"], flat[f"{out}mlp.dense_h_to_4h.weight"] = gate.clone(), up.clone()
            flat[f"{out}mlp.dense_4h_to_h.weight"] = columns(home + "mlp.down_proj.weight")
            flat[f"{out}self_attention.core_attention._extra_state"] = None
        ranks.append(flat)
    return ranks


OLD = {"first": "input_layernorm", "second": "post_attention_layernorm", "final": "final_layernorm"}
NEW = {"first": "input_norm", "second": "post_attention_norm", "final": "final_norm"}


def save_ranks(directory, models, **payload):
    (directory / "iter_0000040").mkdir(parents=True)
    (directory / "latest_checkpointed_iteration.txt").write_text("40")
    for t, model in enumerate(models):
        home = directory / "iter_0000040" / f"mp_rank_{t:02d}"
        home.mkdir()
        torch.save({"checkpoint_version": 3.0, "iteration": 40, "model": model, **payload}, home / "model_optim_rng.pt")
    return directory


@pytest.mark.parametrize("names", [OLD, NEW])
@pytest.mark.parametrize("fused_mlp", ["mlp.dense_h_to_4h", "mlp.proj", ""])
@pytest.mark.parametrize("tp", [1, 2])
def test_megatron_before_core_and_modellink(tmp_path, names, fused_mlp, tp):
    weights = random_weights(MHA)
    ranks = legacy(weights, MHA, fused_mlp=fused_mlp, names=names, tp=tp)
    save_ranks(tmp_path / "old", [nest(rank) for rank in ranks])
    save_hf(tmp_path / "hf", MHA, weights)
    run(ConvertArgs(tmp_path / "old", tmp_path / "out", "hf", config=tmp_path / "hf"))
    assert_same(open_model(tmp_path / "out").reader, weights)


def test_the_shape_comes_from_megatrons_saved_arguments(tmp_path):
    weights = random_weights(MHA)
    args = argparse.Namespace(
        num_layers=4, hidden_size=32, num_attention_heads=4, norm_epsilon=1e-6, rotary_base=10000, vocab_size=100,
        max_position_embeddings=64, untie_embeddings_and_output_weights=True, padded_vocab_size=128,
    )  # fmt: skip
    ranks = legacy(weights, MHA, fused_mlp="mlp.dense_h_to_4h", names=NEW)
    opened = open_model(save_ranks(tmp_path, [nest(rank) for rank in ranks], args=args))
    assert opened.config == MHA
    assert opened.notes == []
    assert_same(opened.reader, weights)


def test_what_cannot_be_known_is_said(tmp_path):
    weights = random_weights(MHA)
    ranks = legacy(weights, MHA, fused_mlp="mlp.dense_h_to_4h", names=NEW)
    path = save_ranks(tmp_path, [nest(rank) for rank in ranks])
    with pytest.raises(UserError, match="no whole heads of 128"):
        open_model(path)
    wide = replace(MHA, hidden_size=128, head_dim=128, num_attention_heads=1, num_key_value_heads=1)
    ranks = legacy(random_weights(wide), wide, fused_mlp="mlp.dense_h_to_4h", names=NEW)
    opened = open_model(save_ranks(tmp_path / "b", [nest(rank) for rank in ranks]))
    assert opened.config.vocab_size == 128
    assert "heads of 128" in opened.notes[0]
    assert any("padding included" in note for note in opened.notes)
    opened = open_model(tmp_path / "b", hints=ConfigHints(vocab_size=100))
    assert_same(opened.reader, random_weights(wide))


def test_ascendspeed_without_a_config_tells_its_heads_by_inv_freq(tmp_path):
    weights = random_weights(MHA, dtype=torch.float16)
    save_hf(tmp_path / "hf", MHA, weights)
    run(ConvertArgs(tmp_path / "hf", tmp_path / "as", "ascendspeed", tp=2, pp=2))
    (tmp_path / "as" / "config.json").unlink()
    opened = open_model(tmp_path / "as", hints=ConfigHints(vocab_size=100))
    assert replace(opened.config, max_position_embeddings=64) == MHA
    assert_same(opened.reader, weights)


def to_meta(weights, config):
    def interleave(w):
        heads = w.view(-1, 2, config.head_dim // 2, config.hidden_size)
        return heads.transpose(1, 2).reshape(w.shape)

    names = {"wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj"}
    meta = {"tok_embeddings.weight": weights["model.embed_tokens.weight"], "norm.weight": weights["model.norm.weight"],
            "output.weight": weights["lm_head.weight"], "rope.freqs": torch.ones(4)}  # fmt: skip
    for n in range(config.num_hidden_layers):
        home = f"model.layers.{n}."
        for key, name in names.items():
            w = weights[f"{home}{name}.weight"]
            meta[f"layers.{n}.attention.{key}.weight"] = interleave(w) if key in ("wq", "wk") else w
        for key, name in {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.items():
            meta[f"layers.{n}.feed_forward.{key}.weight"] = weights[f"{home}mlp.{name}.weight"]
        meta[f"layers.{n}.attention_norm.weight"] = weights[home + "input_layernorm.weight"]
        meta[f"layers.{n}.ffn_norm.weight"] = weights[home + "post_attention_layernorm.weight"]
    return meta


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("embedding_dim", [0, 1])
def test_metas_consolidated_files(tmp_path, ranks, embedding_dim):
    config = replace(TINY, max_position_embeddings=2048)
    weights = random_weights(config, dtype=torch.bfloat16)
    for r in range(ranks):
        shard = {}
        for key, w in to_meta(weights, config).items():
            dim = embedding_dim if "tok_emb" in key else int(".wo." in key or ".w2." in key)
            shard[key] = w if w.dim() == 1 else w.chunk(ranks, dim)[r].clone()
        torch.save(shard, tmp_path / f"consolidated.{r:02d}.pth")
    params = {"dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1}
    (tmp_path / "params.json").write_text(json.dumps(params))
    opened = open_model(tmp_path)
    assert (opened.kind, opened.config) == ("meta", config)
    assert_same(opened.reader, weights)
    q = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(opened.reader.read(q, (slice(3, 21), slice(5, 9))), weights[q][3:21, 5:9])
    run(ConvertArgs(tmp_path, tmp_path / "out", "megatron", tp=2))
    assert_same(open_model(tmp_path / "out").reader, weights)
    (tmp_path / "params.json").unlink()
    with pytest.raises(UserError, match=r"no params\.json"):
        open_model(tmp_path)


def damaged(tmp_path, change, *, tp=2, config=TINY):
    """A Megatron directory of ours with one rank's file changed by `change(payload)`."""
    save_hf(tmp_path / "hf", config, random_weights(config))
    run(ConvertArgs(tmp_path / "hf", tmp_path / "mg", "megatron", tp=tp))
    file = tmp_path / "mg/release/mp_rank_01/model_optim_rng.pt"
    payload = torch.load(file, weights_only=False)
    change(payload)
    torch.save(payload, file)
    return tmp_path / "mg"


NORM = "decoder.layers.2.self_attention.linear_qkv.layer_norm_weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p["model"].pop(NORM), f"lacks {NORM}"),
        (lambda p: p["model"].update({NORM: torch.ones(31)}), f"{NORM} is [31], its config says [32]"),
        (lambda p: p["model"].update({NORM: torch.zeros(32)}), f"{NORM} differs from tensor rank 0's"),
        (lambda p: p["model"].update(extra=torch.ones(1)), "holds extra"),
        (lambda p: p.update(checkpoint_version=1.0), "checkpoint_version 1.0"),
        (lambda p: p.pop("model"), "holds no model"),
        (lambda p: p["model"].update({k: v.double() for k, v in p["model"].items() if "fc2" in k}), "on one rank and"),
    ],
)
def test_a_damaged_rank_is_refused_by_name(tmp_path, change, says):
    with pytest.raises(UserError) as error:
        open_model(damaged(tmp_path, change))
    assert says in str(error.value)


@pytest.mark.parametrize("word", ["../../etc", "iter_1/../..", "", "5000000"])
def test_a_tracker_that_points_elsewhere_is_refused(tmp_path, word):
    save_hf(tmp_path / "hf", TINY, random_weights(TINY))
    run(ConvertArgs(tmp_path / "hf", tmp_path / "mg", "megatron"))
    (tmp_path / "mg/latest_checkpointed_iteration.txt").write_text(word)
    with pytest.raises(UserError, match="latest_checkpointed_iteration"):
        open_model(tmp_path / "mg")


def test_a_head_trained_apart_from_tied_embeddings_is_not_lost(tmp_path, capsys):
    config = VARIANTS["tied"]
    save_hf(tmp_path / "hf", config, random_weights(config))
    run(ConvertArgs(tmp_path / "hf", tmp_path / "as", "ascendspeed"))
    file = tmp_path / "as/release/mp_rank_00/model_optim_rng.pt"
    payload = torch.load(file, weights_only=False)
    payload["model"]["lm_head.lm_head.weight"][3, 3] += 1
    torch.save(payload, file)
    run(ConvertArgs(tmp_path / "as", tmp_path / "back", "hf"))
    assert "head differs" in capsys.readouterr().out
    assert torch.equal(
        open_model(tmp_path / "back").reader.read("lm_head.weight"), payload["model"]["lm_head.lm_head.weight"][:100]
    )


def test_what_else_metas_params_hold_is_refused_or_named(tmp_path):
    torch.save(to_meta(random_weights(MHA), MHA), tmp_path / "consolidated.00.pth")
    params = {"dim": 32, "n_layers": 4, "n_heads": 4, "vocab_size": -1, "multiple_of": 16, "use_scaled_rope": False}
    for extra, named in (({}, ""), ({"q\x07": 1}, "q\\x07"), ({"max_seq_len": 8}, ""), ({"new_key": 3.5}, "new_key")):
        (tmp_path / "params.json").write_text(json.dumps({**params, **extra}))
        notes = "\n".join(open_model(tmp_path).notes)
        assert ("not taken into account" in notes) == bool(named)
        assert named in notes
    for key in ("quantization_args", "lora_args", "moe_args", "vision_chunk_size"):
        (tmp_path / "params.json").write_text(json.dumps({**params, key: {"rank": 1}}))
        with pytest.raises(UserError, match=key):
            open_model(tmp_path)
