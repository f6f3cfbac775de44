import json

import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.checkpoint.formats.huggingface import copy_tokenizer
from arriero.data.tokenizer_json import write_tokenizer_json

TEXT = [
    f"The llama {w} over {n} hills;  its  pack held tea, salt — and naïve poems."
    for n in range(80)
    for w in ("ran", "walked")
]


def train(directory, **options):
    (directory / "text").write_text("\n".join(TEXT), encoding="utf-8")
    settings = {
        "vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "split_digits": True, "minloglevel": 2,
        "hard_vocab_limit": False, **options,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"), model_prefix=str(directory / "tokenizer"), **settings
    )
    (directory / "text").unlink()
    return directory


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    directory = train(tmp_path_factory.mktemp("t"))
    out = directory / "out"
    out.mkdir()
    assert copy_tokenizer(directory, out) == ""
    fast = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    fast.encode_special_tokens = True
    return sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model")), fast, out


@given(text=st.text(max_size=60) | st.text(alphabet=" \tabelms,.\n", max_size=60) | st.sampled_from(TEXT))
@settings(max_examples=300, deadline=None)
def test_ids_and_text_equal_sentencepieces(both, text):
    """Runs of blanks, unicode and byte fallback included; sentencepiece ends a text at NUL, so that is left out."""
    text = text.replace("\0", "")
    processor, fast, _ = both
    ids = fast.encode(text, add_special_tokens=False).ids
    assert ids == processor.encode(text)
    assert fast.decode(ids) == processor.decode(ids)


def test_transformers_opens_it(both):
    processor, _, out = both
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = "The  llama   ran"
    assert tokenizer(text).input_ids == [1, *processor.encode(text)]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": ["<turn>"]},
        {"byte_fallback": False},
    ],
)
def test_other_bpe_models_agree_or_are_left_alone(tmp_path, options):
    directory = train(tmp_path, **options)
    notice = write_tokenizer_json(directory / "tokenizer.model", directory)
    if notice:
        assert not (directory / "tokenizer.json").exists()
        return
    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    fast = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in [*TEXT, "a <turn> b", "ﬁne  ①"]:
        assert fast.encode(text, add_special_tokens=False).ids == processor.encode(text)


def test_a_unigram_model_is_named(tmp_path):
    directory = train(tmp_path, model_type="unigram")
    assert "not a BPE model" in write_tokenizer_json(directory / "tokenizer.model", directory)


def test_an_existing_json_is_copied_as_it_is(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "dst").mkdir()
    (tmp_path / "src" / "tokenizer.json").write_text(json.dumps({"mine": 1}))
    assert copy_tokenizer(tmp_path / "src", tmp_path / "dst") == ""
    assert json.loads((tmp_path / "dst" / "tokenizer.json").read_text()) == {"mine": 1}
