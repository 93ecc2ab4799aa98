"""Silos of several processes in a Trainer: their groups, their modules and their checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer
from torchmetrics import Metric
from torchmetrics.metric import jit_distributed_available

from lightning_fl.communication import Group, connect, connect_silos
from lightning_fl.engines.spread import local, part_of, spread_like, whole
from lightning_fl.engines.within_silo import WithinSilo
from lightning_fl.silos import Silo
from lightning_fl.strategies.validation import check_type


def check_silo(strategy: Any) -> None:
    """Checks that a strategy's settings fit silos of several processes.

    Raises:
        ValueError: If one does not.
    """
    silo = strategy.silo
    check_type("silo", silo, Silo, "fl.silos.DDP() or fl.silos.FSDP2()")
    if silo is None:
        return
    several = {
        "num_clients": strategy.num_clients is not None,
        "partition": strategy.partition is not None,
        "engine='vectorized'": strategy.engine not in ("auto", "sequential"),
        "split_validation": strategy.split_validation,
        "on_client_error='skip'": strategy.on_client_error == "skip",
        "adversary": strategy.adversary is not None,
        "schedule": strategy.schedule is not None,
    }
    given = [name for name, is_given in several.items() if is_given]
    if given:
        raise ValueError(
            f"With silo={silo} several processes train one client together, so {', '.join(given)} has no meaning, or "
            "is not supported. Leave it out."
        )
    silo.check(strategy.algorithm, strategy.aggregator, strategy.transforms)


def connect_processes(silo: Silo | None, rank: int, size: int, together: int, where: Sequence[Any]) -> Group:
    """Joins this process to its silo and the federation.

    Args:
        silo: How several processes share a silo. None: each process is a rank.
        rank: Index of this process.
        size: Number of all processes.
        together: Number of processes of a silo that does not specify it.
        where: The further arguments of :func:`~lightning_fl.communication.connect`.

    Raises:
        MisconfigurationException: If the processes can't be divided into silos.
    """
    if silo is None:
        return connect(rank, size, *where)
    try:
        return connect_silos(rank, size, silo.ranks or together, silo.spreads_parameters, *where)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error


def mesh_of(group: Group, device: torch.device) -> DeviceMesh:
    """The processes of this silo, under the names that Lightning's ``ModelParallelStrategy`` gives them."""
    return init_device_mesh(device.type, (group.inner.size, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))


def check_module(silo: Silo, module: nn.Module, protects_examples: bool) -> None:
    """Refuses a module that the processes of a silo can't train together.

    Raises:
        MisconfigurationException: If it is sharded in another way than the silo, or its examples are protected.
    """
    if protects_examples:
        raise MisconfigurationException(
            f"With silo={silo} each process would add its own noise, so they would train different models. Leave "
            "SampleLevelDP out, or let a silo be one process."
        )
    try:
        silo.check_module(module)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error


# ---- torchmetrics


def _never() -> bool:
    return False


def keep_metrics_apart(module: nn.Module) -> None:
    """Keeps ``compute`` of torchmetrics from joining states over the silo's processes, which the strategy does."""
    for part in module.modules():
        if isinstance(part, Metric):
            part.distributed_available_fn = _never


def let_metrics_sync(module: nn.Module) -> None:
    """Undoes :func:`keep_metrics_apart`."""
    for part in module.modules():
        if isinstance(part, Metric) and part.distributed_available_fn is _never:
            part.distributed_available_fn = jit_distributed_available


# ---- checkpoints of full tensors, however they are sharded


def whole_state_dict(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A module's ``state_dict`` with full tensors; a collective of the silo."""
    WithinSilo.free_gathered(module)
    held = dict(module.named_parameters(remove_duplicate=False))
    return {name: whole(local(held[name]), held[name]) if name in held else value for name, value in state.items()}


def spread_state_dict(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A ``state_dict`` of full tensors with this process's shards, sharded like the module's tensors."""
    held = dict(module.named_parameters(remove_duplicate=False))
    return {
        name: spread_like(part_of(value, held[name]), held[name]) if name in held else value
        for name, value in state.items()
    }


def whole_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's ``state_dict`` with full tensors; a collective of the silo."""

    def gathered(value: Any) -> Any:
        return whole(local(value), value) if isinstance(value, Tensor) else value

    found = {key: {name: gathered(own) for name, own in entries.items()} for key, entries in state["state"].items()}
    return {**state, "state": found}


def spread_optimizer_states(optimizers: Sequence[Optimizer]) -> None:
    """Shards the full tensors that a checkpoint has loaded into the optimizers like their parameters."""
    for optimizer in optimizers:
        for param, entries in optimizer.state.items():
            for name, value in entries.items():
                if isinstance(value, Tensor) and value.shape == param.shape:
                    entries[name] = spread_like(part_of(value, param), param)
