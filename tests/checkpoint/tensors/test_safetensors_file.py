import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from arriero.checkpoint.tensors.raw_file import RawFile
from arriero.checkpoint.tensors.safetensors_file import SafetensorsFile, build_header
from arriero.common.errors import UserError

GOOD = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "F16", "shape": [2], "data_offsets": [8, 12]},
}


def write(path, header, data=b"\0" * 12, *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_reads_what_the_library_writes(tmp_path):
    tensors = {
        "matrix": torch.randn(7, 5),
        "row": torch.randn(9).bfloat16(),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "ints": torch.arange(6).reshape(2, 3),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        assert file.shape(name) == tuple(tensor.shape)
        assert torch.equal(file.read(name), tensor)
    assert torch.equal(file.read("matrix", (slice(2, 6), slice(1, 3))), tensors["matrix"][2:6, 1:3])
    assert torch.equal(file.read("row", (slice(4, 20),)), tensors["row"][4:])


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_slice_is_numpys_slice(data, tmp_path_factory):
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([1, 3, 64, 3000]))
    tensor = torch.arange(rows * columns, dtype=torch.int32).reshape(rows, columns)
    path = tmp_path_factory.mktemp("s") / "x.safetensors"
    save_file({"x": tensor}, path)
    a, b = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
    c, d = sorted(data.draw(st.tuples(st.integers(0, columns), st.integers(0, columns))))
    assert torch.equal(SafetensorsFile(path).read("x", (slice(a, b), slice(c, d))), tensor[a:b, c:d])


def change(**fields):
    return {**GOOD, "b": {**GOOD["b"], **fields}}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"a":NaN}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            "twice",
        ),
        (b'{"a":{"dtype":"F32","shape":[2],"shape":[3],"data_offsets":[0,8]}}', "twice"),
        ({**GOOD, "__metadata__": {"x": 1}}, "__metadata__"),
        (change(dtype="F99"), "dtype 'F99'"),
        (change(dtype=["F32"]), "unknown dtype"),
        (change(shape=[-2]), "shape"),
        (change(shape=[2.0]), "shape"),
        (change(shape=[True, 2]), "shape"),
        (change(shape=[2**63]), "shape"),
        (change(shape=[2**62, 2**62]), "bytes, but has"),
        (change(data_offsets=[8]), "data_offsets"),
        (change(data_offsets=[8, 2**70]), "data_offsets"),
        (change(data_offsets=[12, 8]), "lies at bytes"),
        (change(data_offsets=[1000, 1004]), "truncated"),
        (change(data_offsets=[4, 8]), "overlaps"),
        (change(data_offsets=[10, 14]), "truncated"),
        ({"a": GOOD["a"]}, "follow the last tensor"),
        ({"b": GOOD["b"]}, "leaves a hole"),
        (change(extra=1), "nothing else"),
    ],
)
def test_a_bad_header_is_refused_by_name(tmp_path, header, says):
    path = write(tmp_path / "bad.safetensors", header)
    with pytest.raises(UserError, match=r"bad\.safetensors") as error:
        SafetensorsFile(path)
    assert says in str(error.value)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 0, 1])
def test_a_false_header_length_is_refused(tmp_path, length):
    with pytest.raises(UserError, match="header"):
        SafetensorsFile(write(tmp_path / "x.safetensors", GOOD, length=length))


@pytest.mark.parametrize("keep", [0, 7, 8, 20, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = write(tmp_path / "x.safetensors", GOOD)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"x\.safetensors"):
        SafetensorsFile(path)


def accepts(path):
    """What the safetensors library makes of a file: its names, or None."""
    try:
        with safe_open(path, "pt") as file:
            return sorted(file.keys())
    except (SafetensorError, OSError):
        return None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["F32", "F16", "BF16", "I64"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "U8", "X"]),
        "shape": st.lists(st.integers(0, 4), max_size=3),
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2),
    }
)
headers = st.one_of(
    st.binary(max_size=80),
    json_values.map(lambda v: json.dumps(v).encode()),
    st.dictionaries(st.text(max_size=3), entries, max_size=4).map(lambda v: json.dumps(v).encode()),
)


@given(text=headers, data=st.binary(max_size=40), length=st.none() | st.integers(0, 2**64 - 1))
@settings(max_examples=400, deadline=None)
def test_fuzz_no_stranger_than_the_library(text, data, length, tmp_path_factory):
    """Whatever the bytes: a UserError, or an opening that the library agrees with, every tensor of it readable."""
    path = tmp_path_factory.mktemp("f") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    try:
        file = SafetensorsFile(path)
    except UserError:
        return
    assert accepts(path) == sorted(file.names())
    for name in file.names():
        file.read(name)


@given(shapes=st.dictionaries(st.text(min_size=1, max_size=4), st.lists(st.integers(0, 3), max_size=3), max_size=5))
@settings(max_examples=60, deadline=None)
def test_our_header_is_the_librarys(shapes, tmp_path_factory):
    shapes.pop("__metadata__", None)
    header, offsets, size = build_header({name: ("F32", tuple(shape)) for name, shape in shapes.items()})
    path = tmp_path_factory.mktemp("h") / "x.safetensors"
    path.write_bytes(header + b"\0" * (size - len(header)))
    assert accepts(path) == sorted(shapes)
    assert SafetensorsFile(path).names() == list(shapes) == list(offsets)


def test_a_slice_reads_its_own_bytes_and_no_more(tmp_path, monkeypatch):
    tensor = torch.randn(64, 8192)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    read = []
    real = RawFile.read_into
    monkeypatch.setattr(RawFile, "read_into", lambda self, at, out: (read.append(len(out)), real(self, at, out))[1])
    for index in [(slice(16, 32),), (slice(0, 64), slice(4096, 8192)), (slice(60, 64), slice(0, 2048))]:
        read.clear()
        part = file.read("x", index)
        assert torch.equal(part, tensor[index])
        assert sum(read) == 4 * part.numel()
