"""The Lightning strategy for parties that hold different columns of the same rows."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fl.communication import Group, Message, all_hold_the_same, launched_group
from lightning_fl.vertical.channel import Channel
from lightning_fl.vertical.loader import SharedOrder
from lightning_fl.vertical.protection import GradientNoise


class VerticalStrategy(SingleDeviceStrategy):
    """Trains one network that is split among several parties, which hold different columns of the same rows.

    Every party runs its own Trainer with its own module, a :class:`Party`, and optimizer. For each batch the party with
    the labels receives the others' activations, computes the loss, and sends each party the gradient of its
    activations. The result is the network that a single owner of all columns would train.

    Args:
        labels: Rank of the party with the labels, which shows the progress and logs. Default 0.
        name: This party's name, which the others report if it is lost. Default: none.
        protection: Protects the gradients that the party with the labels sends. None: no protection. Not with clipping
            by norm, for which parties reveal the norms of their gradients to each other.
        timeout: Seconds that a party waits for another one. Default 1800.
        device: Device of this party's part. Default ``"cpu"``.

    Raises:
        ValueError: On every party when training starts, if they differ in rows, their order, batches or settings.

    Reference:
        Vepakomma et al., "Split Learning for Health", 2018.
    """

    strategy_name = "vertical"

    def __init__(
        self,
        labels: int = 0,
        name: str = "",
        protection: GradientNoise | None = None,
        timeout: float = 1800.0,
        device: str = "cpu",
    ) -> None:
        super().__init__(device=device)
        self.labels, self.name, self.protection = labels, name, protection
        self.timeout = timedelta(seconds=timeout)
        self.group: Group | None = None
        self.channel: Channel
        self._waiting: dict[int, Tensor] = {}
        self._served: dict[int, Tensor] = {}

    @property
    def has_labels(self) -> bool:
        """Whether this party has the labels."""
        assert self.group is not None
        return self.group.rank == self.labels

    def setup_environment(self) -> None:
        super().setup_environment()
        if self.group is None:
            self.group = launched_group(self.timeout)
            if self.group.size < 2:
                raise ValueError("Vertical training needs at least two parties, but there is one. Start with torchrun.")
            if not 0 <= self.labels < self.group.size:
                raise ValueError(f"labels={self.labels} is not a rank; there are {self.group.size} parties.")
            hello = {"labels": self.labels, "name": self.name[:100]}
            told = [message.fields for message in self.group.all_gather(Message(hello), "parties")]
            if any(fields["labels"] != self.labels for fields in told):
                raise ValueError(f"The parties have different values of labels: {[f['labels'] for f in told]}.")
            self.channel = Channel(self.group, [str(fields["name"])[:100] for fields in told])
        shown = 0 if self.has_labels else 1 + self.group.rank
        rank_zero_only.rank = fabric_rank_zero_only.rank = shown  # type: ignore[attr-defined]

    @property
    def is_global_zero(self) -> bool:
        return self.group is None or self.has_labels

    def setup(self, trainer: L.Trainer) -> None:
        super().setup(trainer)
        assert self.group is not None
        self._waiting.clear()
        self._served.clear()
        if str(trainer.precision).startswith("16"):
            raise ValueError("Precision 16 scales each party's loss differently. Use 32, 64 or bf16-mixed.")
        settings = {
            "stage": str(trainer.state.fn),
            "max_epochs": trainer.max_epochs,
            "max_steps": trainer.max_steps,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradient_clip_val": trainer.gradient_clip_val,
            "gradient_clip_algorithm": str(trainer.gradient_clip_algorithm),
            "precision": str(trainer.precision),
            "num_sanity_val_steps": trainer.num_sanity_val_steps,
        }
        self._check_same(settings, "settings")
        told = {"problem": self._tells_of_labels(trainer)}
        for message in self.group.all_gather(Message(told), "protection"):
            if message.fields["problem"]:
                raise ValueError(str(message.fields["problem"])[:500])

    def _tells_of_labels(self, trainer: L.Trainer) -> str:
        """How the party with the labels would leak them despite protected gradients; empty if it would not."""
        by_norm = trainer.gradient_clip_val and trainer.gradient_clip_algorithm != "value"
        if self.protection is None or not self.has_labels or not by_norm:
            return ""
        return (
            f"gradient_clip_val={trainer.gradient_clip_val} clips by the norm over all parties, so the party with the "
            f"labels would reveal the norm of its gradients, which {type(self.protection).__name__} hides. Use "
            "gradient_clip_algorithm='value', which each party does by itself, or train without clipping."
        )

    def on_train_start(self) -> None:
        trainer = self.lightning_module.trainer  # type: ignore[union-attr]
        # After loading a checkpoint: parties that resume from different checkpoints would train on different rows.
        self._check_same({"epoch": trainer.current_epoch, "global_step": trainer.global_step}, "start")

    def process_dataloader(self, dataloader: object) -> object:
        # Lightning wraps the batch sampler of a prediction loader; the order is inside.
        batches: Any = dataloader.batch_sampler if isinstance(dataloader, DataLoader) else None
        order = getattr(batches, "sampler", None)
        if batches is None or not isinstance(order, SharedOrder):
            raise ValueError(
                f"The parties need the same rows in each batch, which {type(dataloader).__name__} does not ensure. "
                "Create it with fl.vertical.aligned_loader(dataset, ids, batch_size, shuffle=True)."
            )
        assert self.group is not None
        settings = {"batch_size": batches.batch_size, "drop_last": batches.drop_last, "rows": len(order)}
        self._check_same({**settings, "seed": order.seed, "shuffle": order.shuffle}, "loaders")
        # The error does not show the hash of the ids, which would allow testing guesses.
        if not all_hold_the_same(self.group, order.digest, "ids"):
            raise ValueError("The parties' rows differ, or are in a different order. Align them with lightning-fl psi.")
        return dataloader

    def _check_same(self, settings: dict[str, Any], topic: str) -> None:
        assert self.group is not None
        for rank, message in enumerate(self.group.all_gather(Message(settings), topic)):
            for key, value in settings.items():
                if message.fields.get(key) != value:
                    raise ValueError(
                        f"{self.channel.name(rank)} has {key}={message.fields.get(key)!r}, this party {value!r}. All "
                        "parties need the same value."
                    )

    # ---- a batch

    def gather(self, own: Tensor | None) -> list[Tensor | None]:
        """At the party with the labels: the activations of all, in the order of ranks."""
        assert self.group is not None
        if self._waiting:
            raise RuntimeError(
                "The other parties are still waiting for the gradients of the last batch: training_step has to return "
                "the loss of each batch, and manual optimization has to call manual_backward."
            )
        parts: list[Tensor | None] = []
        for rank in range(self.group.size):
            if rank == self.group.rank:
                parts.append(own)
                continue
            rows = None if own is None else len(own)
            part = self.channel.receive(rank, (rows, None)).to(self.root_device)
            if torch.is_grad_enabled():
                self._waiting[rank] = part.requires_grad_()
            parts.append(part)
        return parts

    def hand_over(self, own: Tensor) -> Tensor:
        """At every other party: a scalar through which the gradient of the loss flows; 0 in evaluation."""
        if own.dim() != 2:
            raise ValueError(f"exchange takes activations [rows, width]; found the shape {tuple(own.shape)}.")
        self.channel.send(own, self.labels)
        if not torch.is_grad_enabled():
            return own.new_zeros(())
        gradient = self.channel.receive(self.labels, tuple(own.shape), own.dtype)
        return (own * gradient.to(own.device)).sum()

    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        waiting, self._waiting = self._waiting, {}
        for rank, part in waiting.items():
            gradient = torch.zeros_like(part) if part.grad is None else part.grad
            # Each party's Trainer divides its loss by this number, so the gradient would be divided twice.
            gradient = gradient * self.lightning_module.trainer.accumulate_grad_batches  # type: ignore[union-attr]
            self.channel.send(gradient if self.protection is None else self.protection(gradient), rank)

        served, self._served = self._served, {}
        for rank, own in served.items():
            self.channel.send(torch.zeros_like(own) if own.grad is None else own.grad, rank)

    def serve(self, middle: Callable[[Tensor], Tensor], client: int) -> Tensor:
        """At the party with the middle of a network: the scalar to return as the loss."""
        own = self.channel.receive(client, (None, None)).to(self.root_device)
        trains = torch.is_grad_enabled()
        found = middle(own.requires_grad_(trains))
        self.channel.send(found, client)
        if not trains:
            return found.new_zeros(())
        self._served[client] = own
        gradient = self.channel.receive(client, tuple(found.shape), found.dtype).to(found.device)
        return (found * gradient).sum() * self.lightning_module.trainer.accumulate_grad_batches  # type: ignore[union-attr]

    def norm_of_all(self, squared: Tensor) -> Tensor:
        """The norm of the gradient over all parties."""
        assert self.group is not None
        return self.group.all_reduce(squared.detach().double().cpu()).sqrt()

    # ---- checkpoints: each party writes its own

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, self._own(filepath), storage_options=storage_options)

    def remove_checkpoint(self, filepath: Any) -> None:
        self.checkpoint_io.remove_checkpoint(self._own(filepath))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return super().load_checkpoint(self._own(checkpoint_path), weights_only)

    def _own(self, path: Any) -> Path:
        """A separate file for each party, even if several write into one folder."""
        path = Path(path)
        if self.group is None or self.has_labels:
            return path
        prefix = f"party{self.group.rank}-"
        return path if path.name.startswith(prefix) else path.with_name(prefix + path.name)


class Party(L.LightningModule):
    """One party's part of the network.

    ``training_step`` computes the activations of its columns and calls :meth:`exchange`. At the party with the labels
    this returns the activations of all parties, from which it computes the loss; at every other party it returns the
    scalar that ``training_step`` has to return as the loss.

    Example:
        >>> class Part(Party):
        ...     def training_step(self, batch, batch_idx):
        ...         parts = self.exchange(self.bottom(batch[0]))
        ...         if not self.has_labels:
        ...             return parts
        ...         return torch.nn.functional.cross_entropy(self.top(torch.cat(parts, 1)), batch[1])
    """

    @property
    def vertical(self) -> VerticalStrategy:
        """The strategy.

        Raises:
            ValueError: If the Trainer has another strategy.
        """
        strategy = self.trainer.strategy
        if not isinstance(strategy, VerticalStrategy):
            raise ValueError(
                f"{type(self).__name__} is one of several parties: Trainer(strategy=VerticalStrategy(...))."
            )
        return strategy

    @property
    def has_labels(self) -> bool:
        """Whether this is the party with the labels."""
        return self.vertical.has_labels

    def exchange(self, h: Tensor | None) -> Any:
        """Exchanges activations and, in training, their gradients.

        Args:
            h: This party's activations ``[rows, width]``. None at a party with the labels and no columns.

        Returns:
            At the party with the labels, the list of all parties' activations in the order of ranks. At others, a
            scalar to return as the loss.
        """
        strategy = self.vertical
        if strategy.has_labels:
            return [part for part in strategy.gather(h) if part is not None]
        if h is None:
            raise ValueError("Only the party with the labels may have no activations.")
        return strategy.hand_over(h)

    def remote(self, h: Tensor, server: int) -> Tensor:
        """Sends activations through the middle of the network at another party: a U-shaped split.

        The labels stay here, with the first and the last layers; the other party calls :meth:`serve`.

        Args:
            h: Activations ``[rows, width]``.
            server: Rank of the party with the middle.

        Returns:
            The output of the middle, ``[rows, other width]``; gradients flow back through it.
        """
        strategy = self.vertical
        protection = strategy.protection if strategy.has_labels else None
        found: Tensor = _Remote.apply(h, strategy.channel, server, protection)
        return found

    def serve(self, middle: Callable[[Tensor], Tensor], client: int) -> Tensor:
        """Answers the party that calls :meth:`remote`.

        Args:
            middle: The layers that this party has.
            client: Rank of that party.

        Returns:
            The scalar that ``training_step`` has to return as the loss.
        """
        return self.vertical.serve(middle, client)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips by the norm of the gradient over all parties, who exchange the norms of theirs."""
        if not gradient_clip_val or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        squared = sum(
            (grad.detach().double().square().sum().cpu() for grad in grads), torch.zeros((), dtype=torch.double)
        )
        factor = float((gradient_clip_val / (self.vertical.norm_of_all(squared) + 1e-6)).clamp(max=1.0))
        for grad in grads:
            grad.mul_(factor)


class _Remote(torch.autograd.Function):
    """The middle of a network at another party, as an autograd function."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, channel: Channel, server: int, protection: GradientNoise | None) -> Tensor:
        ctx.protection = protection
        ctx.channel, ctx.server, ctx.shape, ctx.dtype = channel, server, tuple(h.shape), h.dtype
        channel.send(h, server)
        return channel.receive(server, (len(h), None)).to(h.device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.channel.send(gradient if ctx.protection is None else ctx.protection(gradient), ctx.server)
        return ctx.channel.receive(ctx.server, ctx.shape, ctx.dtype).to(gradient.device), None, None, None
