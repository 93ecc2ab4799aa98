"""Records under ``vmap`` what a training step logs (``self.log``, torchmetrics), and replays it afterwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NoReturn

import torch
from lightning import LightningModule
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat, dim_zero_max, dim_zero_min, dim_zero_sum

from lightning_fl.engines.vectorized.stacking import NotVectorizable, part, select
from lightning_fl.federation.metric_entries import Entries
from lightning_fl.strategies.torchmetrics_internals import reductions
from lightning_fl.torch_internals import pytree

_TOO_EARLY = "training_step calls {}() of a torchmetric, which has not seen the batch by then"
_SIGNATURE = inspect.signature(LightningModule.log)
_REDUCTIONS: dict[Any, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("mean", "avg", torch.mean), torch.mean),
    **dict.fromkeys(("sum", torch.sum), torch.sum),
    **dict.fromkeys(("min", torch.min), torch.amin),
    **dict.fromkeys(("max", torch.max), torch.amax),
}


class _MetricResult:
    """Placeholder for the value that a torchmetric's ``forward`` returns when its call is replayed."""

    def __init__(self) -> None:
        self.is_used = False
        """Whether the placeholder is logged, so that the values of all clients are needed."""
        self.values: Tensor | None = None


@dataclass
class _Call:
    """A call made inside the step: of ``self.log``, or of a torchmetric."""

    metric: Metric | MetricCollection | None
    method: str
    spec: Any
    leaves: list[Any]
    result: _MetricResult

    def without_tensors(self) -> _Call:
        """The same call with empty tensors, so that it keeps none alive."""
        return replace(self, leaves=[torch.empty(0) if isinstance(own, Tensor) else own for own in self.leaves])


@dataclass(frozen=True)
class LogCalls:
    """The calls of a step; equal for steps that log in the same way.

    Args:
        calls: The calls.
        made: The parts of the calls that are compared.
    """

    calls: list[_Call] = field(compare=False)
    made: list[tuple[Any, ...]]


@dataclass
class _Step:
    """The calls of one step of all clients, with the stacked tensors they were made with."""

    calls: list[_Call]
    tensors: list[Tensor]
    num_clients: int
    batch_size: int
    rows: Tensor

    def of(self, accepted: Tensor) -> Tensor:
        """Rows of the step's clients for which ``accepted`` is true."""
        return accepted[self.rows].nonzero().flatten()

    @cached_property
    def form(self) -> list[Any]:
        """What two steps must share for their calls to be merged: everything except values, clients and examples."""
        calls = [
            (
                call.metric,
                call.method,
                call.result.is_used,
                call.spec,
                [None if isinstance(leaf, Tensor) else leaf for leaf in call.leaves],
            )
            for call in self.calls
        ]
        return [*calls, *((tensor.dtype, tensor.dim(), tensor.shape[2:]) for tensor in self.tensors)]

    @property
    def can_wait(self) -> bool:
        """Whether one call with the values of several steps has the same result as one call for each step."""
        return all(
            _takes_rows(call, args, kwargs)
            if call.metric is not None
            else kwargs["on_step"] is False and kwargs["on_epoch"] and not isinstance(kwargs["value"], _MetricResult)
            for call, args, kwargs in _with_tensors(self)
        )


class LogCapture:
    """Runs a module's ``training_step`` for one client under ``vmap`` and records what it logs.

    Args:
        module: The user's module.
    """

    def __init__(self, module: LightningModule) -> None:
        self.module = module
        self.metrics = list(_outermost_metrics(module))
        self.steps: list[_Step] = []
        self._waiting: list[_Step] = []
        self._calls: list[_Call] = []
        self._refused: NotVectorizable | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        """Runs the step; returns its loss and the tensors to be passed to :meth:`emit`."""
        self._calls, self._refused = [], None
        with self._recording():
            output = self.module.training_step(*args, **kwargs)
        if self._refused is not None:  # the step may have caught it
            raise self._refused
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise NotVectorizable(f"training_step returned a {type(loss).__name__} as its loss, not a tensor")
        tensors = [leaf for call in self._calls for leaf in call.leaves if isinstance(leaf, Tensor)]
        return loss, [tensor.detach() for tensor in tensors]

    @property
    def made(self) -> list[tuple[Any, ...]]:
        """The calls of the last step, with all arguments that are not tensors."""
        return [
            (
                id(call.metric),
                call.method,
                call.spec,
                [leaf for leaf in call.leaves if not isinstance(leaf, Tensor | _MetricResult)],
            )
            for call in self._calls
        ]

    @property
    def calls(self) -> LogCalls:
        """The calls of the last step, to be repeated with other tensors.

        Raises:
            NotVectorizable: If one of them logs the value that a torchmetric has returned, which differs in each step.
        """
        if any(call.result.is_used for call in self._calls):
            raise NotVectorizable("training_step logs what a torchmetric has returned")
        return LogCalls([call.without_tensors() for call in self._calls], self.made)

    def emit(
        self,
        tensors: Sequence[Tensor],
        rows: Tensor,
        batch_size: int,
        may_wait: bool = False,
        calls: LogCalls | None = None,
    ) -> None:
        """Makes the calls of the step that has just run, once for all its clients.

        Args:
            tensors: The tensors that the step returned, stacked over the clients.
            rows: The clients' positions in the group, shape ``[num_clients]``.
            batch_size: Number of examples in the batch of one client.
            may_wait: Whether the calls may be deferred until :meth:`flush`, because nothing reads the values earlier.
            calls: The calls, if the step was replayed. None: those of the step that has just run.
        """
        own = self._calls if calls is None else calls.calls
        if not own:
            return
        step = _Step(own, list(tensors), len(rows), batch_size, rows)
        self.steps.append(step)
        joins = bool(self._waiting) and step.form == self._waiting[0].form
        if not joins:
            self.flush()
        self._waiting.append(step)
        if not (joins or (may_wait and step.can_wait)):
            self.flush()

    def flush(self) -> None:
        """Makes the deferred calls: one for all steps."""
        steps, self._waiting = self._waiting, []
        for made in zip(*map(_with_tensors, steps), strict=True):
            call, args, kwargs = made[0]
            if call.metric is not None and len(steps) > 1:
                args, kwargs = _concatenated([_as_rows(args, kwargs) for _, args, kwargs in made])
                getattr(call.metric, call.method)(*args, **kwargs)
            elif call.metric is not None:
                _update(call, args, kwargs, steps[0].num_clients)
            elif isinstance(kwargs["value"], Metric):
                self.module.log(**kwargs)
            else:
                values = [
                    (_reduction(own), _values(own["value"], step.num_clients), own["batch_size"] or step.batch_size)
                    for (_, _, own), step in zip(made, steps, strict=True)
                ]
                joined, size = _join(values), sum(len(own) * size for _, own, size in values)
                self.module.log(**{**kwargs, "value": joined["value"] / joined["weight"], "batch_size": size})

    def clear(self) -> None:
        """Drops the recorded calls of the group."""
        self.steps, self._waiting = [], []

    def entries(self, accepted: Tensor) -> Entries:
        """Value and weight of the ``accepted`` clients' logged values, by key of Lightning's results."""
        logged: dict[str, list[tuple[Any, Tensor, float]]] = {}
        for step in self.steps:
            chosen = step.of(accepted)
            if not len(chosen):
                continue
            for call, _, kwargs in _with_tensors(step):
                if call.metric is None and not isinstance(kwargs["value"], Metric):
                    values = _values(kwargs["value"], step.num_clients)[chosen].double()
                    size = kwargs["batch_size"] or step.batch_size
                    logged.setdefault(f"training_step.{kwargs['name']}", []).append((_reduction(kwargs), values, size))
        return {key: _join(values) for key, values in logged.items()}

    def update_metrics(self, accepted: Tensor) -> None:
        """Replays the calls of torchmetrics, for the ``accepted`` clients only."""
        for step in self.steps:
            chosen = step.of(accepted)
            own = _Step(step.calls, select(step.tensors, chosen), len(chosen), step.batch_size, step.rows[chosen])
            for call, args, kwargs in _with_tensors(own):
                if call.metric is not None and len(chosen):
                    _update(call, args, kwargs, len(chosen))

    @contextmanager
    def _recording(self) -> Iterator[None]:
        patched: list[tuple[Any, str, Any]] = []

        def patch(owner: Any, name: str, record: Callable[..., Any]) -> None:
            # The list itself marks a name for which the object had no attribute; None could be an attribute's value.
            patched.append((owner, name, vars(owner).get(name, patched)))
            object.__setattr__(owner, name, record)

        patch(self.module, "log", self._record_log)
        for metric in self.metrics:
            for method in ("forward", "update"):
                patch(metric, method, lambda *args, m=metric, n=method, **kwargs: self._record(m, n, args, kwargs))
            for method in ("compute", "reset"):
                patch(metric, method, lambda *args, n=method, **kwargs: self._refuse(_TOO_EARLY.format(n)))
        try:
            yield
        finally:
            # Backwards, because a metric that two submodules share is patched twice.
            for owner, name, before in reversed(patched):
                if before is patched:
                    object.__delattr__(owner, name)
                else:
                    object.__setattr__(owner, name, before)

    def _refuse(self, reason: str) -> NoReturn:
        self._refused = NotVectorizable(reason)
        raise self._refused

    def _record_log(self, *args: Any, **kwargs: Any) -> None:
        bound = _SIGNATURE.bind(self.module, *args, **kwargs)
        bound.apply_defaults()
        arguments = {name: value for name, value in bound.arguments.items() if name != "self"}
        value = arguments["value"]
        if isinstance(value, _MetricResult):
            value.is_used = True
        elif not isinstance(value, Metric | Tensor | int | float):
            self._refuse(f"self.log({arguments['name']!r}, ...) got a {type(value).__name__}")
        self._record(None, "log", (), arguments)

    def _record(self, metric: Any, method: str, args: Any, kwargs: Any) -> _MetricResult | None:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        result = _MetricResult()
        self._calls.append(_Call(metric, method, spec, leaves, result))
        return result if method == "forward" else None


def _with_tensors(step: _Step) -> Iterator[tuple[_Call, Any, dict[str, Any]]]:
    """Yields the calls with their arguments, in which tensors are stacked over the clients."""
    tensors = iter(step.tensors)
    for call in step.calls:
        leaves = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in call.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, call.spec)
        yield call, args, kwargs


def _values(value: Any, num_clients: int) -> Tensor:
    if isinstance(value, _MetricResult):
        assert value.values is not None
        return value.values
    if not isinstance(value, Tensor):
        return torch.full((num_clients,), float(value))
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())


def _reduction(arguments: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    return _REDUCTIONS.get(arguments["reduce_fx"], torch.mean)


def _join(logged: Sequence[tuple[Callable[[Tensor], Tensor], Tensor, float]]) -> dict[str, Any]:
    reduce = logged[0][0]
    if reduce is torch.mean:
        value = sum((values * size).sum() for _, values, size in logged)
        return {"value": value, "weight": sum(values.numel() * size for _, values, size in logged)}
    return {"value": reduce(torch.cat([values for _, values, _ in logged])), "weight": 1}


def _outermost_metrics(module: torch.nn.Module) -> Iterator[Metric | MetricCollection]:
    for child in module.children():
        if isinstance(child, Metric | MetricCollection):
            yield child
        else:
            yield from _outermost_metrics(child)


def _update(call: _Call, args: Any, kwargs: Any, num_clients: int) -> None:
    method = getattr(call.metric, call.method)
    if _takes_rows(call, args, kwargs):
        args, kwargs = _as_rows(args, kwargs)
        method(*args, **kwargs)
        return
    values = []
    for index in range(num_clients):
        own_args, own_kwargs = part((args, kwargs), index)
        values.append(method(*own_args, **own_kwargs))
    if call.result.is_used:
        call.result.values = torch.stack(values)


def _takes_rows(call: _Call, args: Any, kwargs: Any) -> bool:
    """Whether a torchmetric may be given the examples of all clients at once."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return not call.result.is_used and len({_has_rows(leaf) for leaf in tensors}) == 1 and _is_additive(call.metric)


def _as_rows(args: Any, kwargs: Any) -> Any:
    """Arguments whose tensors hold the examples of all clients one after the other."""
    return pytree.tree_map(lambda leaf: leaf.flatten(0, 1) if _has_rows(leaf) else leaf, (args, kwargs))


def _concatenated(arguments: Sequence[Any]) -> Any:
    """The arguments of several steps as those of one."""
    flat = [pytree.tree_flatten(own) for own in arguments]
    leaves = [
        torch.cat(own) if isinstance(own[0], Tensor) else own[0]
        for own in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return pytree.tree_unflatten(leaves, flat[0][1])


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 1


def _is_additive(metric: Metric | MetricCollection | None) -> bool:
    """Whether one update with the examples of all clients gives the same state as one for each client."""
    if isinstance(metric, MetricCollection):
        return all(map(_is_additive, metric.values()))
    assert metric is not None
    functions = reductions(metric).values()
    additive = (dim_zero_sum, dim_zero_cat, dim_zero_max, dim_zero_min)
    return (
        bool(functions)
        # The `update` of a user's own metric may do more than its declared states show.
        and type(metric).__module__.startswith("torchmetrics.")
        and all(function in additive for function in functions)
    )
