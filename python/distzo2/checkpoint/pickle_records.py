"""What `torch.save` writes about a state dict, read without a pickle machine: nothing is imported, called or built that
the stream names.

A pickle stream is a program for a stack machine. This one knows the few instructions that describe dictionaries of
tensors, and stands symbols for the classes and functions of the rest. Whatever the stream says, reading it ends in
plain values or in a ValueError, and takes memory in proportion to its length: the memo is a dictionary, since the
standard one is an array that a single instruction can make as large as it likes.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

_MARK = object()


class Global(NamedTuple):
    """A class or function, by name only."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:80]


class _Object:
    """An object that the stream builds of a class that holds nothing of interest; `items` are those of a mapping."""

    def __init__(self) -> None:
        self.items: dict[Any, Any] = {}


def read_records(
    stream: bytes, call: Callable[[Global, tuple], Any], storage: Callable[[tuple], Any]
) -> dict[Any, Any] | Any:
    """The value that a pickle stream describes, its mappings as dicts.

    Args:
        call: makes the value of a function applied to arguments. It must refuse what it does not know (ValueError).
        storage: makes the value of a persistent id.

    Raises:
        ValueError: the stream is damaged, or uses an instruction, a class or a function that it should not.
    """
    machine = _Machine(call, storage)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return _plain(machine.pop())
            machine.run(opcode.name, argument)
    except (IndexError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"the description of the tensors is damaged: {type(error).__name__}") from None
    raise ValueError("the description of the tensors has no end")


class _Machine:
    def __init__(self, call: Callable[[Global, tuple], Any], storage: Callable[[tuple], Any]) -> None:
        self._call, self._storage = call, storage
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def pop(self) -> Any:
        return self._stack.pop()

    def _pop_mark(self) -> list[Any]:
        items = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        items.reverse()
        return items

    def run(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _PUSHED:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            stack.append(Global(module, attribute))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            if not isinstance(attribute, str) or not isinstance(module, str):
                raise TypeError
            stack.append(Global(module, attribute))
        elif name == "TUPLE":
            stack.append(tuple(self._pop_mark()))
        elif name in _TUPLES:
            count = _TUPLES[name]
            items = tuple(stack[-count:])
            if len(items) < count:
                raise IndexError
            del stack[-count:]
            stack.append(items)
        elif name == "BINPERSID":
            stack.append(self._storage(_a_tuple(stack.pop())))
        elif name == "REDUCE":
            arguments, function = _a_tuple(stack.pop()), stack.pop()
            stack.append(self._apply(function, arguments))
        elif name == "BUILD":
            stack.pop()  # attributes of an object: a state dict's hold the versions of its modules
            if not isinstance(stack[-1], _Object):
                raise ValueError("something other than a dictionary has attributes")
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self._set(stack[-1], [key, value])
        elif name == "SETITEMS":
            items = self._pop_mark()
            self._set(stack[-1], items)
        elif name == "APPEND":
            value = stack.pop()
            stack[-1].append(value) if type(stack[-1]) is list else self._refuse(stack[-1])
        elif name == "APPENDS":
            items = self._pop_mark()
            stack[-1].extend(items) if type(stack[-1]) is list else self._refuse(stack[-1])
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"instruction {name} has no place in a file of weights")

    def _apply(self, function: Any, arguments: tuple) -> Any:
        if not isinstance(function, Global):
            raise TypeError
        if function == ("collections", "OrderedDict"):
            if arguments not in ((), ([],)):
                raise ValueError("collections.OrderedDict has arguments")
            return _Object()
        return self._call(function, arguments)

    def _set(self, target: Any, items: list[Any]) -> None:
        mapping = target.items if isinstance(target, _Object) else target
        if type(mapping) is not dict or len(items) % 2:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int)):
                raise ValueError("a key of a dictionary is no text")
            mapping[key] = value

    @staticmethod
    def _refuse(target: Any) -> None:
        raise ValueError(f"{type(target).__name__} is appended to")


_PUSHED = {
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT",
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "MARK": lambda: _MARK,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _a_tuple(value: Any) -> tuple:
    if type(value) is not tuple:
        raise TypeError
    return value


def _plain(value: Any) -> Any:
    return value.items if isinstance(value, _Object) else value
