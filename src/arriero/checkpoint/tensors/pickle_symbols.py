"""Interprets a pickle symbolically: a global becomes its name, a call a record of the call; nothing is run."""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from arriero.checkpoint.tensors.stream import ITEMSIZE, TORCH_NAMES
from arriero.common.errors import UserError
from arriero.common.text import escape

MAX_PICKLE_BYTES = 256 << 20  # structure only; the weights are in records of their own
MAX_NODES = 1_000_000  # a few KB of pickle can describe a tree of any size by naming one branch again and again

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "Float8_e4m3fnStorage": "F8_E4M3", "Float8_e5m2Storage": "F8_E5M2", "UntypedStorage": "U8",
}  # fmt: skip
TORCH_DTYPES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
_FAMILIES = (
    "torch", "numpy", "megatron", "mindspeed", "ascendspeed", "modellink", "deepspeed", "transformer_engine", "torchao",
    "transformers", "accelerate", "peft", "lightning", "lightning_fabric", "pytorch_lightning", "omegaconf",
)  # fmt: skip
_PLAIN_TENSORS = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
_INERT = {
    "argparse.Namespace", "collections.OrderedDict", "collections.defaultdict", "signal.Signals", "_codecs.encode",
    "builtins.set", "builtins.dict", "builtins.list", "builtins.int", "builtins.slice", "builtins.bytearray",
    "io.BytesIO", "_io.BytesIO", "types.SimpleNamespace", "pathlib.PosixPath", "copyreg._reconstructor",
    "builtins.object", "builtins.bytes", "__builtin__.bytes", "__builtin__.set", "__builtin__.object",
    "copy_reg._reconstructor",
    "datetime.timedelta", "functools.partial",
}  # fmt: skip
FIX = "do not load this file with other tools either, unless you trust who made it"


@dataclass(frozen=True)
class Global:
    """A name that the pickle would import."""

    name: str


@dataclass(eq=False)  # hashed by identity: some checkpoints use objects as keys
class Call:
    """A call that the pickle would make, and the state it would set."""

    function: Any
    args: Any
    state: Any = None


@dataclass(frozen=True)
class StorageRef:
    """A persistent id: a storage in record `data/key`."""

    dtype: str
    key: str
    elements: int


@dataclass
class TensorRef:
    """A tensor as a view of a storage."""

    storage: StorageRef
    offset: int  # elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]


_Mark = object()


@dataclass
class _PickleMachine:
    """The pickle machine over symbols: a stack, a memo, and no imports."""

    where: str
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def pop_to_mark(self) -> list[Any]:
        items = []
        while (top := self.stack.pop()) is not _Mark:
            items.append(top)
        return items[::-1]

    def pop_last(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        del self.stack[-count:]
        return items


def _allowed_global(module: str, name: str, where: str) -> Global:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise ValueError("a global whose name is no text")
    full = f"{module}.{name}"
    if module.partition(".")[0] not in _FAMILIES and full not in _INERT:
        raise UserError(f"{where}: the pickle asks for {escape(full)}, which no checkpoint needs", FIX)
    return Global(full)


def _hashable_key(key: Any) -> Any:
    """A dictionary's key: hashing a nest of shared tuples would take for ever, and no checkpoint has one."""
    plain = key is None or isinstance(key, (str, bytes, int, float, Call, Global, StorageRef))
    if plain or (isinstance(key, tuple) and len(key) < 100 and not any(isinstance(k, (tuple, list)) for k in key)):
        return key
    raise ValueError("a key that is no plain value")


def non_negative_ints(values: Any) -> tuple[int, ...]:
    """A shape or an offset. Raises ValueError for anything but whole numbers from 0, such as nested tuples."""
    if not isinstance(values, (tuple, list)) or not all(type(n) is int and 0 <= n < 2**63 for n in values):
        raise ValueError("a shape that is none")
    return tuple(values)


def _call(function: Any, args: Any) -> Any:  # noqa: PLR0911 - one a function
    name = function.name if isinstance(function, Global) else ""
    if name in ("collections.OrderedDict", "builtins.dict"):
        pairs = args[0].items() if args and isinstance(args[0], dict) else args[0] if args else ()
        return {_hashable_key(key): value for key, value in pairs}
    if name == "torch._utils._rebuild_tensor_v2":
        if not isinstance(args[0], StorageRef):
            raise ValueError("a tensor without a storage")
        return TensorRef(
            args[0], non_negative_ints([args[1]])[0], non_negative_ints(args[2]), non_negative_ints(args[3])
        )
    if name == "torch._utils._rebuild_tensor_v3":  # dtypes that have no storage class, such as float8
        return _typed_tensor(args[0], args[1], args[2], args[3], dtype=args[6])
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return args[0]
    if name == "torch._tensor._rebuild_from_type_v2" and getattr(args[1], "name", "") in _PLAIN_TENSORS:
        return _call(args[0], args[2])
    if name == "torch.Size":
        return non_negative_ints(args[0])
    if name.endswith("Path"):
        return "/".join(args)  # only of strings
    return Call(function, args)


def _typed_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *, dtype: Any) -> TensorRef:
    kind = TORCH_DTYPES.get(dtype.name.removeprefix("torch.")) if isinstance(dtype, Global) else None
    if not isinstance(storage, StorageRef) or kind is None:
        raise ValueError("a tensor of an unknown dtype")
    typed = StorageRef(kind, storage.key, storage.elements // ITEMSIZE[kind])
    return TensorRef(typed, non_negative_ints([offset])[0], non_negative_ints(shape), non_negative_ints(stride))


def _pairs(items: list[Any]) -> dict[Any, Any]:
    """A dictionary of keys and values in turn."""
    return dict(zip(map(_hashable_key, items[::2]), items[1::2], strict=True))


def _add(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, set):
        target.update(map(_hashable_key, items))
    elif isinstance(target, dict):
        target.update(_pairs(items))


def _storage(pid: Any, where: str) -> StorageRef:
    match pid:
        case ("storage", Global(name), str(key), _, int(elements)) if name.rsplit(".", 1)[-1] in STORAGES:
            return StorageRef(STORAGES[name.rsplit(".", 1)[-1]], key, elements)
    kind = pid[1] if isinstance(pid, tuple) and len(pid) > 1 and isinstance(pid[1], Global) else type(pid).__name__
    name, fix = kind.name if isinstance(kind, Global) else kind, "save it again with a recent torch"
    if re.search(r"\.QU?Int\w*Storage$", name):
        fix = "these are quantized weights: save the model dequantized"
    raise UserError(f"{where}: holds an unknown kind of storage: {escape(name, 80)}", fix)


def parse_symbolically(data: bytes, where: str) -> Any:
    """The object that a pickle describes, with symbols where it would import or call.

    Raises:
        UserError: the pickle is broken, too deep, or asks for a global outside the known families.
    """
    machine = _PickleMachine(where)
    try:
        for opcode, arg, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.stack.pop()
            _step(machine, opcode.name, arg)
    except UserError:
        raise
    except Exception as error:  # whatever a malicious or broken stream raises
        raise UserError(f"{where}: the pickle is broken ({type(error).__name__})", "fetch the file again") from None
    raise UserError(f"{where}: the pickle ends early", "fetch the file again")


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_DICT": dict, "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple, "EMPTY_SET": set, "MARK": lambda: _Mark,
}  # fmt: skip
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "BINSTRING", "SHORT_BINSTRING", "STRING", "BYTEARRAY8",
}  # fmt: skip
_IGNORED = {"PROTO", "FRAME"}


def _step(m: _PickleMachine, op: str, arg: Any) -> None:  # noqa: PLR0912 - one arm an opcode
    stack, pop = m.stack, m.stack.pop
    if op in _LITERALS:
        stack.append(arg)
    elif op in _CONSTANTS:
        stack.append(_CONSTANTS[op]())
    elif op in ("BINGET", "LONG_BINGET", "GET"):
        stack.append(m.memo[int(arg)])
    elif op in ("BINPUT", "LONG_BINPUT", "PUT"):
        m.memo[int(arg)] = stack[-1]
    elif op == "MEMOIZE":
        m.memo[len(m.memo)] = stack[-1]
    elif op == "GLOBAL":
        module, _, name = arg.partition(" ")
        stack.append(_allowed_global(module, name, m.where))
    elif op == "STACK_GLOBAL":
        name, module = pop(), pop()
        stack.append(_allowed_global(module, name, m.where))
    elif op in ("REDUCE", "NEWOBJ"):
        args, function = pop(), pop()
        stack.append(_call(function, args))
    elif op == "NEWOBJ_EX":
        kwargs, args, function = pop(), pop(), pop()
        stack.append(Call(function, (args, kwargs)))
    elif op == "BUILD":
        state = pop()
        if isinstance(stack[-1], Call):
            stack[-1].state = state
    elif op == "BINPERSID":
        stack.append(_storage(pop(), m.where))
    elif op in ("TUPLE", "LIST", "DICT", "FROZENSET"):
        items = m.pop_to_mark()
        stack.append(_pairs(items) if op == "DICT" else items if op == "LIST" else tuple(items))
    elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
        stack.append(tuple(m.pop_last(int(op[-1]))))
    elif op in ("APPEND", "SETITEM"):
        items = m.pop_last(1 if op == "APPEND" else 2)
        _add(stack[-1], items)
    elif op in ("APPENDS", "SETITEMS", "ADDITEMS"):
        items = m.pop_to_mark()
        _add(stack[-1], items)
    elif op == "POP":
        pop()
    elif op not in _IGNORED:
        raise UserError(f"{m.where}: uses the pickle opcode {op}, which torch.save does not", "fetch the file again")
