from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_inputs import RECORDS, write_records

from arriero.common.errors import UserError
from arriero.data.batches import Batches
from arriero.data.config import DataConfig
from arriero.data.formats import FormatOptions, UnusableRecordError, load_template, make_format
from arriero.data.indexed import IndexedDataset
from arriero.data.instruct import pack_best_fit
from arriero.data.records import CONTENT_COLUMNS
from arriero.data.tokenizer import Tokenizer

Prepare = Callable[..., str]


def chat(record: dict[str, object], loss_on: str = "all") -> list[tuple[str, bool, bool]]:
    (document,) = make_format("chat", FormatOptions(loss_on=loss_on)).documents(record)
    return [tuple(part) for part in document]  # type: ignore[misc]


TURNS = [("user", "Hi"), ("assistant", "Yes?"), ("user", "Sing"), ("assistant", "La")]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": r, "content": c} for r, c in TURNS]},
        {"conversations": [{"from": {"user": "human", "assistant": "gpt"}[r], "value": c} for r, c in TURNS]},
        {"instruction": "Human: Hi\nAssistant: Yes?\nHuman: Sing\nAssistant:", "input": "", "output": "La"},
    ],
)
def test_the_same_chat_in_three_shapes(record: dict[str, object]) -> None:
    expected = [
        ("### Human: Hi\n\n", False, False), ("### Assistant: ", False, False), ("Yes?", True, True),
        ("\n\n", False, False),
        ("### Human: Sing\n\n", False, False), ("### Assistant: ", False, False), ("La", True, True),
    ]  # fmt: skip
    assert chat(record) == expected
    last = chat(record, loss_on="last")
    assert [learn for _, learn, end in last if end] == [False, True]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": []}, "not a list of turns"),
        ({"messages": ["x"]}, "not an object"),
        ({"messages": [{"role": "oracle", "content": "x"}]}, "unknown role 'oracle'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no answer"),
        ({"messages": [{"role": "assistant", "content": None}]}, "content is null"),
    ],
)
def test_a_bad_chat_says_why(record: dict[str, object], reason: str) -> None:
    with pytest.raises(UnusableRecordError, match=reason):
        chat(record)


ASK = {"instruction": "Add.", "output": "42"}
PAIR = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
# Records whose content beyond instruction/output or messages must not vanish: the prompt's text, or why it is refused.
CARRIED: dict[str, tuple[dict[str, object], str]] = {
    "input": ({**ASK, "input": "1 + 41"}, "### Human: Add.\n1 + 41\n\n### Assistant: "),
    "input behind turns": (
        {"instruction": "Human: a\nAssistant: b\nHuman: c\nAssistant:", "input": "d", "output": "e"},
        "### Human: a\n\n### Assistant: b\n\n### Human: c\nd\n\n### Assistant: ",
    ),
    "system": ({**ASK, "system": "Be brief."}, "Be brief.\n\n### Human: Add.\n\n### Assistant: "),
    "history": ({**ASK, "history": [["a", "b"], ["c", "d"]]},
                "### Human: a\n\n### Assistant: b\n\n### Human: c\n\n### Assistant: d\n\n"
                "### Human: Add.\n\n### Assistant: "),
    "system of messages": ({"messages": PAIR, "system": "Be brief."}, "Be brief.\n\n### Human: Hi\n\n### Assistant: "),
    "the same system twice": ({"messages": [{"role": "system", "content": "S"}, *PAIR], "system": "S"},
                              "S\n\n### Human: Hi\n\n### Assistant: "),
    "the other name is null": ({"messages": None, "conversations": [{"from": "human", "value": "Hi"},
                                                                    {"from": "gpt", "value": "Yes?"}]},
                               "### Human: Hi\n\n### Assistant: "),
    "both names in a turn": ({"messages": [{**turn, "from": None, "value": None, "tool_calls": []} for turn in PAIR]},
                             "### Human: Hi\n\n### Assistant: "),
    "no loss on a question": ({"messages": [{**PAIR[0], "train": False, "weight": 0}, PAIR[1]]},
                              "### Human: Hi\n\n### Assistant: "),
    "blanks and nulls": ({**ASK, "input": " ", "history": [], "tools": "", "system": None, "images": [None]},
                         "### Human: Add.\n\n### Assistant: "),
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "another system": ({"messages": [{"role": "system", "content": "S"}, *PAIR], "system": "T"}, "another system"),
    "input without a user's turn": ({"instruction": "Human: a\nAssistant: b", "input": "c", "output": "d"}, "input is"),
    "input beside messages": ({"messages": PAIR, "input": "x"}, "input is filled beside messages"),
    "both lists": ({"messages": PAIR, "conversations": PAIR[:1] * 2}, "messages and conversations are both filled"),
    "tools": ({"messages": PAIR, "tools": [{"name": "f"}]}, "tools is filled"),
    "tools as text": ({"conversations": PAIR, "tools": "[{}]"}, "tools is filled"),
    "images": ({**ASK, "images": ["a.png"]}, "images is filled"),
    "history of odd length": ({**ASK, "history": [["a"]]}, "history is not a list of pairs"),
    "history with a null": ({**ASK, "history": [["a", None]]}, "answer of history is null"),
    "a tool's turn": ({"messages": [*PAIR, {"role": "tool", "content": "x"}]}, "unknown role 'tool'"),
    "tool calls": ({"messages": [PAIR[0], {**PAIR[1], "tool_calls": [{"id": 1}]}]}, "tool_calls is filled"),
    "reasoning": ({"messages": [PAIR[0], {**PAIR[1], "reasoning_content": "hm"}]}, "reasoning_content is filled"),
    "loss of a turn": ({"messages": [PAIR[0], {**PAIR[1], "loss": False}]}, "loss False"),
    "train of a turn": ({"messages": [PAIR[0], {**PAIR[1], "train": 0.5}]}, "train 0.5"),
    "weight": ({"messages": [PAIR[0], {**PAIR[1], "weight": 0}]}, "weight 0"),
    "content of parts": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content is list"),
    "content and value": ({"messages": [{"role": "user", "content": "x", "value": "y"}]}, "both filled, and differ"),
}  # fmt: skip


@pytest.mark.parametrize("case", CARRIED)
def test_a_chat_carries_all_that_a_record_holds(case: str) -> None:
    record, prompt = CARRIED[case]
    parts = chat(record, "last")
    assert "".join(text for text, *_ in parts[:-1]) == prompt
    assert parts[-1][1:] == (True, True)


@pytest.mark.parametrize("case", REFUSED)
def test_or_it_is_set_aside(case: str) -> None:
    record, reason = REFUSED[case]
    with pytest.raises(UnusableRecordError, match=reason):
        chat(record)


@pytest.mark.parametrize("column", [c for c in CONTENT_COLUMNS if c != "input"])
def test_what_an_alpaca_record_has_no_place_for(column: str) -> None:
    for name in ("alpaca", "alpaca-sft"):
        form = make_format(name, FormatOptions())
        with pytest.raises(UnusableRecordError, match=f"{column} is filled"):
            form.documents({**ASK, column: "x"})
        ignoring = make_format(name, FormatOptions(ignored=(column,)))
        plain = form.documents(ASK)
        assert ignoring.documents({**ASK, column: "x"}) == plain
        assert form.columns is not None
        assert column in form.columns  # read from a parquet file too
    with pytest.raises(UserError, match="did you mean 'tools'"):
        make_format("chat", FormatOptions(ignored=("tool",)))


@pytest.mark.parametrize("name", ["Input", "INPUT ", "System"])
def test_a_column_in_other_letters_is_content_too(name: str) -> None:
    form = make_format("alpaca", FormatOptions())
    with pytest.raises(UnusableRecordError, match="is filled"):
        form.documents({**ASK, name: "x"})


def test_no_input_leaves_no_trace() -> None:
    for name in ("stanford", "ascendspeed", "ascendspeed-instruction"):
        form = make_format("alpaca", FormatOptions(template=load_template(name)))
        for missing in ("", None, "  "):
            text = form.documents({"instruction": "Do", "input": missing, "output": "Done"})[0][0].text
            assert "None" not in text
            assert text.rstrip("\n").endswith("Done")


def test_a_users_template(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'prompt = "Q: {instruction} ({input})\\n"\nprompt_no_input = "Q: {instruction}\\n"\nanswer = "A: {output}"\n'
    )
    form = make_format("alpaca", FormatOptions(template=load_template(str(file))))
    texts = [form.documents(record)[0][0].text for record in RECORDS]
    assert texts == ["Q: Name a llama.\nA: Paco", "Q: Add. (1 + 1)\nA: 2", "Q: Sing ü <s>\nA: la\nla"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('promt = "x"', "did you mean 'prompt'"),
        ('prompt = "{output}"', "asks for {output}"),
        ('prompt = "{"', "stray brace"),
        ('prompt = "{instruction:1000000000} {input}"', "a slot with : or !"),
        ('prompt = "{instruction!r} {input}"', "a slot with : or !"),
        ('prompt = "Q: {instruction}"', "has no {input}"),
        ('answer = "A"', "has no {output}"),
        ('user = ""', "has no {content}"),
        ("prompt = 3", "must be a string"),
        ("prompt", "is not TOML"),
    ],
)
def test_a_wrong_template_says_what(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.toml").write_text(content)
    with pytest.raises(UserError, match=message):
        load_template(str(tmp_path / "t.toml"))
    with pytest.raises(UserError, match="did you mean 'stanford'"):
        load_template("standford")


def test_sft_masks_the_prompt_and_learns_answer_and_eos(tmp_path: Path, prepare: Prepare, tokenizer: Tokenizer) -> None:
    out = prepare(write_records(tmp_path, "jsonl"), format="alpaca-sft")
    ids, mask, labels = (
        IndexedDataset(f"{out}_packed_{n}_document") for n in ("input_ids", "attention_mask", "labels")
    )
    assert ids.dtype == labels.dtype == np.int32
    for i, record in enumerate(RECORDS):
        assert set(mask[i].tolist()) == {1}
        learned = labels[i] != -100
        assert np.array_equal(ids[i][learned], labels[i][learned])
        assert tokenizer.decode(ids[i][learned][:-1]) == record["output"]
        assert ids[i][learned][-1] == 2
        assert tokenizer.decode(ids[i][~learned]).endswith("### Response:\n")
        assert ids[i][0] == 1


def test_an_answer_that_repeats_the_marker_is_learned_whole(
    tmp_path: Path, prepare: Prepare, tokenizer: Tokenizer
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"instruction": "x", "input": "", "output": "a\\n### Response:\\nb"}\n')
    out = prepare(source, format="alpaca-sft")
    labels = IndexedDataset(f"{out}_packed_labels_document")[0]
    assert tokenizer.decode(labels[labels != -100][:-1]) == "a\n### Response:\nb"


@pytest.mark.parametrize("packing", ["pad", "best-fit"])
@pytest.mark.parametrize("attention", ["window", "document"])
def test_instruction_batches_hold_every_record_once(
    tmp_path: Path, prepare: Prepare, packing: str, attention: str
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(
        "".join(f'{{"instruction": "{n} {"y" * n}", "output": "{n} {"z" * (n % 7)}"}}\n' for n in range(30))
    )
    template = tmp_path / "t.toml"
    template.write_text('prompt_no_input = "{instruction}\\n"')
    out = prepare(source, format="alpaca-sft", template=str(template))
    config = DataConfig(prefix=out, split="1,0,0", packing=packing, attention=attention)
    assert config.problems() == []
    batches = Batches(config, sequence_length=64, global_batch=1, seed=3)
    ids, labels = (IndexedDataset(f"{out}_packed_{n}_document") for n in ("input_ids", "labels"))
    expected = sorted((ids[i][:-1].tolist(), labels[i][1:].tolist()) for i in range(30))
    found = []
    for step in range(batches.samples_per_epoch):
        batch = batches.batch(step, 0, 1)
        tokens, targets = batch.tokens[0].tolist(), batch.labels[0].tolist()
        starts = [i for i, token in enumerate(tokens) if token == 1]
        for a, b in zip(starts, [*starts[1:], 64], strict=True):
            size = max(n for n in range(b - a) if targets[a + n] != -100) + 1
            found.append((tokens[a : a + size], targets[a : a + size]))
            if attention == "document" and batch.positions is not None and batch.documents is not None:
                assert batch.positions[0, a : a + size].tolist() == list(range(size))
                assert len(set(batch.documents[0, a : a + size].tolist())) == 1
    assert sorted(found) == expected
    assert batches.samples_per_epoch == 30 if packing == "pad" else batches.samples_per_epoch < 20


def test_best_fit_never_overfills_and_wastes_little() -> None:
    sizes = np.random.default_rng(0).integers(1, 513, 4000)
    bins = pack_best_fit(sizes, 512)
    assert sorted(i for one in bins for i in one) == list(range(4000))
    assert max(sizes[one].sum() for one in bins) <= 512
    assert len(bins) <= 1.02 * sizes.sum() / 512 + 1
    assert pack_best_fit(np.array([3, 5, 2, 6]), 8) == [[3, 2], [1, 0]]
