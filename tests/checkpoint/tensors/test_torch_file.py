"""torch.save files: read without running them, written as torch writes them."""

import argparse
import collections
import enum
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.checkpoint.tensors.pickle_symbols import Call, parse_symbolically
from arriero.checkpoint.tensors.torch_file import TorchFile
from arriero.checkpoint.tensors.torch_write import TensorSpec, plan_archive
from arriero.common.errors import UserError


class Attack:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "attack",
    [
        Attack(os.system, "touch {}"),
        Attack(exec, "open({!r}, 'w')"),
        Attack(eval, "open({!r}, 'w')"),
        Attack(getattr, "x", "y"),
        Attack(__import__, "os"),
        Attack(open, "{}", "w"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path, attack, protocol):
    mark = tmp_path / "mark"
    function, args = attack.call
    evil = Attack(function, *(a.format(str(mark)) for a in args))
    torch.save({"w": torch.ones(2), "x": evil}, tmp_path / "bad.bin", pickle_protocol=protocol)
    with pytest.raises(UserError, match=r"bad\.bin: the pickle asks for .*no checkpoint needs"):
        TorchFile(tmp_path / "bad.bin")
    assert not mark.exists()


class Colour(enum.Enum):
    RED = 1


def test_megatrons_saved_arguments_are_data(tmp_path):
    args = argparse.Namespace(
        num_layers=3, ratio=0.5, names=["a"], nested=argparse.Namespace(x=None), dtype=torch.bfloat16
    )
    content = {"args": args, "iteration": 5, "model": collections.OrderedDict(w=torch.ones(2, 3), s=None),
               "rng": np.arange(3), "size": torch.Size([2]), "opt": [{"lr": 1e-4, "betas": (0.9, 0.95)}], "set": {1, 2},
               "parameter": torch.nn.Parameter(torch.zeros(2))}  # fmt: skip
    torch.save(content, tmp_path / "x.pt")
    file = TorchFile(tmp_path / "x.pt")
    state = file.root["args"].state
    assert (state["num_layers"], state["ratio"], state["names"]) == (3, 0.5, ["a"])
    assert isinstance(state["nested"], Call)
    assert file.root["opt"] == [{"lr": 1e-4, "betas": (0.9, 0.95)}]
    assert list(file.tensors(file.root["model"])) == ["w"]
    assert file.tensors(file.root)["parameter"].shape == (2,)


def test_views_are_read_where_they_lie(tmp_path):
    base = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    views = {
        "whole": base, "rows": base[2:5], "columns": base[:, 3:7], "cell": base[4, 5], "column": base[:, 2],
        "flat": base.view(-1), "one": base[1:2, 4:5], "empty": base[:0], "cube": torch.arange(24).reshape(2, 3, 4),
    }  # fmt: skip
    torch.save(views, tmp_path / "x.bin")
    reader = TorchFile(tmp_path / "x.bin").reader()
    for name, view in views.items():
        if view.dim() < 3:
            assert torch.equal(reader.read(name), view), name
    assert reader.shape("cube") == (2, 3, 4)
    assert torch.equal(reader.read("columns", (slice(1, 4), slice(2, 4))), base[1:4, 5:7])


@pytest.mark.parametrize("view", [lambda x: x.t(), lambda x: x[:, ::2]])
def test_views_that_are_no_rows_are_refused(tmp_path, view):
    torch.save({"w": view(torch.ones(4, 6))}, tmp_path / "x.bin")
    with pytest.raises(UserError, match="w is a transposed view"):
        TorchFile(tmp_path / "x.bin").reader()


def rewrite(source, target, change, **options):
    """Copies a zip archive with its data.pkl changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(info.filename, change(data) if info.filename.endswith("data.pkl") else data)


def test_a_view_beyond_its_storage_is_refused(tmp_path):
    torch.save({"w": torch.ones(4)}, tmp_path / "x.pt")
    for old, new in ((b"K\x04\x85", b"K\x09\x85"), (b"K\x00K\x04\x85", b"K\x05K\x04\x85")):
        rewrite(tmp_path / "x.pt", tmp_path / "y.pt", lambda d, old=old, new=new: d.replace(old, new))
        with pytest.raises(UserError, match=r"w (needs|lies)"):
            TorchFile(tmp_path / "y.pt").reader()


def test_compressed_and_truncated_archives_are_refused(tmp_path):
    torch.save({"w": torch.ones(4)}, tmp_path / "x.pt")
    rewrite(tmp_path / "x.pt", tmp_path / "z.pt", lambda d: d, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed"):
        TorchFile(tmp_path / "z.pt")
    data = (tmp_path / "x.pt").read_bytes()
    for keep in (0, 10, len(data) // 2, len(data) - 1):
        (tmp_path / "t.pt").write_bytes(data[:keep])
        with pytest.raises(UserError, match=r"t\.pt"):
            TorchFile(tmp_path / "t.pt")


def test_an_old_tar_style_file_is_refused_with_advice(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"before 1\.6"):
        TorchFile(tmp_path / "x.pt")


def test_a_dict_that_holds_itself_is_refused(tmp_path):
    loop = {}
    loop["again"] = loop
    torch.save({"w": loop}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="without end"):
        TorchFile(tmp_path / "x.pt").reader()


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=3), x, max_size=4) | st.tuples(x, x),
    max_leaves=20,
)


@given(value=plain, protocol=st.integers(2, 5))
@settings(max_examples=200, deadline=None)
def test_law_plain_data_is_read_as_pickle_reads_it(value, protocol):
    raw = pickle.dumps(value, protocol)
    if protocol > 2 or (b"_codecs" not in raw and b"bytes" not in raw):  # older protocols spell bytes as a call
        assert parse_symbolically(raw, "x") == value


@given(data=st.binary(max_size=200), cut=st.integers(0, 400), at=st.integers(0, 400), value=plain)
@settings(max_examples=300, deadline=None)
def test_fuzz_any_bytes_end_in_a_value_or_a_user_error(data, cut, at, value):
    raw = bytearray(pickle.dumps(value, 4))
    raw[at : at + len(data)] = data
    for stream in (bytes(raw), bytes(raw[:cut]), data):
        try:
            parse_symbolically(stream, "x")
        except UserError:
            continue


SPECS = st.builds(
    TensorSpec, st.sampled_from(["F32", "BF16", "F16", "I64", "U8"]), st.lists(st.integers(0, 5), max_size=3).map(tuple)
)


@given(model=st.dictionaries(st.text(min_size=1, max_size=5), SPECS, max_size=6), number=st.integers(-(2**70), 2**70))
@settings(max_examples=80, deadline=None)
def test_law_torch_reads_what_we_plan(model, number, tmp_path_factory):
    path = tmp_path_factory.mktemp("p") / "x.pt"
    size, blobs, offsets = plan_archive(
        {"number": number, "share": 0.25, "flag": True, "model": model, "pair": (1, "a")}
    )
    content = bytearray(size)
    for offset, blob in blobs:
        content[offset : offset + len(blob)] = blob
    path.write_bytes(content)
    assert all(offset % 64 == 0 for offset in offsets.values())
    for mmap in (False, True):
        found = torch.load(path, weights_only=True, mmap=mmap)
        assert (found["number"], found["share"], found["flag"], found["pair"]) == (number, 0.25, True, (1, "a"))
        for name, spec in model.items():
            assert tuple(found["model"][name].shape) == spec.shape
            assert not found["model"][name].any()
    assert list(TorchFile(path).tensors(TorchFile(path).root["model"])) == list(model)


def test_archives_beyond_four_gib_are_zip64(tmp_path):
    """A sparse file: 9 GB on paper, a few KB on the disk."""
    specs = {"a": TensorSpec("BF16", (2**31 + 5, 1)), "b": TensorSpec("U8", (3,)),
             "c": TensorSpec("F32", (2**30, 1)), "d": TensorSpec("U8", (3,))}  # fmt: skip
    size, blobs, offsets = plan_archive({"model": specs})
    with open(tmp_path / "x.pt", "wb") as file:
        file.truncate(size)
        for offset, blob in [*blobs, (offsets[1], b"\1\2\3"), (offsets[3], b"\4\5\6")]:
            file.seek(offset)
            file.write(blob)
    found = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)["model"]
    assert found["a"].shape == (2**31 + 5, 1)
    assert (found["b"].tolist(), found["d"].tolist()) == ([1, 2, 3], [4, 5, 6])
    file = TorchFile(tmp_path / "x.pt")
    tensor = file.tensors(file.root["model"])["d"]
    out = np.zeros((3, 1), np.uint8)
    tensor.read_window(0, 0, out)
    assert out.ravel().tolist() == [4, 5, 6]


def test_a_bytesio_extra_state_is_no_tensor(tmp_path):
    torch.save({"w": torch.ones(1), "w._extra_state": io.BytesIO(b"x")}, tmp_path / "x.pt")
    assert TorchFile(tmp_path / "x.pt").reader().names() == ["w"]
