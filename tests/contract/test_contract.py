"""Every algorithm through every property: a new algorithm is one entry in ``ENTRIES``."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_fl import FederatedStrategy
from lightning_fl.algorithms import (
    AFL,
    APFL,
    CFL,
    D2,
    DSGD,
    IFCA,
    TERM,
    Algorithm,
    DiLoCo,
    Ditto,
    FedAdagrad,
    FedAdam,
    FedAMP,
    FedAvg,
    FedAvgM,
    FedBN,
    FedDyn,
    FedExP,
    FedNova,
    FedOpt,
    FedPer,
    FedProx,
    FedRep,
    FedSAM,
    FedSGD,
    FedYogi,
    GradientTracking,
    LGFedAvg,
    MimeLite,
    PerFedAvg,
    PFedMe,
    PushSum,
    QFedAvg,
    Scaffold,
    registered,
)
from lightning_fl.tree import leaves, sum_dtype
from lightning_fl.types import Aggregate
from tests.contract import helpers
from tests.helpers.training import (
    Plain,
    Quadratic,
    WithNorm,
    WithOwn,
    image_clients,
    minimise,
    quadratic_clients,
    trainer,
    weights,
)

EXAMPLES, UNIFORM, OPTIMUM = 1.1359075905, 1.2057623030, 8 / 7
"""Where federated averaging with 5 local steps settles, by the clients' weights, and the uniform optimum."""
ROUNDS = 3


@dataclass(frozen=True)
class Entry:
    """An algorithm under contract.

    Args:
        algorithm: With hyper-parameters under which it converges on the quadratics.
        fixed_point: Where it then settles with 5 local steps.
        init_args: Hyper-parameters as YAML gives them.
        neutral: The setting in which it is federated averaging; None if there is none.
        personal: Whether the user has to name personal tensors.
        lr: The clients' learning rate on the quadratics.
        rounds: Until it has settled there.
    """

    algorithm: Algorithm
    fixed_point: float
    init_args: dict[str, Any] = field(default_factory=dict)
    neutral: Algorithm | None = None
    personal: bool = False
    lr: float = 0.1
    rounds: int = 70

    @property
    def options(self) -> dict[str, Any]:
        """What a strategy needs besides to train a small network."""
        return {"personal": ["net.3.bias"]} if self.personal else {}

    def minimise(self, rounds: int, local_steps: int, clients: Any = None) -> float:
        """Where the quadratics take it."""
        kind = WithOwn if self.personal else WithNorm if isinstance(self.algorithm, FedBN) else Quadratic
        own_work = all(phase.has_own_work for phase in self.algorithm.phases())
        steps = {} if own_work else {"local_steps": local_steps}
        strategy = FederatedStrategy(self.algorithm, **steps, personal=["own"] if self.personal else [])
        return minimise(strategy, rounds, clients, self.lr, kind)

    def module(self, dtype: torch.dtype = torch.float64) -> Plain:
        """A small network."""
        return (Normed if isinstance(self.algorithm, FedBN) else Plain)(dtype)


class Norm(nn.BatchNorm1d):
    """Trains its weights and keeps its statistics, so that a batch may hold one example."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class Normed(Plain):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(dtype)
        self.net.append(Norm(4).to(dtype))


ADAPTIVE: dict[str, float] = {"server_lr": 10.0, "beta1": 0.5, "tau": 10.0}
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.25}}
ENTRIES: dict[str, Entry] = {
    "fedavg": Entry(FedAvg(), EXAMPLES, {"server_lr": 0.5}, FedAvg()),
    "fedprox": Entry(FedProx(0.1), 1.1358449779, {"mu": 0.5}, FedProx(mu=0.0)),
    "fedavgm": Entry(FedAvgM(momentum=0.5), EXAMPLES, {"nesterov": True}, FedAvgM(momentum=0.0)),
    "fedadagrad": Entry(FedAdagrad(**ADAPTIVE), EXAMPLES, ADAPTIVE),
    "fedadam": Entry(FedAdam(**ADAPTIVE), EXAMPLES, {"beta2": 0.5}),
    "fedyogi": Entry(FedYogi(**ADAPTIVE), EXAMPLES, {"tau": 0.5}),
    "fedopt": Entry(FedOpt(partial(torch.optim.SGD, lr=0.5, momentum=0.5)), EXAMPLES, {"optimizer": ADAMW}, FedOpt()),
    "scaffold": Entry(Scaffold(), OPTIMUM, {"server_lr": 0.5}),
    "fednova": Entry(FedNova(), EXAMPLES, {"mu": 0.5}),
    "feddyn": Entry(FedDyn(alpha=1.0), OPTIMUM, {"alpha": 0.5}),
    "fedexp": Entry(FedExP(eps=1.0), UNIFORM, {"eps": 0.5}, FedExP(eps=float("inf"))),
    "mimelite": Entry(MimeLite(beta1=0.5), 1.1576394666, {"beta2": 0.99}, MimeLite(beta1=0.0)),
    "qfedavg": Entry(QFedAvg(q=0.5), 1.3926633662, {"q": 0.5}, QFedAvg(q=0.0)),
    "fedsgd": Entry(FedSGD(), 1.0909090909, {"server_lr": 0.5}, lr=0.5),
    "fedper": Entry(FedPer(), EXAMPLES, {"server_lr": 0.5}, FedPer(), personal=True),
    "lgfedavg": Entry(LGFedAvg(), EXAMPLES, {"server_lr": 0.5}, LGFedAvg(), personal=True),
    "fedbn": Entry(FedBN(), EXAMPLES, {"server_lr": 0.5}),
    "fedrep": Entry(FedRep(head_epochs=2), EXAMPLES, {"head_epochs": 2}, personal=True),
    "ditto": Entry(Ditto(lam=0.5), EXAMPLES, {"lam": 0.5}, Ditto()),
    "perfedavg": Entry(PerFedAvg(alpha=0.1), 1.2618206808, {"first_order": True}, PerFedAvg(alpha=0.0)),
    "pfedme": Entry(PFedMe(inner_steps=10, inner_lr=0.06), 1.2197241800, {"lam": 5.0}),
    "fedsam": Entry(FedSAM(), 1.1730566896, {"rho": 0.1}, FedSAM(rho=0.0)),
    "term": Entry(TERM(t=0.5), 1.3660547397, {"t": 2.0}, TERM(t=0.0)),
    "afl": Entry(AFL(mixture_lr=0.05), 1.6568542495, {"mixture_lr": 0.5}, AFL(mixture_lr=0.0), rounds=165),
    "dsgd": Entry(DSGD(), UNIFORM, neutral=DSGD()),
    "d2": Entry(D2(), UNIFORM, neutral=D2()),
    "gradienttracking": Entry(GradientTracking(), UNIFORM, neutral=GradientTracking()),
    "pushsum": Entry(PushSum(), UNIFORM, neutral=PushSum()),
    "fedamp": Entry(FedAMP(), 1.575982257561719, {"sigma": 5.0}, rounds=150),
    "cfl": Entry(CFL(), UNIFORM, {"eps2": 0.5}, CFL(eps1=0.0)),
    "ifca": Entry(IFCA(spread=0.0), UNIFORM, {"num_models": 3}, IFCA(num_models=1)),
    "apfl": Entry(APFL(), UNIFORM, {"alpha": 0.25}, APFL()),
    "diloco": Entry(DiLoCo(momentum=0.5), UNIFORM, {"momentum": 0.5}, DiLoCo(server_lr=1.0, momentum=0.0)),
}
every_algorithm = pytest.mark.parametrize("name", ENTRIES)


def capabilities(entry: Entry) -> tuple[Any, ...]:
    """What of an algorithm the framework sees, apart from its mathematics."""
    algorithm = entry.algorithm
    return (
        algorithm.server_init({"x": torch.zeros(1)}, population=3).keys() > {"params"},
        algorithm.keeps_client_state,
        algorithm.probe,
        algorithm.needs_gradient_at,
        algorithm.knows_index,
        algorithm.keeps_nodes,
        len(algorithm.phases()),
        entry.personal,
        *(
            getattr(type(algorithm), name) is not getattr(Algorithm, name)
            for name in ("grad_transform", "client_finish", "personal")
        ),
    )


def one_of_each_kind() -> list[Any]:
    """All names; those whose capabilities an earlier one has are for `make test-all`."""
    kinds: dict[tuple[Any, ...], str] = {}
    for name, entry in ENTRIES.items():
        kinds.setdefault(capabilities(entry), name)
    return [pytest.param(name, marks=[] if name in kinds.values() else pytest.mark.slow) for name in ENTRIES]


every_kind = pytest.mark.parametrize("name", one_of_each_kind())


SIZES = (1, 7, 23)


def fit(
    algorithm: Algorithm, module: Any = None, max_epochs: int = ROUNDS, sizes: Sequence[int] = SIZES, **options: Any
) -> tuple[L.Trainer, Tensor]:
    """Trains clients with uneven numbers of batches; options of ``fit`` and the strategy are told apart."""
    entry = next(entry for entry in ENTRIES.values() if type(entry.algorithm) is type(algorithm))
    module = entry.module() if module is None else module
    options = {**entry.options, **options}
    ckpt_path = options.pop("ckpt_path", None)
    of_trainer = {key: options.pop(key) for key in ("callbacks", "enable_checkpointing") if key in options}
    run = trainer(FederatedStrategy(algorithm, **options), max_epochs, **of_trainer)
    run.fit(module, image_clients(sizes), ckpt_path=ckpt_path, weights_only=True)
    return run, weights(module)


def states(run: L.Trainer) -> list[Mapping[str, Any]]:
    """The server's state, and what each client keeps: the algorithm's state, personal tensors."""
    rounds = run.strategy.active_driver
    kept = [state for client in range(3) for _, state in sorted((rounds.store.get(client) or {}).items())]
    return [rounds.state.server, *kept]


def test_every_registered_algorithm_is_under_contract() -> None:
    builtin = {name for name, algorithm in registered().items() if algorithm.__module__.startswith("lightning_fl.")}
    assert ENTRIES.keys() == builtin
    assert all(type(ENTRIES[name].algorithm) is registered()[name] for name in ENTRIES)
    assert builtin <= set(StrategyRegistry.available_strategies())


@every_kind
@pytest.mark.spread(3)
def test_it_settles_at_its_fixed_point(name: str) -> None:
    entry = ENTRIES[name]
    assert entry.minimise(entry.rounds, local_steps=5) == pytest.approx(entry.fixed_point, rel=1e-8)


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.neutral is not None])
@pytest.mark.spread(7)
def test_the_neutral_setting_is_federated_averaging(name: str) -> None:
    neutral = ENTRIES[name].neutral
    assert neutral is not None
    options = ENTRIES[name].options
    found, expected = fit(neutral)[1], fit(FedAvg(), weighting=neutral.weighting, **options)[1]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@every_algorithm
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.spread(20)
def test_states_are_trees_of_tensors_and_keep_shapes_and_dtypes(name: str, dtype: torch.dtype) -> None:
    module, algorithm = ENTRIES[name].module(dtype), ENTRIES[name].algorithm
    before, hyperparameters = {key: value.clone() for key, value in module.state_dict().items()}, repr(algorithm)
    run, _ = fit(algorithm, module)
    for key, value in module.state_dict().items():
        assert (value.dtype, value.shape) == (before[key].dtype, before[key].shape)
        is_personal = any(fnmatchcase(key, glob) for glob in run.strategy.personal)
        assert torch.equal(value, before[key]) == is_personal
    server, *clients = states(run)
    has_model = bool(run.strategy.personal) or algorithm.phases()[-1].model == "own"
    assert len(clients) == 3 * (algorithm.keeps_client_state + has_model)
    for state in (server, *clients):
        assert all(isinstance(leaf, Tensor) and not leaf.requires_grad for leaf in leaves(state))
        trees = [state, *(value for value in state.values() if isinstance(value, Mapping))]
        for tree in (tree for tree in trees if tree.keys() == before.keys()):
            for key, value in tree.items():
                expected = dtype if tree is state else sum_dtype(dtype)  # a client's own model is that of the module
                assert value.dtype == expected
                stacked = getattr(algorithm, "num_models", 3)  # several global models, or one of each node
                assert value.shape in (before[key].shape, (stacked, *before[key].shape))
    assert repr(algorithm) == hyperparameters


@every_kind
def test_frozen_parameters_stay(name: str) -> None:
    module = ENTRIES[name].module()
    module.net[1].requires_grad_(False)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    fit(ENTRIES[name].algorithm, module)
    changed = {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"net.3.weight", "net.3.bias"} - set(ENTRIES[name].options.get("personal", ()))


@every_kind
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.spread(6)
def test_a_run_with_sampling_resumes_exactly(name: str) -> None:
    algorithm = ENTRIES[name].algorithm
    options = {} if algorithm.keeps_nodes else {"clients_per_round": 2}
    callback = ModelCheckpoint("ckpt", filename="{epoch}", save_top_k=-1)
    run, whole = fit(algorithm, **options, callbacks=[callback], enable_checkpointing=True)
    resumed, found = fit(algorithm, **options, ckpt_path="ckpt/epoch=1.ckpt")
    assert torch.equal(found, whole)
    for state, expected in zip(states(resumed), states(run), strict=True):
        torch.testing.assert_close(state, expected, rtol=0, atol=0)


@every_algorithm
@pytest.mark.spread(10)
def test_permuting_clients_changes_nothing(name: str) -> None:
    e, h, sizes = (0.0, 1.0, 4.0), (1.0, 2.0, 0.5), (1, 2, 1)
    x, permuted = (
        ENTRIES[name].minimise(4, 3, clients) for clients in (None, quadratic_clients(e[::-1], h[::-1], sizes[::-1]))
    )
    assert permuted == pytest.approx(x, rel=1e-12)


@every_algorithm
def test_a_shorter_update_makes_a_shorter_step_unless_it_says_otherwise(name: str) -> None:
    """``aux_role``: half of all that clients send is half of the step, of an algorithm with side channels."""
    algorithm, params = ENTRIES[name].algorithm, {"x": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    server = algorithm.server_init(params, 3)
    aux = {**algorithm.aux_like(params), **algorithm.aux_of_clients(3)}
    if not aux:
        assert algorithm.aux_role == "addend"
        return

    def step(share: float) -> Tensor:
        def sent(tree: Mapping[str, Tensor], size: float) -> dict[str, Tensor]:
            return {key: torch.full_like(own, size * share) for key, own in tree.items()}

        sums = {key: sent(tree, 60.0) for key, tree in aux.items()}
        total = Aggregate(sent(algorithm.delta_like(params, server), 6.0), {}, 3.0, sums, 3, 3)
        return algorithm.server_update(server, total)["params"]["x"] - params["x"]

    assert torch.allclose(step(0.5), 0.5 * step(1.0), rtol=1e-9) == (algorithm.aux_role == "addend")


@every_algorithm
def test_it_pickles(name: str) -> None:
    algorithm = ENTRIES[name].algorithm
    assert repr(pickle.loads(pickle.dumps(algorithm))) == repr(algorithm)


from_yaml = partial(helpers.from_yaml, Algorithm)


@every_algorithm
def test_yaml_gives_it_by_its_short_class_name(name: str) -> None:
    kind, init_args = registered()[name], ENTRIES[name].init_args
    assert from_yaml(kind.__name__, {}) == kind()
    if name == "fedopt":
        found = repr(from_yaml(kind.__name__, init_args))
        assert found.startswith("FedOpt(optimizer=AdamW(lr=0.25, ")
        assert " at 0x" not in found  # ranks compare it
    else:
        assert from_yaml(kind.__name__, init_args) == kind(**init_args)


@every_algorithm
def test_yaml_with_a_wrong_type_is_refused(name: str) -> None:
    for key in ENTRIES[name].init_args:
        with pytest.raises(ArgumentError, match=key):
            from_yaml(registered()[name].__name__, {key: "abc"})


@every_kind
@pytest.mark.parametrize("sizes", [(23, 23, 23), (2, 4, 6, 8, 10, 12, 14, 16, 18) * 2], ids=["equal", "unequal"])
@pytest.mark.spread(10)
def test_clients_train_together_as_they_do_alone(name: str, sizes: tuple[int, ...]) -> None:
    algorithm = ENTRIES[name].algorithm
    _, alone = fit(algorithm, sizes=sizes, engine="sequential")
    if algorithm.probe is not None or len(algorithm.phases()) > 1:
        with pytest.raises(MisconfigurationException, match="looks at each client's data by itself"):
            fit(algorithm, sizes=sizes, engine="vectorized")
        return
    run, together = fit(algorithm, sizes=sizes, engine="vectorized")
    assert list(map(len, run.strategy.active_driver.trained_groups)) == [len(sizes)]
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)


def train_each(names: list[str]) -> dict[str, Tensor]:
    return {name: fit(ENTRIES[name].algorithm)[1] for name in names}


KINDS = [str(case.values[0]) for case in one_of_each_kind() if not case.marks]


@pytest.mark.parametrize(
    ("world_size", "names"),
    [
        (2, KINDS),
        pytest.param(2, list(ENTRIES), marks=pytest.mark.slow),
        pytest.param(4, list(ENTRIES), marks=pytest.mark.slow),
    ],
    ids=["2-kinds", "2-all", "4-all"],
)
def test_ranks_train_what_one_does(run_ranks: Any, world_size: int, names: list[str]) -> None:
    alone = train_each(names)
    for found in run_ranks(world_size, train_each, names):
        for name, expected in alone.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
