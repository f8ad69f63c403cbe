"""The pickle inside a file of torch.save, read by an interpreter that calls nothing."""

import dataclasses
import mmap
import pickletools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

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
    }
)
_DTYPES = ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8")
_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_ALLOWED = {_DICT, _TENSOR, _PARAMETER, *_STORAGES, "torch.bool", *(f"torch.{d}" for d in _DTYPES)}

_NOTHING = ("PROTO", "FRAME")
_VALUES = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
)
_CONSTANTS = MappingProxyType({"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()})
_SHORT_TUPLES = MappingProxyType({"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3})


@dataclasses.dataclass(frozen=True)
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


@dataclasses.dataclass(frozen=True)
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
        sizes = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or any(s < 0 for s in sizes):
            raise ValueError(
                f"a tensor has shape {self.shape}, strides {self.strides} and offset {self.offset}"
            )
        reach = sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        if 0 not in self.shape and self.offset + reach >= self.storage.size:
            raise ValueError(
                f"a tensor of shape {self.shape} reaches outside its storage "
                f"of {self.storage.size} elements"
            )


@dataclasses.dataclass(frozen=True)
class _Global:
    name: str


class _Mark:
    pass


def read_pickle(data: bytes | mmap.mmap) -> Any:
    """Return what a pickle of torch.save holds: dictionaries, lists, numbers, text and tensors.

    Args:
        data: the pickle, or a file that is read up to its end.

    Returns:
        Its content, tensors as `Tensor`, dictionaries of all kinds as ``dict``.

    Raises:
        ValueError: if it is damaged, or names a function or class that no state dict needs.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument in _opcodes(data):
            _step(opcode, argument, stack, memo)
    except (IndexError, KeyError) as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__}: {error})") from None
    if len(stack) != 1:
        raise ValueError(f"its pickle is damaged: it leaves {len(stack)} values")
    return stack[0]


def _opcodes(data: bytes | mmap.mmap) -> Iterator[tuple[str, Any]]:
    readable: Any = data
    try:
        for opcode, argument, _ in pickletools.genops(readable):
            if opcode.name != "STOP":
                yield opcode.name, argument
    # pickletools warns of odd escapes, which is an error where warnings are.
    except (ValueError, OverflowError, Warning) as error:
        raise ValueError(f"its pickle is damaged ({error})") from None


def _step(opcode: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """Carry one opcode out on the stack and the memo."""
    if opcode in _NOTHING:
        return
    if opcode in _VALUES:
        stack.append(argument)
    elif opcode in _CONSTANTS:
        stack.append(_CONSTANTS[opcode])
    elif opcode in ("EMPTY_DICT", "EMPTY_LIST"):
        stack.append({} if opcode == "EMPTY_DICT" else [])
    elif opcode == "MARK":
        stack.append(_Mark())
    elif opcode in _SHORT_TUPLES:
        count = _SHORT_TUPLES[opcode]
        stack.append(tuple([stack.pop() for _ in range(count)][::-1]))
    elif opcode in ("TUPLE", "LIST"):
        items = _after_mark(stack)
        stack.append(tuple(items) if opcode == "TUPLE" else items)
    elif opcode in ("APPEND", "APPENDS"):
        items = [stack.pop()] if opcode == "APPEND" else _after_mark(stack)
        _expect(list, stack[-1]).extend(items)
    elif opcode == "SETITEM":
        value, key = stack.pop(), stack.pop()
        _set_items(stack[-1], [key, value])
    elif opcode in ("SETITEMS", "DICT"):
        items = _after_mark(stack)
        if opcode == "DICT":
            stack.append({})
        _set_items(stack[-1], items)
    elif opcode in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
        memo[len(memo) if opcode == "MEMOIZE" else argument] = stack[-1]
    elif opcode in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif opcode == "GLOBAL":
        stack.append(_allowed(argument.replace(" ", ".")))
    elif opcode == "STACK_GLOBAL":
        name, module = _expect(str, stack.pop()), _expect(str, stack.pop())
        stack.append(_allowed(f"{module}.{name}"))
    elif opcode == "BINPERSID":
        stack.append(_storage(_expect(tuple, stack.pop())))
    elif opcode == "REDUCE":
        arguments = _expect(tuple, stack.pop())
        stack.append(_made(_expect(_Global, stack.pop()), arguments))
    elif opcode == "BUILD":
        # The attributes of an ordered dictionary: versions of modules, which nobody needs here.
        stack.pop()
        _expect(dict, stack[-1])
    elif opcode == "INST":
        raise ValueError(f"its pickle asks for {argument.replace(' ', '.')}, which is refused")
    else:
        raise ValueError(f"its pickle has the opcode {opcode}, which torch.save does not write")


def _allowed(name: str) -> _Global:
    if name not in _ALLOWED:
        raise ValueError(
            f"its pickle asks for {name}, which is refused: only tensors in dictionaries are read. "
            "Save model.state_dict() alone, with torch.save or as .safetensors"
        )
    return _Global(name)


def _made(maker: _Global, arguments: tuple[Any, ...]) -> Any:
    """Return what a call of an allowed global stands for."""
    if maker.name == _DICT and not arguments:
        return {}
    if maker.name == _PARAMETER and arguments:
        return _expect(Tensor, arguments[0])
    if maker.name == _TENSOR and len(arguments) >= 4:
        storage, offset, shape, strides = arguments[:4]
        for number in (offset, *_expect(tuple, shape), *_expect(tuple, strides)):
            _expect(int, number)
        return Tensor(_expect(Storage, storage), offset, shape, strides)
    raise ValueError(f"its pickle calls {maker.name} in a way that torch.save does not")


def _storage(reference: tuple[Any, ...]) -> Storage:
    # Files from before torch 1.6 have one value more, for views, which nothing has used since 0.4.
    if len(reference) != 5 and (len(reference) != 6 or reference[5] is not None):
        raise ValueError(f"its pickle is damaged: {len(reference)} values refer to a storage")
    kind, dtype, key, _, size = reference[:5]
    name = _expect(_Global, dtype).name
    if kind != "storage" or name not in _STORAGES:
        raise ValueError(f"its pickle refers to a {kind} of {name}, which torch.save does not")
    return Storage(_expect(str, key), _STORAGES[name], _expect(int, size))


def _after_mark(stack: list[Any]) -> list[Any]:
    items = []
    while not isinstance(item := stack.pop(), _Mark):
        items.append(item)
    return items[::-1]


def _set_items(target: Any, items: list[Any]) -> None:
    keys = items[::2]
    for key in keys:
        if type(key) not in (str, int):
            raise ValueError(f"a key of a dictionary is of type {type(key).__name__}, not text")
    _expect(dict, target).update(zip(keys, items[1::2], strict=True))


def _expect(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        wanted, found = kind.__name__.strip("_"), type(value).__name__.strip("_")
        raise ValueError(f"its pickle has {found} in place of {wanted}")
    return value
