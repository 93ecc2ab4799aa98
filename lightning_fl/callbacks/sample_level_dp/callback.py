"""Sample-level differential privacy: DP-SGD inside each client."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import SystemRandom
from typing import Any
from weakref import WeakSet

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_fl.callbacks.federated import FederatedCallback
from lightning_fl.callbacks.sample_level_dp import accounting
from lightning_fl.callbacks.sample_level_dp.checks import check_settings, check_training
from lightning_fl.callbacks.sample_level_dp.strict import StrictGradients
from lightning_fl.data.client_loaders import ClientLoaders, Loader
from lightning_fl.privacy.accounting.bounds import Method
from lightning_fl.privacy.accounting.ledger import Epsilon, Gaussian, Ledger
from lightning_fl.privacy.accounting.per_client import dominating, exceeding, largest_epsilon
from lightning_fl.privacy.client_level.mechanism import GRID, PrivacyBudgetExceeded
from lightning_fl.privacy.noise import PrivacyError, check_source, warn_of_test_seed
from lightning_fl.privacy.sample_level.dp_sgd import NoiseWatch, NoisySum
from lightning_fl.privacy.sample_level.per_sample import GradSampleMode, PerSampleGradients, opacus_hooks
from lightning_fl.privacy.sample_level.poisson_loader import DrawCheck, PoissonLoader, check_sampler, poisson_loaders
from lightning_fl.privacy.sample_level.rows import num_rows, take_rows
from lightning_fl.privacy.sample_level.self_check import SelfCheck, unlike_examples
from lightning_fl.privacy.sample_level.shared_examples import SharedExamples
from lightning_fl.privacy.sample_level.tensor_watch import TensorWatch
from lightning_fl.privacy.state import pack
from lightning_fl.seeding import Randomness, derive_seed, isolated_randomness
from lightning_fl.strategies import FederatedStrategy
from lightning_fl.strategies import internals as internals
from lightning_fl.strategies.out_of_loop import out_of_loop, state_of_training
from lightning_fl.strategies.round_view import RoundView
from lightning_fl.types import Aggregate, ClientId, LocalRun, Update

ADVERSARY = "whoever sees what a client sends, its server included, but not the training metrics that the module logs"
TOLERANCES = {"64-true": 1e-6, "32-true": 2e-3, "bf16-mixed": 2e-3}
"""Tolerance for gradients that should be equal; they are compared without autocast."""
MEAN_TOLERANCES = {"64-true": 1e-6, "32-true": 2e-3, "bf16-mixed": 0.1}
"""Tolerance between a step's gradient and the mean of the per-sample ones, in the precision of training."""
BATCH_HOOKS = ("on_train_batch_start", "on_train_batch_end")


# Weak references, because remembering a module must not keep its tensors in memory.
_TRAINED: WeakSet[L.LightningModule] = WeakSet()
"""Modules that have been trained by a callback of this class."""


@dataclass
class _ClientTraining:
    """A client's local training in a round.

    Args:
        client: The client.
        loader: Draws its batches.
        noise: Sums clipped gradients and adds noise to them.
        steps_left: Steps that its ledger records and that it has not taken yet.
        counts: How often each of its examples was drawn.
        check_at: The step before which the self-check runs, or the next one whose batch is not empty.
        should_stop: Whether training was to stop when the client started.
        sizes: The sizes of its batches.
        steps_taken: Steps that the optimizer has taken.
        is_checked: Whether the self-check has run.
    """

    client: ClientId
    loader: PoissonLoader
    noise: NoisySum
    steps_left: int
    counts: np.ndarray
    check_at: int
    should_stop: bool
    sizes: list[int] = field(default_factory=list)
    steps_taken: int = 0
    is_checked: bool = False


class SampleLevelDP(FederatedCallback):
    r"""Sample-level differential privacy: each client trains by DP-SGD, on an unmodified LightningModule.

    .. math::
        g = \frac{1}{q n} \Bigl(\sum_{i \in B} g_i \min(1, C / \lVert g_i \rVert) + \mathcal{N}(0, z^2 C^2)\Bigr)

    replaces a batch's gradient, where each of a client's :math:`n` examples is in the batch :math:`B` with probability
    :math:`q = \min(1, b / n)` for a ``batch_size`` of b, drawn from the operating system's randomness. An empty batch
    releases noise only. Changes of gradients by an algorithm, such as FedProx, and the optimizer's step come after.
    The guarantee protects the presence of one example of a client, in everything that the client sends in all its
    rounds; a client's numbers of examples and steps are public, and so is its participation.

    Each client's state, and so the checkpoint, holds a ledger over all its rounds; a round's steps are recorded before
    the client trains. Every round logs the largest epsilon of any client. Settings that break the guarantee are
    refused. The batches, the per-sample gradients, the clipping and the noise are checked when training starts and in
    every round; if a check fails, the run ends.

    Args:
        noise_multiplier: The noise :math:`z`, relative to the clip norm. 0 only clips, which is NOT PRIVATE.
        max_grad_norm: The clip norm :math:`C`, over all trained parameters of an example's gradient.
        delta: The delta at which epsilon holds.
        target_epsilon: Instead of ``noise_multiplier``: uses the smallest noise with which no client's epsilon exceeds
            this, if it takes part in all of ``max_epochs`` rounds.
        max_epsilon: Training stops before a round that would raise a client's epsilon above it. None:
            ``target_epsilon``.
        max_physical_batch_size: Maximum number of examples in a forward pass; larger batches are split. None: no limit.
        method: The accountant, as for :meth:`fl.privacy.Ledger.epsilon`.
        grad_sample_mode: ``"hooks"``: Opacus's rules for known layers; ``"functorch"``: any layer, slower.
        strict: Whether each example is collated alone and goes through ``training_step`` alone, under
            ``torch.func.vmap``, so that by construction no code can combine two examples; otherwise this is checked. It
            allows penalties and parameters of the module itself; batches must hold tensors in which every example has
            the same shape. A step takes about twice the time.
        insecure_test_seed: Makes batches and noise reproducible, for tests; the run is then NOT PRIVATE, and stays so
            if it is resumed without the seed.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: When training starts, if another setting breaks the guarantee.
        ImportError: If the ``privacy`` extra is not installed.

    Reference:
        Abadi et al., "Deep Learning with Differential Privacy", CCS 2016.

    Example:
        >>> import lightning as L
        >>> callbacks = [SampleLevelDP(noise_multiplier=1.0, max_grad_norm=1.0)]
        >>> trainer = L.Trainer(strategy="fedavg", callbacks=callbacks, logger=False, accelerator="cpu")
    """

    keeps_client_state = True
    protects_examples = True

    def __init__(
        self,
        noise_multiplier: float | None = None,
        max_grad_norm: float = 1.0,
        delta: float = 1e-5,
        target_epsilon: float | None = None,
        max_epsilon: float | None = None,
        max_physical_batch_size: int | None = None,
        method: Method = "pld",
        grad_sample_mode: GradSampleMode = "hooks",
        insecure_test_seed: int | None = None,
        strict: bool = False,
    ) -> None:
        if (noise_multiplier is None) == (target_epsilon is None):
            raise ValueError(
                f"SampleLevelDP got noise_multiplier={noise_multiplier} and target_epsilon={target_epsilon}; give "
                "exactly one of them: the noise, or the largest epsilon."
            )
        if noise_multiplier is not None:
            # Built for its checks only.
            Gaussian(noise_multiplier)
        for name, value in (("max_grad_norm", max_grad_norm), ("target_epsilon", target_epsilon)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"SampleLevelDP got {name}={value}; expected a positive number.")
        if max_epsilon is not None and not max_epsilon > 0:
            raise ValueError(f"SampleLevelDP got max_epsilon={max_epsilon}; expected a positive number.")
        if max_physical_batch_size is not None and max_physical_batch_size < 1:
            raise ValueError(
                f"SampleLevelDP got max_physical_batch_size={max_physical_batch_size}; expected at least 1."
            )
        if grad_sample_mode not in ("hooks", "functorch"):
            raise ValueError(
                f"SampleLevelDP got grad_sample_mode={grad_sample_mode!r}; expected 'hooks' or 'functorch'. "
                "Ghost clipping needs a second backward pass, which automatic optimization does not allow; to save "
                "memory, set max_physical_batch_size."
            )
        if strict and grad_sample_mode != "hooks":
            raise ValueError(
                f"SampleLevelDP got strict=True and grad_sample_mode={grad_sample_mode!r}, which strict=True ignores: "
                "leave one out."
            )
        # Both calls only check: a wrong delta or method, or a missing extra, is reported here and not after a round.
        Ledger().epsilon(delta, method)
        opacus_hooks()
        self.noise_multiplier = noise_multiplier
        self.max_grad_norm = float(max_grad_norm)
        self.delta = delta
        self.target_epsilon = target_epsilon
        self.max_epsilon = target_epsilon if max_epsilon is None else max_epsilon
        self.max_physical_batch_size = max_physical_batch_size
        self.method: Method = method
        self.grad_sample_mode: GradSampleMode = grad_sample_mode
        self.insecure_test_seed = insecure_test_seed
        self.strict = strict
        if insecure_test_seed is not None:
            warn_of_test_seed()
        self._next_round = 0
        self._was_without = self._was_insecure = False
        self._round = 0
        self._training: _ClientTraining | None = None
        self._drawn: deque[np.ndarray] = deque()
        self._draws = DrawCheck()
        self._watch = NoiseWatch()
        self._chosen_sigma: float | None = None
        self._size = 0
        self._has_gradient = self._has_checked = False
        self._words: dict[str, str] = {}
        self._gradients: PerSampleGradients | StrictGradients | None = None
        self._handles: list[Any] = []
        self._params = self._buffers = TensorWatch(dict, "")
        self._has_warned_of_delta = False
        self._shared = SharedExamples()
        self._released: dict[str, float] = {}
        """Noise multipliers of the releases by preprocessing about the clients' data, by id."""

    @property
    def is_private(self) -> bool:  # type: ignore[override]
        """Whether there is noise, and it is unpredictable."""
        return self.noise_multiplier != 0 and self.insecure_test_seed is None

    @property
    def _sigma(self) -> float:
        """The noise multiplier of the current fit."""
        assert self._chosen_sigma is not None, "training has not started"
        return self._chosen_sigma

    # ---- before the rounds

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses settings that break the guarantee and are known before the data is loaded."""
        if stage == "fit":
            check_settings(trainer, pl_module, self.strict)

    def wrap_loaders(self, loaders: ClientLoaders) -> ClientLoaders:
        """Replaces each client's loader by one that draws Poisson batches."""
        return poisson_loaders(loaders, self._poisson_loader)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Checks sampler and noise, chooses the noise multiplier, and attaches the hooks."""
        optimizer = check_training(trainer, pl_module, self.strict)
        check_sampler()
        check_source()
        # Parameters that no optimizer steps are not released, so they don't count in the clipped norm.
        trained = {id(param) for group in optimizer.param_groups for param in group["params"]}
        params = {
            name: param for name, param in pl_module.named_parameters() if param.requires_grad and id(param) in trained
        }
        if self.target_epsilon is None:
            assert self.noise_multiplier is not None
            sigma = self.noise_multiplier
        else:
            sigma = accounting.calibrate(trainer, _view(trainer), self.target_epsilon, self.delta, self.method)
        self._chosen_sigma = sigma
        self._draws = DrawCheck()
        self._drawn.clear()
        self._watch = NoiseWatch()
        if trainer.current_epoch == 0:
            # A new callback does not know the releases of another one about the same clients.
            if self._next_round or pl_module in _TRAINED:
                rank_zero_warn(
                    "This fit starts at round 0, and its clients start with new ledgers. If their data are those of "
                    "the last fit, add that fit's ledgers, which SampleLevelDP.ledgers(trainer) returns."
                )
            self._next_round, self._was_without, self._was_insecure = 0, False, False
            self._released = {}
        self._book_release(trainer)
        _TRAINED.add(pl_module)
        # Noise from a known seed protects nobody; a run resumed without the seed must still know that it was used.
        self._was_without |= self._was_insecure and self.insecure_test_seed is None
        self._detach()
        try:
            if self.strict:
                self._gradients = StrictGradients(pl_module, params, trainer.precision_plugin.train_step_context)
            else:
                tolerance = MEAN_TOLERANCES[str(trainer.precision)]
                self._gradients = PerSampleGradients(pl_module, params, self.grad_sample_mode, tolerance)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._has_checked = False
        self._buffers = TensorWatch(
            lambda: {name: value for name, value in pl_module.named_buffers() if value.is_floating_point()},
            "No hook or callback may write to the module's buffers.",
        )
        if not sigma:
            rank_zero_warn("SampleLevelDP(noise_multiplier=0) only clips: this run is NOT PRIVATE.")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Removes the hooks."""
        self._detach()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Removes the hooks."""
        self._detach()

    # ---- a round

    def on_round_start(
        self, trainer: L.Trainer, module: L.LightningModule, round: int, cohort: Sequence[ClientId], view: RoundView
    ) -> None:
        """Checks the settings again, and that no client of this rank exceeds its budget in the round."""
        check_settings(trainer, module, self.strict)
        if self.insecure_test_seed is None:
            check_source()
        # All parameters that leave the client, not only those of the optimizer: a code book or a prototype that
        # training_step writes to would leave without noise. Determined again in each round, since callbacks freeze and
        # unfreeze layers.
        trainable = view.trainer.tensors.trainable
        self._params = TensorWatch(
            lambda: trainable,
            "Only the optimizer's step may change parameters that require a gradient: no Embedding(max_norm=...), and "
            "no writing to parameters, such as a code book or prototypes, in training_step or hooks. Values that may "
            "differ between clients can be a personal buffer.",
        )
        # Rounds in between were trained without this callback, so without noise.
        self._was_without |= round > self._next_round
        self._round = round
        # The ranks of a simulation are one party: each also checks the examples of the other ranks' clients.
        if view.population.silos is None:
            for client in view.cohort:
                if client not in view.clients:
                    self._check_shared(client, accounting.loader_of(view, client))
        if self.max_epsilon is not None:
            before = self._before_training()
            after = [
                before + accounting.ledger_of(view, client) + accounting.cost_of(view, client, self._sigma)
                for client in view.clients
            ]
            self._check_budget(view, after)

    def on_client_start(self, trainer: L.Trainer, module: L.LightningModule, client: ClientId, view: RoundView) -> None:
        """Records the releases of the client's training in its ledger, before it trains."""
        cost, loader = accounting.cost_of(view, client, self._sigma), accounting.loader_of(view, client)
        # Recorded before the first step and outside the round's transaction: even a failed round may have released
        # something.
        view.record_ledger(client, pack((accounting.ledger_of(view, client) + cost).state_dict()))
        noise = NoisySum(
            self._sigma,
            self.max_grad_norm,
            loader.expected_batch_size,
            self._watch,
            self.insecure_test_seed,
            self._round,
            str(client),
        )
        num_steps, counts = sum(accounting.steps_of(view, client)), np.zeros(loader.num_examples, dtype=np.int64)
        # For the first client its first step, because a module may store something of the first batch that it sees;
        # otherwise an unpredictable step.
        check_at = SystemRandom().randrange(max(num_steps, 1)) if self._has_checked else 0
        self._training = _ClientTraining(client, loader, noise, num_steps, counts, check_at, bool(trainer.should_stop))
        self._params.note()
        self._buffers.note()
        self._check_shared(client, loader)
        if loader.num_examples * self.delta >= 1 and not self._has_warned_of_delta:
            self._has_warned_of_delta = True
            rank_zero_warn(
                f"delta={self.delta:g} is not below 1 / {loader.num_examples}, the examples of client {client!r}: "
                "that would allow revealing one of them. Use a smaller delta."
            )

    def on_phase_end(self, trainer: L.Trainer, module: L.LightningModule, client: ClientId, view: RoundView) -> None:
        """Checks that no parameter was written to since the phase's last step."""
        self._params.check("after the last step")

    def on_next_phase(self, trainer: L.Trainer, module: L.LightningModule, client: ClientId, view: RoundView) -> None:
        """Records the model that the algorithm loaded for another phase."""
        self._params.note()
        self._buffers.note()

    def run_training_step(
        self, trainer: L.Trainer, module: L.LightningModule, step: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Runs the step on the batch in parts, and adds the clipped gradients of all parts but the last."""
        assert self._gradients is not None
        batch, rest = args[0], args[1:]
        size, training = self._take_draw(batch), self._training
        assert training is not None
        self._size = 0
        self._params.check("between two steps")
        self._buffers.check("between two steps")
        if not size:
            # An empty batch takes a step on noise alone: skipping it would reveal that no example was drawn.
            return next(iter(self._gradients.params.values())).sum() * 0.0
        results = internals.train_results(trainer)
        if isinstance(self._gradients, StrictGradients):
            self._gradients.arguments = rest, kwargs
        if not training.is_checked and training.steps_taken >= training.check_at:
            self._self_check(trainer, step, batch, rest, kwargs)
        most = self.max_physical_batch_size or size
        starts = range(0, size, most)
        total: Tensor | float = 0.0
        for start in starts:
            part = batch if len(starts) == 1 else take_rows(batch, slice(start, start + most))
            self._size = min(most, size - start)
            if len(starts) > 1 or self.strict:
                # Lightning weights logged values by the size of the batch that it finds here.
                results.batch, results.batch_size = part, None
            if isinstance(self._gradients, StrictGradients):
                loss, samples = self._gradients.step(part)
                training.noise.add(samples, self._size)
                total = total + loss * self._size
                continue
            self._gradients.start()
            outputs = step(part, *rest, **kwargs)
            loss = _loss(outputs)
            # Lightning itself runs the backward pass of the last part, which needs a loss with a graph.
            if start != starts[-1]:
                loss.backward()
                self._add_part()
                total = total + loss.detach() * self._size
        if self.strict:
            # The gradients have been added; Lightning's backward pass and logs get the loss and a gradient of zero.
            self._size, results.batch, results.batch_size = 0, batch, None
            return total / size + next(iter(self._gradients.params.values())).sum() * 0.0
        if len(starts) == 1:
            return outputs
        results.batch, results.batch_size = batch, None
        # The value is the mean over the whole batch, for logs and callbacks; the graph stays that of the last part.
        loss = loss + ((total + loss.detach() * self._size) / size - loss.detach())
        return {**outputs, "loss": loss} if isinstance(outputs, Mapping) else loss

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replaces the batch's gradient by the clipped and noisy one, before the algorithm changes it."""
        gradients, training = self._gradients, self._training
        if gradients is None or training is None or self._has_gradient:
            raise PrivacyError(
                "A backward pass does not belong to a batch of a client, so its gradient is not private. The run stops."
            )
        self._add_part()
        training.steps_left -= 1
        if training.steps_left < 0:
            raise PrivacyError(f"Client {training.client!r} takes more steps than its ledger records. The run stops.")
        for name, grad in training.noise.release(gradients.params).items():
            gradients.params[name].grad = grad
        trained = {id(param) for param in gradients.params.values()}
        # No callback or logger may read a gradient that was neither clipped nor noised.
        for param in pl_module.parameters():
            if id(param) not in trained:
                param.grad = None
        self._has_gradient = True

    def on_client_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        client: ClientId,
        run: LocalRun,
        update: Update | None,
        view: RoundView,
    ) -> None:
        """Checks the batches that the client has drawn and its buffers, before its update leaves the rank."""
        training, self._training = self._training, None
        assert training is not None, "the client has not been started"
        self._check_end(trainer, training, view)
        self._draws.add(training.counts, np.array(training.sizes, dtype=np.int64), training.loader.rate)
        if self._draws.problem is not None:
            raise PrivacyError(f"The batches are not drawn by Poisson sampling: {self._draws.problem}. The run stops.")
        # Buffers leave the client without noise, so training must not change them.
        changed = [name for name, value in (update.buffers if update else {}).items() if bool(value.count_nonzero())]
        if changed:
            raise PrivacyError(
                f"Local training changed the buffer {changed[0]}, which would leave client {client!r} without noise. "
                "The run stops. Training must not change buffers: keep values that are only logged in an attribute or "
                "a torchmetric, and values that may differ between clients in a personal buffer."
            )

    def on_aggregate_end(
        self, trainer: L.Trainer, module: L.LightningModule, aggregate: Aggregate, view: RoundView
    ) -> None:
        """Logs the largest epsilon of any client, and stops if a client could not take part in another round."""
        self._next_round = max(self._next_round, self._round + 1)
        self._was_insecure |= self.insecure_test_seed is not None
        group = self._shared.largest
        ledgers = self._together(view, self.ledgers(trainer).values())
        spent, _ = largest_epsilon(ledgers, self.delta, self.method, GRID, group)
        epsilon = math.inf if self._was_without else float(spent)
        is_last, is_over = self._round + 1 == trainer.max_epochs, False
        if self.max_epsilon is not None and not is_last:
            before = self._before_training()
            after = [before + ledger for ledger in accounting.with_another_round(view, self._sigma)]
            each = self._together(view, after)
            is_over = exceeding(each, self.max_epsilon, self.delta, self.method, group) is not None
        ranks = accounting.gather(view, {"epsilon": epsilon, "over": is_over})
        facts = self._facts(max(fields["epsilon"] for fields in ranks))
        # A client-level mechanism of the same run reports under `dp_` already.
        prefix = "dp_example" if "dp_epsilon" in view.history[-1] else "dp"
        facts = {f"{prefix}_{name}": value for name, value in facts.items()}
        view.add_facts(facts)
        numbers = {f"fl/{name}": value for name, value in facts.items() if not isinstance(value, str)}
        internals.log_figures(trainer, numbers)
        words = {f"fl/{name}": value for name, value in facts.items() if isinstance(value, str)}
        if words != self._words:
            self._words = words
            for logger in trainer.loggers:
                logger.log_hyperparams(words)
        # If silos hide the sizes of their data, a rank knows only its own answer; if it stopped alone, the others
        # would wait for it. The check at the next round's start then refuses the round.
        if any(fields["over"] for fields in ranks) and len(ranks) == view.group.size:
            trainer.should_stop = True
            rank_zero_info(
                f"Training stops: another round would exceed max_epsilon={self.max_epsilon:g} for a participating "
                "client."
            )

    # ---- ledgers

    def ledger(self, trainer: L.Trainer, client: ClientId) -> Ledger:
        """The privacy ledger of a client whose home is this rank."""
        ledger = self._before_training() + accounting.ledger_of(_view(trainer), client)
        if self._was_without:
            ledger.record(Gaussian(0.0))  # earlier rounds that were not private
        return ledger

    def ledgers(self, trainer: L.Trainer) -> dict[ClientId, Ledger]:
        """The ledger of each client whose home is this rank and that has taken part."""
        ledgers = {client: self.ledger(trainer, client) for client in _view(trainer).clients_with_state()}
        return {client: ledger for client, ledger in ledgers.items() if ledger.entries}

    def epsilons(self, trainer: L.Trainer, group: int = 1) -> dict[ClientId, Epsilon]:
        """An upper bound on epsilon for each client whose home is this rank and that has taken part.

        Args:
            trainer: The Trainer.
            group: How many examples to protect together: those of one person in one client, or the copies of an
                example in several clients, of whose epsilons the largest then holds.
        """
        ledgers = self.ledgers(trainer)
        return {client: own.epsilon(self.delta, self.method, group=group) for client, own in ledgers.items()}

    def state_dict(self) -> dict[str, Any]:
        """Whether the rounds so far were private."""
        insecure = self._was_insecure
        return {
            "next_round": self._next_round,
            "was_without": self._was_without,
            "was_insecure": insecure,
            "released": dict(self._released),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a checkpoint."""
        self._next_round, self._was_without = state_dict["next_round"], state_dict["was_without"]
        self._was_insecure = state_dict["was_insecure"]
        self._released = dict(state_dict.get("released", {}))

    def _book_release(self, trainer: L.Trainer) -> None:
        release = getattr(getattr(trainer, "datamodule", None), "release", None)
        if release is None:
            return
        if self.target_epsilon is not None:
            raise MisconfigurationException(
                "target_epsilon chooses the noise for the training only, but the data was scaled by a release that "
                "costs privacy too. Give noise_multiplier and max_epsilon, or a schema from public knowledge only."
            )
        # Whether it protects examples or whole clients: the latter protects each of their examples too.
        self._released[release.id] = release.noise_multiplier

    def _before_training(self) -> Ledger:
        """The releases by preprocessing about every client's data."""
        ledger = Ledger()
        for noise_multiplier in self._released.values():
            ledger.record(Gaussian(noise_multiplier))
        return ledger

    def _facts(self, epsilon: float) -> dict[str, float | str]:
        is_private = epsilon < math.inf and self.insecure_test_seed is None
        seed = " (insecure_test_seed)" if self.insecure_test_seed is not None else ""
        return {
            "epsilon": epsilon,
            "delta": self.delta,
            "noise_multiplier": float(self._sigma),
            "clip": self.max_grad_norm,
            "is_private": float(is_private),
            "guarantee": "epsilon-delta, add_or_remove_one" if is_private else f"NOT PRIVATE{seed}",
            "mode": "sample",
            "unit": "example",
            "adversary": ADVERSARY,
        }

    # ---- parts

    def _poisson_loader(self, client: ClientId, loader: Loader) -> PoissonLoader:
        randomness: Randomness | None = None
        if self.insecure_test_seed is not None:
            randomness = np.random.default_rng(derive_seed(self.insecure_test_seed, self._round, "batches", client))
        return PoissonLoader(loader, self._drawn.append, randomness, self.strict)  # type: ignore[arg-type]

    def _check_budget(self, view: RoundView, ledgers: Sequence[Ledger]) -> None:
        assert self.max_epsilon is not None
        each = self._together(view, ledgers)
        epsilon = exceeding(each, self.max_epsilon, self.delta, self.method, self._shared.largest)
        if epsilon is not None:
            raise PrivacyBudgetExceeded(
                f"Round {self._round} would raise a client's epsilon to {float(epsilon):.4g}, above "
                f"max_epsilon={self.max_epsilon:g}. Stop here, or start with a larger max_epsilon or more noise."
            )

    def _take_draw(self, batch: Any) -> int:
        """Checks that a batch is the one that was drawn; returns its number of examples."""
        self._has_gradient = False
        if self._training is None or not self._drawn:
            raise PrivacyError("A batch was not drawn by Poisson sampling. The run stops.")
        # In order of drawing, because a loader may prefetch.
        chosen = self._drawn.popleft()
        size = num_rows(batch)
        # An example that is twice in a batch would be clipped twice and contribute up to twice the clip norm.
        if size != len(chosen) or len(np.unique(chosen)) != size:
            raise PrivacyError(
                f"{len(chosen)} examples were drawn, but the batch has {size}. The run stops. A batch must hold each "
                "drawn example once and no others."
            )
        self._training.counts[chosen] += 1
        self._training.sizes.append(size)
        return size

    def _add_part(self) -> None:
        assert self._gradients is not None
        assert self._training is not None
        samples = self._gradients.take(self._size)
        self._gradients.check_means(samples)
        self._training.noise.add(samples, self._size)

    def _self_check(self, trainer: L.Trainer, step: Callable[..., Any], batch: Any, rest: Any, kwargs: Any) -> None:
        assert self._gradients is not None
        assert self._training is not None
        training, module, precision = self._training, trainer.lightning_module, str(trainer.precision)
        # Bypasses the Trainer's step, which would enter autocast: rounding to 16 bits could hide differences that a sum
        # over many examples reveals.
        call = module.training_step if precision == "bf16-mixed" else step
        dataset, collate, should_stop = training.loader.dataset, training.loader.collate_fn, trainer.should_stop
        items: dict[int, Any] = {}

        def read(examples: Sequence[int]) -> Any:
            if hasattr(dataset, "__getitems__"):
                return internals.transfer(trainer, collate(dataset.__getitems__(list(examples))))
            for example in examples:
                if example not in items:
                    # Read once, because a data set may draw random numbers for each example.
                    items[example] = dataset[example]
            return internals.transfer(trainer, collate([items[example] for example in examples]))

        with (
            # The check must neither consume the client's random numbers nor log anything.
            isolated_randomness(_view(trainer).settings.seed, self._round, training.client, "check") as randomness,
            out_of_loop(trainer, training=True) as results,
        ):

            def outputs_of(rows: Any) -> Any:
                results.batch, results.batch_size = rows, None
                return call(rows, *rest, **kwargs)

            def whole_step(rows: Any) -> None:
                start, end = (is_overridden(hook, module) for hook in BATCH_HOOKS)
                if start:
                    module.on_train_batch_start(rows, 0)
                outputs = outputs_of(rows)
                if end:
                    module.on_train_batch_end(outputs, rows, 0)

            seed = (_view(trainer).settings.seed, self._round, training.client, "check")
            # Each comparison turns these on and off itself.
            hooks = [self._gradients.hooks] if isinstance(self._gradients, PerSampleGradients) else []
            check = SelfCheck(
                self._gradients,
                lambda rows: _loss(outputs_of(rows)),
                whole_step,
                lambda: randomness.enter(*seed),
                state_of_training(trainer, known=hooks),
                self._params,
                self.max_grad_norm,
                TOLERANCES[precision],
            )
            check.run(batch, read, unlike_examples(dataset))
        trainer.should_stop = should_stop
        training.is_checked = self._has_checked = True

    def _together(self, view: RoundView, ledgers: Iterable[Ledger]) -> Iterable[Ledger]:
        """The ledgers themselves, or one for all ranks if clients share examples, whose privacy cost then adds up."""
        if self._shared.largest == 1:
            return ledgers
        own = dominating(ledgers)
        if view.population.silos is not None:
            return [own]
        return [dominating(accounting.gather_ledgers(view, own))]

    def _check_shared(self, client: ClientId, loader: PoissonLoader) -> None:
        before = self._shared.largest
        self._shared.add(client, loader.dataset)
        if self._shared.largest > before:
            rank_zero_warn(
                f"An example appears {self._shared.largest} times in the clients' data, so its copies together reveal "
                "more about it than each client's epsilon states. From now on, the logged epsilon and max_epsilon "
                f"account for them, like SampleLevelDP.epsilons(trainer, group={self._shared.largest}). Give each "
                "example to one client, once. (Copies elsewhere in memory, and those of other silos, are not detected.)"
            )

    # ---- steps

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # The first argument is the optimizer itself.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if self._training is None or closure is None:
            self._params.check("before the optimizer's step")
            return args, kwargs

        def checked() -> Any:
            loss = closure()
            # After the forward and the backward pass, and just before the step.
            self._params.check("in training_step or a hook before the optimizer's step")
            return loss

        return args[:1], {**kwargs, "closure": checked}

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # The optimizer's own hook sees every step, even one that bypasses the Trainer.
        if self._training is not None:
            if not self._has_gradient:
                raise PrivacyError("The optimizer has taken a step on a gradient that is not private. The run stops.")
            self._training.steps_taken += 1
            self._params.note()
            self._buffers.note()
        self._has_gradient = False

    def _check_end(self, trainer: L.Trainer, training: _ClientTraining, view: RoundView) -> None:
        """Checks that a client has trained as recorded, and that nothing else depends on its examples."""
        num_steps = sum(accounting.steps_of(view, training.client))
        if training.steps_taken != num_steps:
            raise PrivacyError(
                f"Client {training.client!r} took {training.steps_taken} optimizer steps, but {num_steps} are "
                "recorded. The run stops, because skipping steps can depend on the examples. An overridden "
                "optimizer_step must take each step."
            )
        timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
        if trainer.should_stop and not training.should_stop and not any(map(_is_over, timers)):
            raise PrivacyError(
                f"trainer.should_stop was set while client {training.client!r} was training, so the end of training "
                "may depend on its examples, which the noise does not cover. The run stops. Decide by public "
                "validation data: use EarlyStopping on a validation metric, or max_epochs."
            )

    def _detach(self) -> None:
        if self._gradients is not None:
            self._gradients.detach()
            for handle in self._handles:
                handle.remove()
        self._params = self._buffers = TensorWatch(dict, "")
        self._gradients = self._training = None


def _is_over(timer: Timer) -> bool:
    left = timer.time_remaining()
    return left is not None and left <= 0


def _loss(outputs: Any) -> Tensor:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor):
        raise PrivacyError(
            f"training_step returned {type(loss).__name__} instead of a loss. Skipping a step reveals something about "
            "the batch, so the run stops. Return a loss for every batch."
        )
    return loss


def _view(trainer: L.Trainer) -> RoundView:
    assert isinstance(trainer.strategy, FederatedStrategy)
    return trainer.strategy.view
