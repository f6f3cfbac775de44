"""Initial weights depend on (seed, name) alone, and start the loss where theory says."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arriero.model import init
from arriero.model.config import LlamaConfig
from arriero.model.init import InitialWeights
from arriero.model.llama import Llama

CONFIG = LlamaConfig(
    vocab_size=700, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, attention_bias=True,
)  # fmt: skip
NAMES = InitialWeights(CONFIG, 0).names()


@given(st.sampled_from(NAMES), st.data())
def test_any_slice_equals_the_slice_of_the_whole(name: str, data: st.DataObject) -> None:
    weights = InitialWeights(CONFIG, seed=7)
    index = []
    for size in weights.shape(name):
        start = data.draw(st.integers(0, size))
        index.append(slice(start, data.draw(st.integers(start, size))))
    assert torch.equal(weights.read(name, tuple(index)), weights.read(name)[tuple(index)])


def test_seed_and_name_decide() -> None:
    one, other = InitialWeights(CONFIG, 1), InitialWeights(CONFIG, 2)
    q, k = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(one.read(q), InitialWeights(CONFIG, 1).read(q))
    assert not torch.equal(one.read(q), other.read(q))
    assert not torch.equal(one.read(q), one.read(k))


def test_the_numbers_are_those_of_every_run_before() -> None:
    """The digest of what the first release drew: a seed means the same weights for ever."""
    weights = InitialWeights(CONFIG, 7)
    drawn = b"".join(weights.read(name).numpy().tobytes() for name in NAMES)
    assert hashlib.sha256(drawn).hexdigest() == "622d5a6f7d4e29acbffb27e564fb52b82d974a985717577b6ad53a9dfbd3449d"


@pytest.mark.parametrize("in_c", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_matrix_is_numpys_normals_of_256_rows_each(
    *, in_c: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_c:
        monkeypatch.setattr(init, "_c_normal", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    name, blocks = "lm_head.weight", []
    for block, rows in enumerate((256, 256, 188)):
        key = int.from_bytes(hashlib.sha256(f"7/{name}/{block}".encode()).digest()[:16], "little")
        generator = np.random.Generator(np.random.Philox(key=key))
        blocks.append(generator.standard_normal((rows, 24), dtype=np.float32))
    assert (init._c_normal() is not None) == in_c  # here numpy has the function: it is this that is tested
    assert torch.equal(InitialWeights(CONFIG, 7).read(name), torch.from_numpy(np.concatenate(blocks)) * 0.02)


def test_memory_that_is_not_contiguous_is_filled_in_place() -> None:
    weights, name = InitialWeights(CONFIG, 7), "model.embed_tokens.weight"
    room = torch.full((900, 40), 5.0)
    weights.read_into(name, [3, 2], room[:600:2, 4:20])
    assert torch.equal(room[:600:2, 4:20], weights.read(name)[3:303, 2:18])
    assert room.eq(5.0).sum() == 900 * 40 - 300 * 16


def test_scale_of_each_kind() -> None:
    weights = InitialWeights(LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=8), 0)
    assert weights.read("model.layers.3.mlp.up_proj.weight").std().item() == pytest.approx(0.02, rel=0.02)
    assert weights.read("model.layers.3.mlp.down_proj.weight").std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert weights.read("model.norm.weight").eq(1).all()
    assert InitialWeights(CONFIG, 0).read("model.layers.0.self_attn.q_proj.bias").eq(0).all()


@pytest.mark.parametrize("hidden", [64, 256, 1024])
def test_starting_loss_follows_the_law(hidden: int) -> None:
    """ln V + 0.02^2 x hidden / 2, the law that gives 12.01 for the 65B shape with 32,000 tokens."""
    assert math.log(32000) + 0.02**2 * 8192 / 2 == pytest.approx(12.01, abs=0.005)
    config = LlamaConfig(
        vocab_size=4000, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=hidden // 4,
    )  # fmt: skip
    model, weights = Llama(config), InitialWeights(config, seed=3)
    model.load_state_dict({name: weights.read(name) for name in weights.names()})
    tokens = torch.randint(0, 4000, (4, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens)
    loss = (logits.logsumexp(-1) - logits.mean(-1)).mean().item()  # the mean over all possible next tokens
    assert loss == pytest.approx(math.log(4000) + 0.02**2 * hidden / 2, abs=0.01)
