"""How the processes of a silo divide its training among them."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
from abc import ABC
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_fl.aggregation import WeightedMean
from lightning_fl.algorithms import Algorithm
from lightning_fl.engines.spread import is_spread


@dataclass(frozen=True)
class Silo(ABC):
    """How the processes of a silo divide its training among them; the silo is one client of the federation.

    Each process reads an equal part of the silo's training data, as under Lightning's own strategies, and all of its
    validation data.

    Args:
        ranks: Number of processes of each silo; consecutive ranks are one silo. None: each machine is a silo.

    Raises:
        ValueError: If it is not positive.
    """

    ranks: int | None = None
    spreads_parameters: ClassVar[bool] = False
    """Whether each process holds only a shard of the parameters."""

    def __post_init__(self) -> None:
        if self.ranks is not None and self.ranks < 1:
            raise ValueError(f"{type(self).__name__}(ranks={self.ranks}): expected at least 1, or None.")

    def check(self, algorithm: Algorithm, aggregator: Any, transforms: Any) -> None:
        """Refuses combinations that can't be computed from the parameters of one process.

        Raises:
            ValueError: If they can't be.
        """
        return

    def check_module(self, module: nn.Module) -> None:
        """Refuses a module that does not fit.

        Raises:
            ValueError: If it is sharded differently from the silo.
        """
        for name, part in module.named_modules():
            if isinstance(part, FullyShardedDataParallel):
                raise ValueError(
                    f"{name or 'The module'} is wrapped in FullyShardedDataParallel, whose flat parameters can't be "
                    "averaged by name. Use fully_shard in configure_model, and silo=fl.silos.FSDP2()."
                )


@dataclass(frozen=True)
class DDP(Silo):
    """Each process of a silo holds the whole model; gradients are averaged over the processes in each step.

    As with Lightning's ``DDPStrategy``, BatchNorm's statistics are those of the silo's first process. Silos may have
    different numbers of processes.

    Example:
        >>> from lightning_fl.strategies import FederatedStrategy
        >>> strategy = FederatedStrategy("fedavg", silo=DDP(ranks=2))
    """


@dataclass(frozen=True)
class FSDP2(Silo):
    """Each process of a silo holds a shard of each parameter, created by ``fully_shard`` in ``configure_model``.

    Modules written for Lightning's ``ModelParallelStrategy`` run unchanged: ``self.device_mesh["data_parallel"]`` are
    the processes of the silo. A process sends its shards only to those with the same shards in the other silos. Float
    buffers are averaged over the silo.

    Raises:
        ValueError: With algorithms, aggregators and transforms that need the norm or shape of a whole update.
    """

    spreads_parameters: ClassVar[bool] = True

    def check(self, algorithm: Algorithm, aggregator: Any, transforms: Any) -> None:
        wrong = [type(own).__name__ for own in transforms if not own.is_elementwise]
        if type(aggregator) is not WeightedMean:
            wrong.append(type(aggregator).__name__)
        if not algorithm.is_elementwise:
            wrong.append(type(algorithm).__name__)
        if wrong:
            raise ValueError(
                f"With silo=fl.silos.FSDP2() no process holds a whole update, but {', '.join(wrong)} needs its norm or "
                "shape. Use silo=fl.silos.DDP(), or leave it out."
            )

    def check_module(self, module: nn.Module) -> None:
        super().check_module(module)
        for name, param in module.named_parameters():
            if not is_spread(param):
                if param.requires_grad:
                    raise ValueError(
                        f"The trainable parameter {name!r} is not sharded over the silo, so its gradient would not be "
                        "averaged. Call fully_shard on the module that holds it, in configure_model."
                    )
            elif param.device_mesh.ndim != 1:  # type: ignore[attr-defined]
                raise ValueError(
                    f"The parameter {name!r} is sharded in {param.device_mesh.ndim} dimensions, "  # type: ignore[attr-defined]
                    'expected one: pass mesh=self.device_mesh["data_parallel"] to fully_shard, and leave out tensor '
                    "parallelism."
                )
