"""The rounds of a workload by pfl-research, where it is installed; as its own CIFAR10 benchmark runs them."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from workloads import Workload, make_network


class WithLoss(nn.Module):
    """A network with the methods that pfl calls."""

    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.network = make_network(work)

    def loss(self, inputs: Tensor, labels: Tensor, is_eval: bool = False) -> Tensor:
        return functional.cross_entropy(self.network(inputs), labels)

    def metrics(self, inputs: Tensor, labels: Tensor, is_eval: bool = False) -> dict[str, Any]:
        return {}


def pfl_round_ms(work: Workload, data: tuple[Tensor, Tensor]) -> float | None:
    """The median milliseconds of its rounds but the first; None if pfl is not installed.

    pfl computes on a GPU if there is one.
    """
    try:
        from pfl.aggregate.simulate import SimulatedBackend
        from pfl.aggregate.weighting import WeightByDatapoints
        from pfl.algorithm.base import NNAlgorithmParams
        from pfl.algorithm.federated_averaging import FederatedAveraging
        from pfl.callback.base import TrainingProcessCallback
        from pfl.data.federated_dataset import FederatedDataset
        from pfl.data.pytorch import PyTorchTensorDataset
        from pfl.data.sampling import get_user_sampler
        from pfl.hyperparam.base import NNTrainHyperParams
        from pfl.metrics import Metrics
        from pfl.model.pytorch import PyTorchModel
    except ImportError:
        return None

    def client(number: int) -> Any:
        return PyTorchTensorDataset(tuple(tensor[number, : work.sizes[number]] for tensor in data))

    class Clock(TrainingProcessCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def after_central_iteration(self, *args: Any, **kwargs: Any) -> Any:
            if data[0].is_cuda:
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())
            return False, Metrics()

    network, clock = WithLoss(work), Clock()
    server = torch.optim.SGD(network.parameters(), lr=1.0)
    clients = FederatedDataset(client, get_user_sampler("random", list(range(work.clients))))
    backend = SimulatedBackend(clients, clients, postprocessors=[WeightByDatapoints()])
    params = NNAlgorithmParams(
        central_num_iterations=work.rounds,
        evaluation_frequency=10**9,
        train_cohort_size=work.per_round,
        val_cohort_size=0,
    )
    local = NNTrainHyperParams(local_batch_size=work.batch, local_num_epochs=1, local_learning_rate=work.lr)
    model = PyTorchModel(network, torch.optim.SGD, server)
    FederatedAveraging().run(params, backend, model, local, None, [clock], send_metrics_to_platform=False)
    seconds = [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]
    return round(1000 * statistics.median(seconds), 1)
