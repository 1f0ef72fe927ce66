"""The pickle machine, with values that can do no harm: it finds the tensors that torch.save described.

A pickle is a program for a stack machine. Here its values are strings, numbers, containers, and descriptions
of tensors. A class or function that it names is a name, never looked up, and what it makes of one is OPAQUE,
but for the few that stand for tensors and their dicts. So callbacks, hyper-parameters and optimizers that a
training framework left in the file do nothing, and need not be installed.

A value may be shared a million times over, so nothing here prints, hashes or walks one of unknown make.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any

MAX_OPERATIONS = 600_000  # 20 000 tensors take 560 000
MAX_NAMES = 50_000  # slow to read, and kept by what uses them again
MAX_NAME = 200  # characters; longer ones are followed no further

_STORED = {
    **{"Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16"},
    **{"Long": "I64", "Int": "I32", "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL"},
    "ComplexFloat": "C64",
}
STORAGES = {f"torch.{name}Storage": dtype for name, dtype in _STORED.items()}
PARAMETERS = tuple(f"torch._utils._rebuild_parameter{ending}" for ending in ("", "_with_state"))
TENSORS = tuple(f"torch._utils._rebuild_tensor{ending}" for ending in ("", "_v2", "_v3"))
UNTYPED = "torch.storage.UntypedStorage"
DTYPES = {"torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2", "torch.uint16": "U16"}


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that a pickle names; never looked up."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A record of numbers: the storage class that wrote it, the record's name, and how many."""

    kind: str
    key: str
    count: Any


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a storage, as the pickle describes it: nothing of it is checked."""

    storage: Storage
    offset: Any
    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: str | None


OPAQUE: Any = object()  # whatever the machine does not follow


class Machine:
    """Runs one program: any one ends soon, in little memory, and touches nothing."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.names = 0

    def run(self, program: bytes) -> Any:
        """What the program leaves. ValueError, LookupError or TypeError for a wrong one."""
        for done, (operation, argument, _) in enumerate(pickletools.genops(program)):
            if done == MAX_OPERATIONS:
                raise ValueError(f"more than {MAX_OPERATIONS} operations")
            self._do(operation, argument)
        return self._pop(1)[0]

    def _pop(self, count: int) -> list[Any]:
        """The topmost values, of those above the last mark."""
        left = len(self.stack) - count
        if left < (self.marks[-1] if self.marks else 0):
            raise ValueError("the stack is empty")
        taken = self.stack[left:]
        del self.stack[left:]
        return taken

    def _pop_mark(self) -> list[Any]:
        """All above the last mark."""
        taken = self._pop(len(self.stack) - self.marks[-1])
        self.marks.pop()
        return taken

    def _do(self, operation: pickletools.OpcodeInfo, argument: Any) -> None:
        stack = self.stack
        match operation.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(operation.name == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(operation.name[-1]))))
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self._pop_mark()))
            case "SETITEM" | "SETITEMS":
                pairs = self._pop(2) if operation.name == "SETITEM" else self._pop_mark()
                self._set(pairs[::2], pairs[1::2])
            case "APPEND" | "APPENDS":
                items = self._pop(1) if operation.name == "APPEND" else self._pop_mark()
                if isinstance(stack[-1], list):
                    stack[-1].extend(items)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "DUP":
                stack.append(stack[-1])
            case "POP" if self.marks and self.marks[-1] == len(stack):
                self._pop_mark()
            case "POP_MARK":
                self._pop_mark()
            case "GLOBAL":
                stack.append(self._name(*argument.partition(" ")[::2]))
            case "STACK_GLOBAL":
                stack.append(self._name(*self._pop(2)))
            case "BINPERSID":
                stack.append(_storage(self._pop(1)[0]))
            case "REDUCE":
                stack.append(_made(*self._pop(2)))
            case "BUILD":  # attributes, of which no value has any
                self._pop(1)
            case _ if argument is not None and not operation.stack_before:  # a string or a number
                stack.append(argument)
            case _:
                self._skip(operation)

    def _name(self, module: Any, name: Any) -> Any:
        """What a class or function of a module is called."""
        self.names += 1
        if self.names > MAX_NAMES:
            raise ValueError(f"more than {MAX_NAMES} names")
        if type(module) is not str or type(name) is not str or len(module) + len(name) > MAX_NAME:
            return OPAQUE
        return Name(f"{module}.{name}")

    def _set(self, keys: list[Any], values: list[Any]) -> None:
        """Entries of the dict on the stack; only names and numbers are keys."""
        if isinstance(self.stack[-1], dict):
            pairs = zip(keys, values, strict=True)
            self.stack[-1].update((key, value) for key, value in pairs if type(key) in (str, int))

    def _skip(self, operation: pickletools.OpcodeInfo) -> None:
        """An operation whose result is not followed."""
        before = operation.stack_before
        if pickletools.markobject in before:
            self._pop_mark()
            before = before[: before.index(pickletools.markobject)]
        self._pop(len(before))
        self.stack.extend(OPAQUE for _ in operation.stack_after)


def _storage(given: Any) -> Any:
    """What torch.save means by ("storage", its class, its record, a device, how many numbers)."""
    if type(given) is not tuple or len(given) != 5 or given[0] != "storage":
        return OPAQUE
    _, kind, key, _, count = given
    return Storage(kind.name, key, count) if isinstance(kind, Name) and type(key) is str else OPAQUE


def _made(function: Any, given: Any) -> Any:
    """What a call makes, if it is one of those that stand for tensors and their dicts."""
    if not isinstance(function, Name) or type(given) is not tuple:
        return OPAQUE
    if function.name == "collections.OrderedDict" and not given:
        return {}
    if function.name in PARAMETERS and given:
        return given[0]
    if function.name not in TENSORS or len(given) < 4:
        return OPAQUE
    storage, offset, shape, stride = given[:4]
    if not isinstance(storage, Storage) or type(shape) is not tuple or type(stride) is not tuple:
        return OPAQUE
    dtype = STORAGES.get(storage.kind)
    if storage.kind == UNTYPED and len(given) > 6 and isinstance(given[6], Name):
        dtype = DTYPES.get(given[6].name)
    return Stored(storage, offset, shape, stride, dtype)
