"""What a user's algorithm, aggregator or transform returns, checked before anything takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_fl.federation.errors import NotFiniteError
from lightning_fl.tree import is_finite, leaves
from lightning_fl.types import Aggregate, State, Tree, Update


def check_server_state(owner: object, method: str, found: Any, expected: Tree) -> State:
    """The server state that a method of an algorithm has returned.

    Args:
        owner: The algorithm.
        method: The method's name.
        found: What it has returned.
        expected: The global model before it was called.

    Raises:
        ValueError: If that has no entry ``"params"`` with the names and shapes of ``expected``.
    """
    _check_params(owner, method, found, expected, "the server's state, with the global model")
    return found


def check_next_model(owner: object, found: Any, expected: Tree, aggregate: Aggregate) -> State:
    """The server state that an algorithm's ``server_update`` has returned; see :func:`check_server_state`.

    Args:
        owner: The algorithm.
        found: What it has returned.
        expected: The global model before it was called.
        aggregate: What it was given.

    Raises:
        ValueError: As in :func:`check_server_state`.
        NotFiniteError: If any entry holds NaN or Inf.
    """
    state = check_server_state(owner, "server_update", found, expected)
    spoilt = next((key for key, own in state.items() if not _is_finite({key: own})), None)
    if spoilt is not None:
        sums_are_finite = _is_finite({"delta": aggregate.delta, **aggregate.aux})
        method = f"{_name(owner, 'server_update')} returned {spoilt!r}"
        source = method if sums_are_finite else "The aggregator, or the server half of a transform, returned a sum"
        remedy = (
            "Lower the server's learning rate, or see what it divides by."
            if sums_are_finite
            else "See what it divides by."
        )
        raise NotFiniteError(
            f"{source} with NaN or Inf, although no client's update has any. The global model is unchanged. {remedy}"
        )
    return state


def _is_finite(state: Mapping[str, Any]) -> bool:
    return is_finite(leaf for leaf in leaves(state) if isinstance(leaf, Tensor))


def check_context(owner: object, found: Any, expected: Tree) -> Mapping[str, Any]:
    """The context that an algorithm's ``client_init`` has returned; see :func:`check_server_state`."""
    _check_params(owner, "client_init", found, expected, "what the client needs, with its first model")
    return found


def check_finished(owner: object, found: Any) -> tuple[Update, State | None]:
    """The update and the state that an algorithm's ``client_finish`` has returned.

    Raises:
        ValueError: If it is no pair of them, or the state holds something else than tensors.
    """
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Update)):
        kinds = ", ".join(type(part).__name__ for part in found) if isinstance(found, tuple) else type(found).__name__
        raise ValueError(
            f"{_name(owner, 'client_finish')} returned {kinds}; expected a pair: an Update, and the client's next "
            "state or None."
        )
    update, state = found
    if state is not None and (wrong := _no_tensor(state, "")) is not None:
        raise ValueError(
            f"{_name(owner, 'client_finish')} returned a client's state with {wrong}; expected None or a dict of "
            "tensors and of dicts of them. Write torch.tensor(value) for a number."
        )
    return update, state


def check_aggregate(owner: object, method: str, found: Any, delta: Tree, buffers: Tree) -> Aggregate:
    """The aggregate that an aggregator, or the server half of a transform, has returned.

    Args:
        owner: The aggregator or the transform.
        method: The method's name.
        found: What it has returned.
        delta: The names and shapes that its ``delta`` must have.
        buffers: Those of its ``buffers``.

    Raises:
        ValueError: If it is something else.
    """
    if not isinstance(found, Aggregate):
        raise ValueError(f"{_name(owner, method)} returned {type(found).__name__}; expected an Aggregate.")
    for entry, tree, expected in (("delta", found.delta, delta), ("buffers", found.buffers, buffers)):
        if (difference := _difference(tree, expected)) is not None:
            raise ValueError(f"{_name(owner, method)} returned an Aggregate whose {entry} {difference}.")
    return found


def _check_params(owner: object, method: str, found: Any, expected: Tree, what: str) -> None:
    name = _name(owner, method)
    if not (isinstance(found, Mapping) and "params" in found):
        keys = ", ".join(map(repr, found)) if isinstance(found, Mapping) else ""
        given = f"a dict of {keys or 'nothing'}" if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"{name} returned {given}; expected {what} as the entry 'params'.")
    if (difference := _difference(found["params"], expected)) is not None:
        raise ValueError(f"{name} returned 'params' that {difference}. The global model is unchanged.")


def _difference(found: Any, expected: Tree) -> str | None:
    """How a tree differs in names or shapes; None if it does not."""
    if found is expected:
        return None
    if not isinstance(found, Mapping):
        return f"are a {type(found).__name__}; expected a dict of tensors"
    for name in dict.fromkeys([*expected, *found]):
        if name not in expected:
            return f"hold {name!r}; expected {', '.join(map(repr, list(expected)[:5])) or 'none'}"
        if name not in found:
            return f"lack {name!r}"
        tensor = found[name]
        if not isinstance(tensor, Tensor):
            return f"hold a {type(tensor).__name__} as {name!r}; expected a tensor"
        if tensor.shape != expected[name].shape:
            return f"hold {name!r} of the shape {tuple(tensor.shape)}; expected {tuple(expected[name].shape)}"
    return None


def _no_tensor(state: Any, path: str) -> str | None:
    """The first thing in a state that is no tensor."""
    if isinstance(state, Mapping):
        return next((wrong for key in state if (wrong := _no_tensor(state[key], f"{path}/{key}")) is not None), None)
    return None if isinstance(state, Tensor) else f"{type(state).__name__} as {path.lstrip('/') or 'itself'!r}"


def _name(owner: object, method: str) -> str:
    return f"{type(owner).__name__}.{method}"
