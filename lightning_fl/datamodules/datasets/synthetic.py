"""Synthetic(alpha, beta): generated clients that differ in their models and features."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from lightning_fl.datamodules.natural import ClientData, NaturalDataModule
from lightning_fl.seeding import derive_seed


class SyntheticDataModule(NaturalDataModule):
    r"""Synthetic(alpha, beta) of FedProx: each client has its own softmax model and feature distribution.

    Client :math:`k` draws :math:`u_k \sim N(0, \alpha)`, :math:`B_k \sim N(0, \beta)`, a model :math:`W_k, b_k \sim
    N(u_k, 1)` and a centre :math:`v_k \sim N(B_k, 1)`; its samples are :math:`x \sim N(v_k, \Sigma)` with
    :math:`\Sigma_{jj} = j^{-1.2}`, and :math:`y = \arg\max(W_k x + b_k)`. It has :math:`e^{4 + 2z} + 50` samples,
    :math:`z \sim N(0, 1)`. :math:`\alpha` and :math:`\beta` are variances, as in the paper; the paper's code uses them
    as standard deviations, which makes no difference at 0 and 1.

    Samples are float32 of shape ``[num_features]``, labels int64.

    A client's data is generated from the seed and its id when it is needed, so a million clients are as cheap as ten.

    Args:
        alpha: Variance :math:`\alpha` between the clients' models, at least 0.
        beta: Variance :math:`\beta` between the clients' feature distributions, at least 0.
        num_clients: Number of clients.
        iid: Whether all clients share one model and one feature distribution, with centre 0.
        num_features: Number of features.
        num_classes: Number of classes.
        max_size: Maximum number of samples per client. None: no limit; a few clients then have most of the samples.
        batch_size: Examples per training batch.
        test_share: Fraction of each client's samples held out for test, in [0, 1).
        **kwargs: ``val_share``, ``seed`` (also of the data), ``num_workers`` and ``eval_batch_size``; see
            :class:`NaturalDataModule`.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Li et al., *Federated Optimization in Heterogeneous Networks* (FedProx), 2020, arXiv:1812.06127.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        num_clients: int = 30,
        iid: bool = False,
        num_features: int = 60,
        num_classes: int = 10,
        max_size: int | None = None,
        batch_size: int = 10,
        test_share: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, test_share=test_share, **kwargs)
        if min(alpha, beta) < 0:
            raise ValueError(f"alpha={alpha} and beta={beta} are variances and must be at least 0.")
        if num_clients < 1 or num_features < 1 or num_classes < 2:
            raise ValueError(
                f"num_clients={num_clients} and num_features={num_features} must be at least 1, and "
                f"num_classes={num_classes} at least 2."
            )
        if max_size is not None and max_size < 1:
            raise ValueError(f"max_size={max_size} must be at least 1, or None for no limit.")
        self.alpha, self.beta, self.iid = alpha, beta, iid
        self.num_clients, self.num_features, self.num_classes = num_clients, num_features, num_classes
        self.max_size = max_size

    def read(self) -> ClientData:
        """The clients; no data is generated yet."""
        return ClientData(range(self.num_clients), lambda client: int(self._sizes[client]), self._generate)

    @cached_property
    def _sizes(self) -> np.ndarray:
        # From a separate random stream, so that sizes are known without generating any client's data.
        normal = np.random.default_rng(derive_seed(self.seed, "synthetic sizes")).standard_normal(self.num_clients)
        sizes = np.exp(4 + 2 * normal) + 50
        return np.minimum(sizes, self.max_size or np.inf).astype(np.int64)

    def _generate(self, client: int) -> TensorDataset:
        rng = np.random.default_rng(derive_seed(self.seed, "synthetic", client))
        if self.iid:
            shared = np.random.default_rng(derive_seed(self.seed, "synthetic model"))
            weight, bias, centre = *self._draw_model(shared, 0.0), np.zeros(self.num_features)
        else:
            weight, bias = self._draw_model(rng, rng.normal(0, self.alpha**0.5))
            centre = rng.normal(rng.normal(0, self.beta**0.5), 1, self.num_features)
        std = np.arange(1, self.num_features + 1) ** -0.6
        x = centre + std * rng.standard_normal((self._sizes[client], self.num_features))
        y = (x @ weight + bias).argmax(axis=1)
        return TensorDataset(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y))

    def _draw_model(self, rng: np.random.Generator, mean: float) -> Sequence[np.ndarray]:
        return rng.normal(mean, 1, (self.num_features, self.num_classes)), rng.normal(mean, 1, self.num_classes)
