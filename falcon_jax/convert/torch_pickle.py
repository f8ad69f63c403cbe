"""The pickle inside a file of torch.save, read by an interpreter that calls nothing.

What is no tensor, number, text or plain container becomes an `Inert` placeholder: its class is not
imported, nothing of it is called, and what the pickle would put into it is dropped.
"""

import dataclasses
import mmap
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from falcon_jax.wording import shown

_STORAGES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "torch.HalfStorage": np.dtype(np.float16),
        "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
        "torch.FloatStorage": np.dtype(np.float32),
        "torch.DoubleStorage": np.dtype(np.float64),
        "torch.CharStorage": np.dtype(np.int8),
        "torch.ShortStorage": np.dtype(np.int16),
        "torch.IntStorage": np.dtype(np.int32),
        "torch.LongStorage": np.dtype(np.int64),
        "torch.ByteStorage": np.dtype(np.uint8),
        "torch.BoolStorage": np.dtype(np.bool_),
        # Only to know how long they are, so that they can be skipped.
        "torch.ComplexFloatStorage": np.dtype("V8"),
        "torch.ComplexDoubleStorage": np.dtype("V16"),
        "torch.QInt8Storage": np.dtype("V1"),
        "torch.QUInt8Storage": np.dtype("V1"),
        "torch.QInt32Storage": np.dtype("V4"),
        "torch.storage.UntypedStorage": np.dtype("V1"),
    }
)
_DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "torch.uint16": np.dtype(np.uint16),
        "torch.uint32": np.dtype(np.uint32),
        "torch.uint64": np.dtype(np.uint64),
        "torch.float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
        "torch.float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    }
)
_DICTS = ("collections.OrderedDict", "builtins.dict", "__builtin__.dict")
_DEFAULT_DICT = "collections.defaultdict"
_TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_TENSOR_OF_TYPE = "torch._utils._rebuild_tensor_v3"
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_FROM_TYPE = ("torch._tensor._rebuild_from_type", "torch._tensor._rebuild_from_type_v2")
_PLAIN_TENSORS = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")

_MOST_AXES = 64
# What is rare, or makes an object, costs more, so that time and memory are bounded.
_LARGEST_COST = 2**22
_COSTS = MappingProxyType(
    dict.fromkeys(b"N\x88\x89)JKMGqrhjXTU\x8c\x8d\x85\x86\x87", 1)
    | dict.fromkeys(b"RioQPcBC\x81\x8e\x8f\x91\x92\x93\x96", 8)
)
_LONGEST_NUMBER = 16
_LONGEST_LINE = 2**16


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """Where the numbers of tensors lie.

    Attributes:
        key: name of its entry in the archive.
        dtype: of its elements.
        size: how many there are.
    """

    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """A view of a storage that it does not leave.

    Attributes:
        storage: what is viewed.
        offset: of the first element.
        shape: numbers of elements.
        strides: steps between them, in elements.

    Raises:
        ValueError: if an element would lie outside.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self):
        if max(len(self.shape), len(self.strides)) > _MOST_AXES:
            raise ValueError(f"a tensor of more than {_MOST_AXES} axes")
        sizes = (self.offset, *self.shape, *self.strides)
        if any(type(s) is not int for s in sizes):
            raise ValueError("a tensor whose shape and strides are no integers")
        if len(self.shape) != len(self.strides) or any(s < 0 for s in sizes):
            raise ValueError(
                f"a tensor that has shape {shown(self.shape)}, strides {shown(self.strides)} and "
                f"offset {self.offset}"
            )
        reach = sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        if 0 not in self.shape and self.offset + reach >= self.storage.size:
            raise ValueError(
                f"a tensor of shape {shown(self.shape)} that reaches outside its storage "
                f"of {self.storage.size} elements"
            )


@dataclasses.dataclass(slots=True, eq=False)
class Inert:
    """What stands for anything that is not read.

    Attributes:
        what: a few words on it, such as the name of its class.
        is_model: whether it is a module of PyTorch with its weights.
    """

    what: str
    is_model: bool = False

    def __str__(self) -> str:
        return self.what


class _Global(Inert):
    """A function or class, by name, which is never looked up."""


@dataclasses.dataclass(frozen=True, slots=True)
class Unpickled:
    """What a pickle holds.

    Attributes:
        content: containers, numbers and text, tensors as `Tensor`, dictionaries of all kinds as
            ``dict``, anything else as `Inert`.
        storages: all that it refers to, by key.
        end: where the pickle ends in the data.
    """

    content: Any
    storages: Mapping[str, Storage]
    end: int


def read_pickle(data: bytes | mmap.mmap, start: int = 0) -> Unpickled:
    """Return what a pickle of torch.save holds.

    Args:
        data: the pickle, or a file in which there is one.
        start: of the pickle in the data.

    Raises:
        ValueError: if it is damaged, or takes too long to read for what it can hold.
    """
    reader = _Reader(data, start)
    try:
        reader.run()
    except (IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__})") from None
    if len(reader.stack) != 1:
        raise ValueError(f"its pickle is damaged: it leaves {len(reader.stack)} values")
    return Unpickled(reader.stack[0], reader.storages, reader.position)


_SCALARS = MappingProxyType(
    {
        b"J"[0]: struct.Struct("<i"),
        b"K"[0]: struct.Struct("<B"),
        b"M"[0]: struct.Struct("<H"),
        b"G"[0]: struct.Struct(">d"),
    }
)
_CONSTANTS = MappingProxyType({b"N"[0]: None, 0x88: True, 0x89: False, b")"[0]: ()})
# Opcodes followed by a length of so many bytes, then by text or bytes of that length.
_TEXTS = MappingProxyType({b"X"[0]: 4, 0x8C: 1, 0x8D: 8, b"T"[0]: 4, b"U"[0]: 1})
_BYTES = MappingProxyType({b"B"[0]: 4, b"C"[0]: 1, 0x8E: 8, 0x96: 8})
_TUPLES = MappingProxyType({0x85: 1, 0x86: 2, 0x87: 3})
_EMPTY: Mapping[int, type[Any]] = MappingProxyType({b"]"[0]: list, b"}"[0]: dict})
_EXTENSIONS = MappingProxyType({0x82: 1, 0x83: 2, 0x84: 4})
_MEMO_SIZES = MappingProxyType({b"q"[0]: 1, b"r"[0]: 4, b"h"[0]: 1, b"j"[0]: 4})


class _Reader:
    def __init__(self, data: bytes | mmap.mmap, start: int):
        self.data = data
        self.position = start
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.cost = 0

    def run(self) -> None:
        data, stack, costs = self.data, self.stack, _COSTS
        end = len(data)
        while self.position < end:
            code = data[self.position]
            self.position += 1
            self.cost += costs.get(code, 3)
            if self.cost > _LARGEST_COST:
                raise ValueError(
                    "its pickle has more parts than a checkpoint has. Save model.state_dict() alone"
                )
            if code == b"."[0]:
                return
            if code in _CONSTANTS:
                stack.append(_CONSTANTS[code])
            elif code in _SCALARS:
                number = _SCALARS[code]
                stack.append(number.unpack(self.take(number.size))[0])
            elif code in _MEMO_SIZES:
                index = self.number(_MEMO_SIZES[code])
                if code in b"qr":
                    self.memo[index] = stack[-1]
                else:
                    stack.append(self.memo[index])
            elif code in _TEXTS:
                text = self.take(self.number(_TEXTS[code]))
                stack.append(_old_text(text) if code in b"TU" else _text(text))
            elif code in _TUPLES:
                stack.append(self.pop_many(_TUPLES[code]))
            elif code in _EMPTY:
                stack.append(_EMPTY[code]())
            elif code == b"("[0]:
                self.marks.append(len(stack))
            elif code == b"a"[0] and isinstance(stack[-2], list):
                stack[-2].append(stack.pop())
            elif code == b"0"[0]:
                stack.pop()
            elif code == b"2"[0]:
                stack.append(stack[-1])
            else:
                self.step(code)
        raise ValueError("its pickle is damaged: it is truncated")

    def step(self, code: int) -> None:
        """Carry out an opcode that is not among the most frequent ones."""
        stack, name = self.stack, bytes([code])
        if name == b"t":
            stack.append(tuple(self.after_mark()))
        elif name == b"l":
            stack.append(self.after_mark())
        elif name == b"d":
            items = self.after_mark()
            stack.append({})
            _set_items(stack[-1], items)
        elif name == b"s":
            _set_items(stack[-3], self.pop_many(2))
        elif name == b"u":
            items = self.after_mark()
            _set_items(stack[-1], items)
        elif name in (b"a", b"e"):
            items = [stack.pop()] if name == b"a" else self.after_mark()
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
            else:
                _expect_inert(stack[-1])
        elif name == b"\x94":
            self.memo[len(self.memo)] = stack[-1]
        elif name == b"p":
            self.memo[self.small(self.line())] = stack[-1]
        elif name == b"g":
            stack.append(self.memo[self.small(self.line())])
        elif name == b"c":
            stack.append(_Global(_joined(_text(self.line()), _text(self.line()))))
        elif name == b"\x93":
            module, attribute = self.pop_many(2)
            if not (isinstance(module, str) and isinstance(attribute, str)):
                raise ValueError("its pickle is damaged: the name of a class is no text")
            stack.append(_Global(_joined(module, attribute)))
        elif name in (b"Q", b"P"):
            reference = stack.pop() if name == b"Q" else _text(self.line())
            stack.append(self.persistent(reference))
        elif name in (b"R", b"\x81"):
            maker, arguments = self.pop_many(2)
            stack.append(self.made(maker, arguments))
        elif name == b"\x92":
            maker, arguments, _ = self.pop_many(3)
            stack.append(self.made(maker, arguments))
        elif name == b"o":
            items = self.after_mark()
            stack.append(self.made(items[0], tuple(items[1:])))
        elif name == b"i":
            maker = _Global(_joined(_text(self.line()), _text(self.line())))
            stack.append(self.made(maker, tuple(self.after_mark())))
        elif name == b"b":
            state = stack.pop()
            if isinstance(state, dict) and "_parameters" in state and "_modules" in state:
                _expect_inert(stack[-1]).is_model = True
        elif name == b"\x80":
            self.take(1)
        elif name == b"\x95":
            self.take(8)
        else:
            self.rare(code)

    def rare(self, code: int) -> None:
        """Carry out an opcode of old protocols, or one whose value does not matter."""
        stack, name = self.stack, bytes([code])
        if name in (b"\x8a", b"\x8b"):
            data = self.take(self.number(1 if name == b"\x8a" else 4))
            long = len(data) > _LONGEST_NUMBER
            stack.append(
                Inert("a long number") if long else int.from_bytes(data, "little", signed=True)
            )
        elif name in (b"I", b"L"):
            line = self.line()
            stack.append({b"00": False, b"01": True}.get(line))
            if stack[-1] is None:
                stack[-1] = self.small(line.removesuffix(b"L"))
        elif name == b"F":
            line = self.line()
            try:
                stack.append(float(line))
            except ValueError:
                raise ValueError("its pickle is damaged: a number is none") from None
        elif name == b"S":
            stack.append(_old_text(self.line().strip(b"'\"")))
        elif name == b"V":
            stack.append(_old_text(self.line()))
        elif code in _BYTES:
            size = self.number(_BYTES[code])
            self.skip(size)
            stack.append(Inert("bytes"))
        elif name == b"\x8f":
            stack.append(Inert("a set"))
        elif name == b"\x90":
            self.after_mark()
        elif name == b"\x91":
            self.after_mark()
            stack.append(Inert("a set"))
        elif name == b"1":
            self.after_mark()
        elif name == b"\x97":
            stack.append(Inert("bytes"))
        elif name == b"\x98":
            pass
        elif code in _EXTENSIONS:
            self.take(_EXTENSIONS[code])
            stack.append(_Global("an extension"))
        else:
            raise ValueError(f"its pickle is damaged: there is no opcode {code}")

    def skip(self, size: int) -> None:
        if size > len(self.data) - self.position:
            raise ValueError("its pickle is damaged: it is truncated")
        self.position += size

    def take(self, size: int) -> bytes:
        start = self.position
        self.skip(size)
        return self.data[start : self.position]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def line(self) -> bytes:
        start = self.position
        stop = self.data.find(b"\n", start, start + _LONGEST_LINE)
        if stop < 0:
            raise ValueError("its pickle is damaged: a line does not end")
        self.position = stop + 1
        return self.data[start:stop]

    def small(self, line: bytes) -> int:
        """Return a decimal number of no more bytes than `_LONGEST_NUMBER` when binary."""
        digits = line.removeprefix(b"-")
        if not digits.isdigit() or len(digits) > 2 * _LONGEST_NUMBER:
            raise ValueError("its pickle is damaged: a number is none")
        return int(line)

    def pop_many(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise IndexError
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        return items

    def after_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def persistent(self, reference: Any) -> Any:
        """Return the storage, or the class of a module, that is kept outside the pickle."""
        if not isinstance(reference, tuple) or len(reference) not in (4, 5, 6):
            raise ValueError("its pickle is damaged: a reference is to no storage")
        if reference[0] == "module":
            return reference[1]
        if len(reference) == 4 or reference[0] != "storage":
            raise ValueError("its pickle is damaged: a reference is to no storage")
        _, kind, key, _, size = reference[:5]
        if not isinstance(key, str) or type(size) is not int or not 0 <= size < 2**63:
            raise ValueError("its pickle is damaged: a storage has no key or no size")
        dtype = _STORAGES.get(str(kind)) if isinstance(kind, _Global) else None
        if dtype is None:
            return Inert(f"in a storage of {shown(kind)}")
        storage = Storage(key, dtype, size)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"it is damaged: two storages have one key, {shown(key)}")
        # Views of storages have not been in use since PyTorch 0.4.
        if len(reference) == 6 and reference[5] is not None:
            return Inert("in a view of a storage")
        return storage

    def made(self, maker: Any, arguments: Any) -> Any:
        """Return what a call stands for."""
        name = str(maker) if isinstance(maker, _Global) else ""
        given = arguments if isinstance(arguments, tuple) else ()
        if name in _DICTS or name == _DEFAULT_DICT:
            return self.dictionary(given[name == _DEFAULT_DICT :])
        if name in _PARAMETERS and given and isinstance(given[0], (Tensor, Inert)):
            return given[0]
        if name in (*_TENSORS, _TENSOR_OF_TYPE):
            return _tensor(name, given)
        if name in _FROM_TYPE and len(given) >= 3 and isinstance(given[0], _Global):
            kind, inner = given[1], given[0].what
            if str(kind) in _PLAIN_TENSORS and inner not in _FROM_TYPE:
                return self.made(given[0], given[2])
            return Inert(f"a tensor of type {shown(kind)}")
        return Inert(name or "the result of a call")

    def dictionary(self, arguments: tuple[Any, ...]) -> Any:
        """Return the dictionary made of nothing, of another one, or of a list of pairs."""
        content: dict[Any, Any] = {}
        if arguments:
            items = arguments[0]
            pairs = items.items() if isinstance(items, dict) else items
            if isinstance(pairs, Inert | str | int | float | None):
                return Inert("collections.OrderedDict of something else")
            self.cost += 4 * len(pairs)
            for pair in pairs:
                if not isinstance(pair, list | tuple) or len(pair) != 2:
                    raise ValueError("its pickle is damaged: a dictionary is made of no pairs")
                _set_items(content, pair)
        return content


def _tensor(name: str, arguments: tuple[Any, ...]) -> Any:
    least = 7 if name == _TENSOR_OF_TYPE else 4
    if len(arguments) < least:
        return Inert("a tensor in a form that torch.save does not write")
    storage, offset, shape, strides = arguments[:4]
    if isinstance(storage, Inert):
        return Inert(f"a tensor {storage}")
    if not (
        isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)
    ):
        return Inert("a tensor in a form that torch.save does not write")
    if name == _TENSOR_OF_TYPE:
        dtype = _DTYPES.get(str(arguments[6]))
        if dtype is None or storage.dtype != np.dtype("V1") or storage.size % dtype.itemsize:
            return Inert(f"a tensor of {shown(arguments[6])}")
        storage = Storage(storage.key, dtype, storage.size // dtype.itemsize)
    if storage.dtype.kind == "V" and storage.dtype not in _NAMED_VOIDS:
        return Inert("a tensor of complex or quantized numbers, or of bytes of no type")
    try:
        return Tensor(storage, offset, shape, strides)
    except ValueError as error:
        return Inert(str(error))


# NumPy takes the types of ml_dtypes for plain bytes, too.
_NAMED_VOIDS = (np.dtype(ml_dtypes.bfloat16), *_DTYPES.values())


def _set_items(target: Any, items: Any) -> None:
    """Set keys and values by turns. Keys that are no text become placeholders.

    Their hashes could be made to collide, or take exponentially long.
    """
    if len(items) % 2:
        raise ValueError("its pickle is damaged: a key has no value")
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key if isinstance(key, str) else Inert(shown(key))] = value
    else:
        _expect_inert(target)


def _expect_inert(value: Any) -> Any:
    if not isinstance(value, Inert):
        raise ValueError(f"its pickle is damaged: it fills {shown(value)}")
    return value


def _joined(module: str, attribute: str) -> str:
    return shown(f"{module[:100]}.{attribute[:100]}")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _old_text(data: bytes) -> str:
    """Return a byte string of Python 2, which says nothing on its encoding."""
    return data.decode("latin-1")
