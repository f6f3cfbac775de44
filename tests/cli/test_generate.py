import json
import math
from dataclasses import replace

import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import TINY, VARIANTS, random_weights, save_hf

from arriero.checkpoint.language_model import encode_prompt
from arriero.checkpoint.open_model import load_model
from arriero.cli.generate import GenerateArgs, run
from arriero.common.errors import UserError
from arriero.model.generate import generate, next_logits, sample_token


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    """A byte-fallback BPE model of 300 pieces, LLaMA-like."""
    directory = tmp_path_factory.mktemp("tokenizer")
    words = " ".join(f"the llama walked {n} times over the high plain and rested" for n in range(200))
    (directory / "text").write_text("\n".join(words[i : i + 80] for i in range(0, len(words), 80)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"), model_prefix=str(directory / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return directory


@pytest.fixture
def model_dir(tmp_path, tokenizer_dir):
    config = replace(TINY, vocab_size=300)
    save_hf(tmp_path / "m", config, random_weights(config))
    (tmp_path / "m" / "tokenizer.model").write_bytes((tokenizer_dir / "tokenizer.model").read_bytes())
    return tmp_path / "m"


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_is_transformers_greedy(tmp_path, variant):
    config = VARIANTS[variant]
    save_hf(tmp_path, config, random_weights(config))
    model, tokenizer = load_model(tmp_path, torch.float64)
    assert tokenizer is None
    prompt = [1, 7, 42, 9]
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    expected = reference.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None)
    assert list(generate(model, prompt, 30)) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("variant", ["gqa", "llama3", "biases"])
@pytest.mark.parametrize("cuts", [[1] * 12, [5, 1, 1, 5], [3, 4, 5]])
def test_cached_logits_are_the_uncached(tmp_path, variant, cuts):
    config = VARIANTS[variant]
    save_hf(tmp_path, config, random_weights(config))
    model, _ = load_model(tmp_path, torch.float64)
    tokens = torch.randint(100, (1, 12), generator=torch.Generator().manual_seed(3))
    whole = model(tokens)[0]
    cache, at = None, 0
    for count in cuts:
        logits, cache = next_logits(model, tokens[:, at : at + count], cache)
        at += count
        torch.testing.assert_close(logits, whole[at - 1], rtol=1e-12, atol=1e-12)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=20), st.floats(0.01, 1.0), st.floats(0.1, 3), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_top_p_draws_from_the_smallest_set(logits, top_p, temperature, seed):
    draw = sample_token(
        torch.tensor(logits), temperature=temperature, top_p=top_p, generator=torch.Generator().manual_seed(seed)
    )
    weights = [math.exp(float(torch.tensor(x)) / temperature) for x in logits]
    better = sum(w for w in weights if w > weights[draw])
    assert better / sum(weights) < top_p + 1e-9


def test_sampling_follows_the_distribution():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    generator = torch.Generator().manual_seed(0)
    draws = [sample_token(logits, temperature=1.0, top_p=1.0, generator=generator) for _ in range(3000)]
    shares = [draws.count(i) / 3000 for i in range(3)]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.04)


def test_the_seed_decides(model_dir, capsys):
    texts = []
    for seed in (1, 1, 2):
        run(GenerateArgs(model_dir, prompt="the llama", max_new_tokens=20, temperature=1.0, seed=seed, json=True))
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1] != texts[2]


def test_plain_and_json_show_one_text(model_dir, capsys):
    args = {"prompt": "the llama walked", "max_new_tokens": 12}
    assert run(GenerateArgs(model_dir, **args, json=True)) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == answer["prompt"] + answer["continuation"]
    assert len(answer["tokens"]) == 12
    assert answer["finish"] == "length"
    run(GenerateArgs(model_dir, **args))
    assert capsys.readouterr().out == answer["text"] + "\n"


def test_end_of_text_ends_it(model_dir, capsys, monkeypatch):
    monkeypatch.setattr("arriero.model.generate.generate", lambda *a, **k: iter([270, 2, 271]))
    run(GenerateArgs(model_dir, prompt="the", max_new_tokens=9, json=True))
    answer = json.loads(capsys.readouterr().out)
    assert answer["tokens"] == [270]
    assert answer["finish"] == "eos"


def test_a_foreign_tokenizer_is_refused(tmp_path, tokenizer_dir):
    save_hf(tmp_path, TINY, random_weights(TINY))
    with pytest.raises(UserError, match=r"has 300 ids, the model has 100"):
        run(GenerateArgs(tmp_path, prompt="x", tokenizer=tokenizer_dir))
    with pytest.raises(UserError, match="no tokenizer"):
        run(GenerateArgs(tmp_path, prompt="x"))


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_p": 0}, {"top_p": 1.5},
     {"top_p": math.nan}, {"max_new_tokens": 0}, {"max_new_tokens": 2**62}, {"seed": 2**70}, {"seed": -1}],
)  # fmt: skip
def test_senseless_settings_are_refused(model_dir, bad):
    (key,) = bad
    with pytest.raises(UserError, match=f"--{key.replace('_', '-')} is .*\n.*give a"):
        run(GenerateArgs(model_dir, prompt="x", **bad))


@pytest.fixture
def wide_dir(tmp_path, tokenizer_dir):
    """A model of 420 rows with a tokenizer of 300 ids; the rows without text are the likeliest."""
    config = replace(TINY, vocab_size=420, tie_word_embeddings=False)
    weights = random_weights(config)
    weights["lm_head.weight"][300:] *= 50
    save_hf(tmp_path / "wide", config, weights)
    (tmp_path / "wide" / "tokenizer.model").write_bytes((tokenizer_dir / "tokenizer.model").read_bytes())
    return tmp_path / "wide"


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1.0, 100.0])
@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_rows_without_text_are_never_drawn(wide_dir, capsys, kind, temperature):
    known = set(range(300))
    if kind == "tokenizer.json":  # with a gap in its ids
        known = {*range(100), *range(200, 300)}
        (wide_dir / "tokenizer.model").unlink()
        vocab = {"<s>": 1, "</s>": 2} | {f"w{i}": i for i in known - {1, 2}}
        whole = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
        whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        whole.save(str(wide_dir / "tokenizer.json"))
    for seed in range(3):
        args = {"max_new_tokens": 30, "temperature": temperature, "seed": seed, "json": True}
        assert run(GenerateArgs(wide_dir, prompt="the w3", **args)) == 0
        assert set(json.loads(capsys.readouterr().out)["tokens"]) <= known


def test_logits_that_are_not_finite_are_a_sentence(model_dir, tmp_path):
    config = replace(TINY, vocab_size=300)
    weights = random_weights(config)
    weights["model.norm.weight"][:] = math.nan
    save_hf(tmp_path / "nan", config, weights)
    with pytest.raises(UserError, match="logits are not finite"):
        run(GenerateArgs(tmp_path / "nan", prompt="x", tokenizer=model_dir))


def test_positions_that_were_not_trained_are_told(model_dir, capsys):
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    run(GenerateArgs(model_dir, prompt="the", max_new_tokens=4))
    assert capsys.readouterr().err == ""
    run(GenerateArgs(model_dir, prompt="the", max_new_tokens=30))
    assert "exceed the model's max_position_embeddings 8" in capsys.readouterr().err


def test_a_run_that_was_trained_with_a_larger_tokenizer_generates(tmp_path, tokenizer_dir, capsys):
    """pretrain takes a tokenizer with more ids than the model has rows, as long as the data use none of them."""
    config = replace(TINY, vocab_size=299)
    save_hf(tmp_path / "m", config, random_weights(config))
    assert run(GenerateArgs(tmp_path / "m", prompt="the llama", tokenizer=tokenizer_dir, max_new_tokens=3)) == 0
    assert "has 300 ids, the model 299 rows" in capsys.readouterr().err


def test_the_prompt_begins_with_bos(tokenizer_dir):
    from arriero.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_dir)
    assert encode_prompt(tokenizer, "", 300) == [1]
    assert encode_prompt(tokenizer, "the", 300) == [1, *tokenizer.encode("the")]
