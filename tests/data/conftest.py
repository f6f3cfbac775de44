"""A small LLaMA-like tokenizer, and a way to run `prepare` as the command line does."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from small_inputs import train_sentencepiece

from arriero.cli.prepare import PrepareArgs, run
from arriero.data.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(directory / "tokenizer.model")
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_dir)


@pytest.fixture(scope="session")
def json_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """The same vocabulary as a tokenizer.json (its merges rebuilt from the scores, as converters do)."""
    import sentencepiece
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Fast

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    pieces = [processor.id_to_piece(i) for i in range(len(processor))]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece, i in ids.items():
        if not (processor.is_byte(i) or processor.is_control(i) or processor.is_unknown(i)):
            pairs = [(piece[:k], piece[k:]) for k in range(1, len(piece)) if piece[:k] in ids and piece[k:] in ids]
            merges += [(-processor.get_score(i), ids[a], ids[b], a, b) for a, b in pairs]
    ordered = [(a, b) for *_, a, b in sorted(merges)]
    fast = Fast(models.BPE(ids, ordered, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    directory = tmp_path_factory.mktemp("json-tokenizer")
    fast.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    return directory


@pytest.fixture
def prepare(tmp_path: Path, tokenizer_dir: Path) -> Callable[..., str]:
    """Runs `arriero prepare`; returns --out. Keyword arguments are `PrepareArgs`."""

    def call(*inputs: str | Path, **options: object) -> str:
        args = PrepareArgs(
            inputs=tuple(map(str, inputs)), out=str(tmp_path / "out" / "set"), tokenizer=tokenizer_dir, workers=2
        )
        args = dataclasses.replace(args, **options)
        assert run(args) == 0
        return args.out

    return call
