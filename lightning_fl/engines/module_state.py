"""The Python state that a training step can reach: detects changes and restores it.

A step reads and writes more than the module's tensors: attributes, containers, closures, attributes of functions,
globals of the user's files, random generators. :func:`capture` traverses all of it once.
"""

from __future__ import annotations

import array
import contextvars
import copy
import enum
import functools
import inspect
import io
import logging
import operator
import pickle
import random
import socket
import sys
import threading
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_fl.torch_internals import own_buffers, own_modules, own_parameters

Read = Callable[[Any], list[Any]]
Write = Callable[[Any, list[Any]], Any]

_NUMBERS = (int, float, complex, bool, str, bytes, type(None))
_MISSING = object()
_LIBRARIES = {
    *sys.stdlib_module_names,
    *("lightning", "lightning_fabric", "lightning_fl", "lightning_utilities", "pytorch_lightning", "torchmetrics"),
    *("numpy", "scipy", "torch", "torchaudio", "torchvision"),
    *("accelerate", "huggingface_hub", "peft", "tokenizers", "transformers"),
}
"""Packages whose own functions, classes and globals do not change what a step computes; their objects may."""
_STATELESS = (
    *(type, range, slice, type(...), type(NotImplemented), enum.Enum, logging.Logger),
    *(inspect.Signature, types.ModuleType, types.CodeType, types.GenericAlias, types.UnionType),
    *(types.MemberDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType, types.MethodDescriptorType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_SEEDED_BY_ENGINES = (torch.default_generator, random.random.__self__, np.random.random.__self__)  # type: ignore[attr-defined]


class Snapshot:
    """The state found by :func:`capture`.

    Attributes:
        names: All names that the user's functions found on the way use.
        opaque: Objects whose state can't be compared: path and kind. They are not restored, except for iterators that
            can be copied.
        iterators: Iterators that can't be copied: path and kind.
        aliases: Paths of ``managed`` tensors, and of views of them, outside the places where ``nn.Module`` keeps them.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.opaque: dict[str, str] = {}
        self.iterators: dict[str, str] = {}
        self.aliases: list[str] = []
        self._whole: Any = None
        self._others: list[_Items | _Values] = []
        self.parts: list[_Items | _Values] = []

    @cached_property
    def generators(self) -> list[Any]:
        """The random generators."""
        return [part.owner for part in self.parts if isinstance(part.owner, GENERATORS)]

    def seal(self) -> None:
        """Prepares :meth:`has_changed`; called once everything has been captured."""
        whole = [part for part in self.parts if isinstance(part, _Items) and part.is_whole and not part.iterators]
        owners = [part.owner for part in whole]
        # The lengths tell whether something has been added to those that are empty, as most dicts of hooks are.
        filled = [own for own in owners if own]
        views = [v for own in filled for v in ((own.keys(), own.values()) if isinstance(own, dict) else (own,))]
        self._whole = whole, owners, list(map(len, owners)), views, list(chain.from_iterable(views))
        known = set(map(id, whole))
        self._others = [part for part in self.parts if id(part) not in known]

    def has_changed(self) -> bool:
        """Whether anything has changed; fast where containers still hold the same objects."""
        _, owners, lengths, views, items = self._whole
        if list(map(len, owners)) != lengths or not all(map(operator.is_, chain.from_iterable(views), items)):
            return bool(self.changed())
        return any(part.has_changed() for part in self._others)

    def changed(self) -> list[_Items | _Values]:
        """The parts that have changed."""
        whole, owners, lengths, *_ = self._whole
        found: list[_Items | _Values] = [
            part
            for part, now, before in zip(whole, map(len, owners), lengths, strict=True)
            if now != before or (now and part.has_changed())
        ]
        return found + [part for part in self._others if part.has_changed()]

    def differences(self) -> Iterator[str]:
        """Paths of what has changed, such as ``"counter.steps"``."""
        return (part.where() for part in self.changed())

    def restore(self) -> None:
        """Restores the state of the objects in place; ``managed`` tensors are left as they are."""
        for part in self.changed():
            part.restore()


def capture(
    root: Any,
    managed: Iterable[Tensor] = (),
    known: Iterable[Any] = (),
    outside: tuple[type, ...] = (),
    ignored: Callable[[Any], Collection[str]] = lambda owner: (),
    name: str = "",
    values: bool = True,
    reads_code: bool = True,
) -> Snapshot:
    """Captures the Python state that can be reached from an object.

    Args:
        root: The object, or several in a tuple.
        managed: Tensors whose values the caller restores; only the references to them are compared.
        known: Objects that are skipped, because the caller handles them.
        outside: Types of objects that are opaque, because they are not part of the module.
        ignored: Returns the names of attributes of an object or class that are skipped.
        name: The object's name, with which the paths begin.
        values: Whether the values of tensors and arrays are copied and compared.
        reads_code: Whether the state of functions and classes is captured too: closures, attributes, globals.
    """
    walk = _Walk(root, managed, known, outside, ignored, values, reads_code)
    walk.push(name, root)
    walk.run()
    return walk.found


class _Items:
    """An object's items: they must be the same objects, or equal numbers and strings; iterators must not advance."""

    __slots__ = ("is_whole", "iterators", "names", "owner", "path", "read", "saved", "write")

    def __init__(
        self,
        path: str,
        owner: Any,
        read: Read,
        write: Write,
        names: Sequence[str] | None = None,
        is_whole: bool = False,
    ) -> None:
        self.path = path
        self.owner = owner
        self.read = read
        self.write = write
        self.names = names
        self.is_whole = is_whole
        """Whether exactly the items of a container are compared: all of them and nothing else."""
        # This keeps the items alive: the address of one that is freed could be given to its successor.
        self.saved = read(owner)
        copies = ((index, _copy_iterator(item)) for index, item in enumerate(self.saved) if _is_iterator(item))
        self.iterators = {index: start for index, start in copies if start is not None}

    def has_changed(self) -> bool:
        before, now = self.saved, self.read(self.owner)
        if len(before) != len(now) or not (all(map(operator.is_, before, now)) or all(map(_is_same, before, now))):
            return True
        return any(_position(now[index]) != _position(start) for index, start in self.iterators.items())

    def changes(self) -> dict[str, Any]:
        """Paths of the changed items, including a dict's keys, and their former values."""
        if not isinstance(self.owner, dict) or not all(isinstance(key, str) for key in self.owner):
            return {self.path: self.owner}
        before, now = _as_dict(self.saved), _as_dict(self.read(self.owner))
        names = [n for n in {**before, **now} if not _is_same(before.get(n, _MISSING), now.get(n, _MISSING))]
        return {f"{self.path}.{name}" if self.path else name: before.get(name) for name in names}

    def where(self) -> str:
        """The path of the change: that of the first changed entry, if the owner holds its items under names."""
        before, now = self.saved, self.read(self.owner)
        pairs = zip_longest(before, now, fillvalue=_MISSING)
        place = next((place for place, pair in enumerate(pairs) if not _is_same(*pair)), 0)
        if self.names is not None:
            return _inner(self.path, self.names[place])
        if isinstance(self.owner, dict):
            items = before if place < len(before) else now
            return _inner(self.path, items[place - place % 2])
        return self.path

    def restore(self) -> None:
        # Copies take the iterators' places, because what they have yielded can't be given back to them.
        for index, start in self.iterators.items():
            self.saved[index] = _copy_iterator(start)
        self.write(self.owner, self.saved)


class _Values:
    """A tensor's values; they are compared themselves, because writes through ``.data`` are not counted."""

    __slots__ = ("owner", "path", "requires_grad", "saved")

    def __init__(self, path: str, owner: Tensor) -> None:
        self.path = path
        self.owner = owner
        self.saved = owner.detach().clone()
        self.requires_grad = owner.requires_grad

    def where(self) -> str:
        return self.path

    def has_changed(self) -> bool:
        now, before = self.owner.detach(), self.saved
        is_alike = now.shape == before.shape and now.dtype == before.dtype and now.device == before.device
        # As bytes, so that a NaN is equal to itself.
        return not is_alike or not torch.equal(_bytes(now), _bytes(before)) or self._is_switched

    def changes(self) -> dict[str, Any]:
        """The path of the tensor, and the tensor."""
        return {self.path: self.owner}

    @property
    def _is_switched(self) -> bool:
        return self.owner.requires_grad != self.requires_grad

    def restore(self) -> None:
        with torch.inference_mode(self.owner.is_inference()), torch.no_grad():
            if self.owner.shape == self.saved.shape and self.owner.dtype == self.saved.dtype:
                self.owner.copy_(self.saved)
            else:
                self.owner.data = self.saved.clone()
        if self._is_switched:
            self.owner.requires_grad_(self.requires_grad)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)


def _inner(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def _is_same(before: Any, now: Any) -> bool:
    if before is now:
        return True
    is_number = type(before) is type(now) and type(before) in _NUMBERS
    return is_number and bool(before == now or (before != before and now != now))


class _Walk:
    """A walk over all objects that can be reached, each visited once."""

    def __init__(
        self,
        root: Any,
        managed: Iterable[Tensor],
        known: Iterable[Any],
        outside: tuple[type, ...],
        ignored: Callable[[Any], Collection[str]],
        values: bool,
        reads_code: bool,
    ) -> None:
        self._values = values
        self.found = Snapshot()
        managed = list(managed)
        self._managed = {id(tensor) for tensor in managed}
        self._memory = {_memory(tensor) for tensor in managed} - {None}
        # Clients that train in one step share the object; one after the other, each may find it as it was.
        self._outside = (*outside, Optimizer, LRScheduler, contextvars.ContextVar) if reads_code else outside
        self._ignored = ignored
        self._reads_code = reads_code
        self._iterators: dict[str, Any] = {}
        self._waiting: list[tuple[str, Any]] = []
        # The objects too: those that the walk itself creates would be freed, and their ids reused.
        known = list(known)
        self._known = set(map(id, known))
        self._seen: dict[int, Any] = {id(own): own for own in (*known, *_SEEDED_BY_ENGINES)}
        roots = root if isinstance(root, tuple) else (root,)
        modules = [own for held in roots if isinstance(held, nn.Module) for own in held.modules()]
        # An installed package that defines one of the modules is the user's code, wherever it is located.
        self._of_user = {_package(cls.__module__) for own in modules for cls in type(own).__mro__}

    def run(self) -> None:
        while self._waiting:
            path, value = self._waiting.pop()
            if id(value) not in self._seen:
                self._seen[id(value)] = value
                self._visit(path, value)
        held = {
            id(part.saved[index]) for part in self.found.parts if isinstance(part, _Items) for index in part.iterators
        }
        self.found.iterators = {p: type(it).__name__ for p, it in self._iterators.items() if id(it) not in held}
        self.found.seal()

    def push(self, path: str, value: Any) -> None:
        if id(value) in self._managed:
            self.found.aliases.append(path)
        elif type(value) not in _NUMBERS:
            self._waiting.append((path, value))

    def _add(self, path: str, owner: Any, read: Read, write: Write) -> None:
        part = _Items(path, owner, read, write, is_whole=isinstance(owner, dict | list | set | deque))
        self.found.parts.append(part)
        for item in part.saved:
            self.push(path, item)

    def _add_names(self, path: str, owner: Any, names: Collection[str], access: type[_Names]) -> None:
        """Adds the objects that an object holds under some names."""
        own = access(names)
        part = _Items(path, owner, own.read, own.write, own.names)
        self.found.parts.append(part)
        for name, item in zip(own.names, part.saved, strict=True):
            self.push(_inner(path, name), item)

    def _visit(self, path: str, value: Any) -> None:
        kind: Any = type(value)
        if not self._values and isinstance(value, Tensor | np.ndarray):
            pass
        elif isinstance(value, Tensor):
            self._visit_tensor(path, value)
        elif isinstance(value, types.FunctionType):
            if self._reads_code:
                self._visit_function(path, value)
        elif isinstance(value, type):
            if self._reads_code:
                self._visit_class(value)
        elif isinstance(value, types.MethodType):
            # The caller that handles an object does not see calls of a method that was taken from it before.
            if id(value.__self__) in self._known:
                self.found.opaque[path] = f"method of a {type(value.__self__).__name__}"
            self.push(path, value.__self__)
            self.push(path, value.__func__)
        elif isinstance(value, types.BuiltinFunctionType | types.MethodWrapperType):
            self.push(path, value.__self__)  # such as the generator or the iterator whose method it is
        elif isinstance(value, _STATELESS):
            pass
        elif isinstance(value, self._outside) or _holds_a_handle(value):
            self.found.opaque[path] = kind.__name__
        elif (parts := _parts_of(value)) is not None:
            for own in parts:
                self.push(path, own)
        elif (access := _access_to(value)) is not None:
            self._add(path, value, *access)
            self.push(path, getattr(value, "default_factory", None))
            self._visit_attributes(path, value)
        elif _is_of_python(kind):
            self._visit_attributes(path, value)
        # Objects implemented in C that define their own hash are values, such as dates, patterns and dtypes.
        elif kind.__hash__ is None or kind.__hash__ is object.__hash__:
            self.found.opaque[path] = kind.__name__
            if _is_iterator(value):
                self._iterators[path] = value

    def _visit_tensor(self, path: str, value: Tensor) -> None:
        if value.layout is torch.strided and value.numel() and _memory(value) in self._memory:
            self.found.aliases.append(path)
            return
        try:
            part = _Values(path, value)
            part.has_changed()
        except (RuntimeError, NotImplementedError, ValueError):  # sparse, nested, quantized, lazy or meta tensors
            self.found.opaque[path] = f"{type(value).__name__} of {value.layout}"
        else:
            self.found.parts.append(part)

    def _visit_function(self, path: str, value: types.FunctionType) -> None:
        for cell, name in zip(value.__closure__ or (), value.__code__.co_freevars, strict=True):
            self._add_names(_inner(path, name), cell, ("cell_contents",), _Attributes)
        self.push(path, value.__defaults__)
        self.push(path, value.__kwdefaults__)
        if self._is_library(value.__module__):
            return
        self.push(path, value.__dict__)
        names, holder = _names_in(value.__code__), value.__globals__
        self.found.names.update(names)
        self._add_names(value.__module__ or "", holder, [name for name in names if name in holder], _Keys)
        for module in [holder.get(name, sys.modules.get(name)) for name in names]:  # imported by the file, or in place
            if isinstance(module, types.ModuleType) and not self._is_library(module.__name__):
                own = vars(module)
                self._add_names(module.__name__, own, [name for name in names if name in own], _Keys)

    def _visit_class(self, value: type) -> None:
        if self._is_library(value.__module__):
            return
        for base in value.__bases__:
            self.push(base.__name__, base)
        left_out = {"__dict__", "__weakref__", "_abc_impl", *self._ignored(value)}
        own = {name: item for name, item in vars(value).items() if name not in left_out}
        names = [n for n, item in own.items() if isinstance(item, types.FunctionType) or not n.startswith("__")]
        self._add_names(value.__name__, value, names, _ClassAttributes)

    def _visit_attributes(self, path: str, value: Any) -> None:
        kind: Any = type(value)
        own = getattr(value, "__dict__", None)
        if type(own) is dict:
            self._seen[id(own)] = own
            access = _Others(self._ignored(value))
            part = _Items(path, own, access.read, access.write, is_whole=not access.ignored)
            self.found.parts.append(part)
            children = _children(value) if isinstance(value, nn.Module) else ()
            for name, item in _as_dict(part.saved).items():
                if any(item is child for child in children):
                    self._visit_children(path, item)
                else:
                    self.push(_inner(path, name), item)
        if slots := _slots(kind):
            self._add_names(path, value, slots, _Attributes)
        self.push(kind.__name__, kind)

    def _visit_children(self, path: str, children: dict[str, Any]) -> None:
        """Looks at the parameters, buffers or submodules of a module, where managed tensors may be."""
        self._seen[id(children)] = children
        self.found.parts.append(_Items(path, children, *_DICT, is_whole=True))
        for name, child in children.items():
            if id(child) not in self._managed:
                self.push(_inner(path, name), child)

    def _is_library(self, name: str | None) -> bool:
        package = _package(name)
        return package in _LIBRARIES or (package not in self._of_user and _is_installed(package))


# ---- reading and writing an object's items


class _Names:
    """Reads and writes the items that an object holds under some names; others are ignored."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = tuple(names)

    def read(self, owner: Any) -> list[Any]:
        return [self.get(owner, name) for name in self.names]

    def write(self, owner: Any, items: list[Any]) -> None:
        for name, item in zip(self.names, items, strict=True):
            if not _is_same(item, self.get(owner, name)):
                self.put(owner, name, item)

    def get(self, owner: Any, name: str) -> Any:
        raise NotImplementedError

    def put(self, owner: Any, name: str, item: Any) -> None:
        raise NotImplementedError


class _Keys(_Names):
    """Names are keys of a dict."""

    def get(self, owner: Any, name: str) -> Any:
        return owner.get(name, _MISSING)

    def put(self, owner: Any, name: str, item: Any) -> None:
        if item is _MISSING:
            del owner[name]
        else:
            owner[name] = item


class _Attributes(_Names):
    """Names are attributes, such as slots, or the content of a closure's cell."""

    def get(self, owner: Any, name: str) -> Any:
        try:
            return getattr(owner, name)
        except (AttributeError, ValueError):  # ValueError: an empty cell
            return _MISSING

    def put(self, owner: Any, name: str, item: Any) -> None:
        if item is _MISSING:
            delattr(owner, name)
        else:
            object.__setattr__(owner, name, item)


class _ClassAttributes(_Attributes):
    """Names are attributes of a class, as they stand in it."""

    def get(self, owner: Any, name: str) -> Any:
        return vars(owner).get(name, _MISSING)

    def put(self, owner: Any, name: str, item: Any) -> None:
        if item is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, item)


class _Others:
    """Reads and writes the names and items of an object's ``__dict__``, without those that are ignored."""

    def __init__(self, ignored: Collection[str]) -> None:
        self.ignored = frozenset(ignored)

    def read(self, owner: dict[str, Any]) -> list[Any]:
        ignored = self.ignored
        return [part for pair in owner.items() if pair[0] not in ignored for part in pair]

    def write(self, owner: dict[str, Any], items: list[Any]) -> None:
        before = _as_dict(items)
        for name in owner.keys() - self.ignored - before.keys():
            del owner[name]
        owner.update(before)


def _read_dict(owner: dict[Any, Any]) -> list[Any]:
    return list(chain.from_iterable(owner.items()))


def _write_dict(owner: dict[Any, Any], items: list[Any]) -> None:
    owner.clear()
    owner.update(_as_dict(items))


def _as_dict(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


def _write_slice(owner: Any, items: list[Any]) -> None:
    owner[:] = items


def _write_bytes(owner: Any, items: list[Any]) -> None:
    owner[:] = type(owner)(items[0]) if isinstance(owner, bytearray) else array.array(owner.typecode, items[0])


def _write_by_update(owner: Any, items: list[Any]) -> None:
    owner.clear()
    (owner.extend if isinstance(owner, deque) else owner.update)(items)


def _pickled(get: Callable[[Any], Any]) -> Read:
    return lambda owner: [pickle.dumps(get(owner))]


def _unpickled(put: Callable[[Any, Any], Any]) -> Write:
    return lambda owner, items: put(owner, pickle.loads(items[0]))


def _set_bit_generator(owner: Any, state: Any) -> None:
    owner.state = state


def _read_array(owner: np.ndarray) -> list[Any]:
    return [str(owner.dtype), str(owner.shape), owner.tobytes()]


def _write_array(owner: np.ndarray, items: list[Any]) -> None:
    owner[...] = np.frombuffer(items[2], owner.dtype).reshape(owner.shape)


_DICT: tuple[Read, Write] = (_read_dict, _write_dict)
_CONTAINERS: list[tuple[Any, tuple[Read, Write]]] = [
    (dict, _DICT),
    (list, (list, _write_slice)),
    ((set, deque), (list, _write_by_update)),
    (bytearray, (lambda own: [bytes(own)], _write_bytes)),
    (array.array, (lambda own: [own.tobytes()], _write_bytes)),
    (random.Random, (_pickled(lambda own: own.getstate()), _unpickled(lambda own, state: own.setstate(state)))),
    (
        np.random.RandomState,
        (_pickled(lambda own: own.get_state(legacy=False)), _unpickled(lambda own, state: own.set_state(state))),
    ),
    (np.random.BitGenerator, (_pickled(lambda own: own.state), _unpickled(_set_bit_generator))),
    (
        torch.Generator,
        (
            lambda own: [own.get_state().numpy().tobytes()],
            lambda own, items: own.set_state(torch.frombuffer(bytearray(items[0]), dtype=torch.uint8)),
        ),
    ),
]


def _access_to(value: Any) -> tuple[Read, Write] | None:
    """How the items of a container, an array or a random generator are read and written; None for other objects."""
    if isinstance(value, np.ndarray):
        is_plain = value.flags.writeable and not value.dtype.hasobject
        return (_read_array, _write_array) if is_plain else None
    if isinstance(value, random.SystemRandom):
        return None
    return next((access for kinds, access in _CONTAINERS if isinstance(value, kinds)), None)


def _parts_of(value: Any) -> Iterable[Any] | None:
    """The contents of an object that itself never changes; None for other objects."""
    if isinstance(value, tuple | frozenset):
        return value
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, weakref.ref):
        return (value(),)
    if isinstance(value, property):
        return value.fget, value.fset
    if isinstance(value, staticmethod | classmethod):
        return (value.__func__,)
    if isinstance(value, functools.cached_property):
        return (value.func,)
    if hasattr(value, "cache_info") and hasattr(value, "__wrapped__"):
        return (value.__wrapped__,)  # of `functools.cache`
    if isinstance(value, np.random.Generator):
        return (value.bit_generator,)
    if isinstance(value, np.ndarray) and not value.dtype.hasobject and not value.flags.writeable:
        return ()
    return None


# ---- types and names

GENERATORS = (random.Random, np.random.RandomState, np.random.BitGenerator, torch.Generator)
_HANDLES = (
    type(threading.Lock()),
    type(threading.RLock()),
    threading.Thread,
    threading.Condition,
    io.IOBase,
    socket.socket,
)


def _holds_a_handle(value: Any) -> bool:
    """Whether an object stands for something outside, such as a file, a logger's run or a queue between threads."""
    own = getattr(value, "__dict__", None)
    return (
        type(own) is dict
        and not isinstance(value, nn.Module)
        and any(isinstance(item, _HANDLES) for item in own.values())
    )


def _is_iterator(value: Any) -> bool:
    kind = type(value)
    return hasattr(kind, "__next__") and not kind.__dictoffset__ and not isinstance(value, io.IOBase)


def _copy_iterator(value: Any) -> Any:
    """An iterator that yields the remaining items of another; None if it can't be copied."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python 3.12: those of `itertools` can't be copied from 3.14 on
            is_flat = not any(map(_is_iterator, value.__reduce__()[1]))
            return copy.copy(value) if is_flat else copy.deepcopy(value)
    except (TypeError, AttributeError):
        return None


def _position(value: Any) -> Any:
    """An iterator's position: the numbers in its pickled form, which change when it yields something."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, arguments, *state = value.__reduce__()
    except (TypeError, AttributeError):
        return object()
    nested = any(map(_is_iterator, arguments))
    return object() if nested else [part for part in (*arguments, *state) if isinstance(part, int | float)]


def _children(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return own_parameters(module), own_buffers(module), own_modules(module)


@functools.cache
def _is_of_python(kind: Any) -> bool:
    """Whether all state of an object is in its attributes, because no base class written in C holds any."""
    names = [f"slot{index}" for index in range(len(_slots(kind)))]
    names += ["__dict__"] * bool(kind.__dictoffset__) + ["__weakref__"] * bool(kind.__weakrefoffset__)
    plain = type("Plain", (), {"__slots__": names})
    return kind.__basicsize__ <= plain.__basicsize__ and not kind.__itemsize__


def _own_slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    hidden = kind.__name__.lstrip("_")
    return tuple(
        f"_{hidden}{name}" if name.startswith("__") and not name.endswith("__") else name
        for name in names
        if name not in ("__dict__", "__weakref__")
    )


@functools.cache
def _slots(kind: Any) -> tuple[str, ...]:
    return tuple(name for own in kind.__mro__ for name in _own_slots(own))


@functools.cache
def _names_in(code: types.CodeType) -> tuple[str, ...]:
    """All names that a function's code uses, also in the functions that it defines."""
    inner = (name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names_in(const))
    return tuple(dict.fromkeys((*code.co_names, *inner)))


def _package(name: str | None) -> str:
    return (name or "").partition(".")[0]


@functools.cache
def _is_installed(package: str) -> bool:
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def _memory(tensor: Tensor) -> int | None:
    """The address of a tensor's memory; None if it has none."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):  # a lazy tensor, or one of another layout
        return None
