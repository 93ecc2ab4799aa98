"""What robust rules make of known updates, through one round of the real Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightning_fl as fl
from lightning_fl.aggregation import (
    FLAME,
    Bucketing,
    Bulyan,
    CenteredClipping,
    CosineCheck,
    DnC,
    FLTrust,
    FoolsGold,
    GeometricMedian,
    Krum,
    MeanAroundMedian,
    Median,
    MultiKrum,
    NearestNeighborMixing,
    NormBound,
    NormCheck,
    RowAggregator,
    Screened,
    TrimmedMean,
)
from lightning_fl.aggregation.robust.geometric_median import geometric_median
from lightning_fl.aggregation.robust.gram import Gram
from lightning_fl.aggregation.robust.krum import krum_scores
from tests.helpers.training import trainer

Table = Sequence[Sequence[float]]

U7 = ((0, 0), (1, 0.1), (0.2, 1), (1.1, 1.3), (2, 0.9), (0.7, 2.1), (100, -100))
CONVENTIONS = ((2, 3), (0, 1), (5, 0), (-5, 4), (-6, -5), (3, -5), (4, 2))
HONEST = np.sin(1 + 1.7 * np.arange(9)[:, None] * np.array([1, 2, 3]))
A11 = np.concatenate([HONEST, np.tile(HONEST.mean(0) + 3, (2, 1))]).tolist()


class Rows(Dataset[Tensor]):
    """One example: the update that the client is to send."""

    def __init__(self, row: Tensor) -> None:
        self.row = row

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Tensor:
        return self.row


class Sends(L.LightningModule):
    """The loss ``-<w, u>``, whose SGD step with a learning rate of 1 is the update ``u``."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=dtype))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return -(self.w * batch[0]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class SendsMatrix(Sends):
    """Sends the same 3 x 2 matrix, and a vector of one number, in each round."""

    def __init__(self) -> None:
        super().__init__(1, torch.float64)
        self.m = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        row = batch[0]
        return -(self.m * row[:6].view(3, 2)).sum() - (self.w * row[6:]).sum()


def loaders(rows: Table, dtype: torch.dtype, order: Sequence[int] | None = None) -> fl.datamodules.ClientLoaders:
    own = {i: torch.tensor(row, dtype=torch.float64).to(dtype) for i, row in enumerate(rows)}
    return fl.datamodules.ClientLoaders({i: DataLoader(Rows(own[i])) for i in order or own})


def aggregate(
    aggregator: Any,
    rows: Table,
    dtype: torch.dtype = torch.float64,
    offset: float = 0.0,
    engine: str = "sequential",
    **strategy: Any,
) -> tuple[list[float], dict[str, Any]]:
    """The change of the global model in one round in which the clients send ``rows + offset``, less the offset."""
    module = Sends(len(rows[0]), dtype)
    moved = [[value + offset for value in row] for row in rows]
    fit = trainer(fl.FederatedStrategy("fedavg", aggregator=aggregator, engine=engine, seed=0, **strategy))
    fit.fit(module, loaders(moved, dtype))
    return (module.w.detach().double() - offset).tolist(), fit.strategy.history[-1]


def krum_winner(aggregator: Any, rows: Table) -> int:
    left_out = aggregate(aggregator, rows)[1]["left_out"]
    (winner,) = set(range(len(rows))) - set(left_out)
    return winner


ANSWERS: dict[str, tuple[RowAggregator, Table, Sequence[float]]] = {
    "median": (Median(1), U7, (1, 0.9)),
    "trimmed mean": (TrimmedMean(1), U7, (1, 0.66)),
    "mean around median": (MeanAroundMedian(1), U7, (0.8333333, 0.9)),
    "krum": (Krum(1), U7, (1.1, 1.3)),
    "multi-krum 3": (MultiKrum(1, 3), U7, (0.7666667, 0.8)),
    "multi-krum 5": (MultiKrum(1, 5), U7, (1, 1.08)),
    "multi-krum": (MultiKrum(1), U7, (0.8333333, 0.9)),
    "geometric median": (GeometricMedian(1), U7, (0.97922409, 0.78183428)),
    "dnc": (DnC(1), U7, (0.8333333, 0.9)),
    "bulyan": (Bulyan(1), U7, (0.7666667, 1.0666667)),
    "mixing and trimming": (TrimmedMean(1, [NearestNeighborMixing()]), U7, (0.8333333, 0.9)),
    "trimmed mean of 11": (TrimmedMean(2), A11, (0.46176374, 0.32696623, 0.14316819)),
    "multi-krum of 11": (MultiKrum(2), A11, (0.14461849, 0.03977598, -0.09088791)),
    "geometric median of 11": (GeometricMedian(2), A11, (0.42672918, 0.2158118, 0.10573931)),
    "bulyan of 11": (Bulyan(2), A11, (0.53210843, 0.10164846, 0.2807814)),
}
"""Rules that move with the updates, so that a common offset of all must not matter."""

NOT_MOVING: dict[str, tuple[RowAggregator, Table, Sequence[float]]] = {
    "clipping once": (CenteredClipping(1.0, 1, 1), U7, (0.53890737, 0.35648741)),
    "clipping three times": (CenteredClipping(1.0, 3, 1), U7, (0.90026841, 0.66722575)),
    "median norm": (NormBound(None, 1), U7, (0.79937461, 0.50145941)),
    "fltrust": (FLTrust(7, 1), (*U7, (1, 1)), (0.86553772, 0.92086165)),
    "fltrust without trust": (FLTrust(7, 1), (*U7, (-1, -1)), (0, 0)),
    "foolsgold of equal rows": (FoolsGold(1), [(1, 2)] * 5, (1, 2)),
}
EXACT = {"rtol": 1e-7, "atol": 6e-8}  # the reference's printed digits
OFFSETS = [(torch.float64, 0.0), (torch.float64, 100.0), (torch.float32, 0.0), (torch.float32, 100.0)]


def assert_near(found: Sequence[float], expected: Sequence[float], dtype: torch.dtype, offset: float) -> None:
    tolerance = EXACT if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6 + 3e-7 * offset}
    np.testing.assert_allclose(found, expected, **tolerance)


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
@pytest.mark.parametrize("name", [*ANSWERS, *NOT_MOVING])
def test_one_round_has_the_known_answer(name: str, engine: str) -> None:
    rule, rows, expected = {**ANSWERS, **NOT_MOVING}[name]
    found, history = aggregate(rule, rows, engine=engine)
    assert_near(found, expected, torch.float64, 0.0)
    assert history["num_clients"] == len(rows)


@pytest.mark.parametrize("matmul_precision", ["highest", "medium"])
@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.spread(10)
def test_neither_float32_nor_an_offset_changes_the_choice(name: str, matmul_precision: str) -> None:
    rule, rows, expected = ANSWERS[name]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul_precision)
    try:
        for dtype, offset in OFFSETS[1:]:
            assert_near(aggregate(rule, rows, dtype, offset)[0], expected, dtype, offset)
    finally:
        torch.set_float32_matmul_precision(before)


def answers_on_ranks(engine: str, offsets: Sequence[tuple[torch.dtype, float]]) -> list[dict[str, list[float]]]:
    """The answers of all rules with each dtype and offset; with an offset only of those that move with the updates."""
    return [
        {
            name: aggregate(rule, rows, dtype, offset, engine)[0]
            for name, (rule, rows, _) in {**ANSWERS, **({} if offset else NOT_MOVING)}.items()
        }
        for dtype, offset in offsets
    ]


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("world_size", "engine", "offsets"),
    [
        (2, "sequential", OFFSETS[::3]),
        slow(1, "vectorized", OFFSETS),
        slow(2, "sequential", OFFSETS[1:3]),
        slow(2, "vectorized", OFFSETS),
        slow(4, "sequential", OFFSETS),
        slow(4, "vectorized", OFFSETS),
    ],
)
@pytest.mark.slow
def test_ranks_and_engines_give_the_known_answers(run_ranks: Any, world_size: int, engine: str, offsets: Any) -> None:
    ranks = run_ranks(world_size, answers_on_ranks, engine, offsets)
    for found in ranks:
        assert found == ranks[0]
        for (dtype, offset), answers in zip(offsets, found, strict=True):
            for name, own in answers.items():
                assert_near(own, {**ANSWERS, **NOT_MOVING}[name][2], dtype, offset)


def test_krum_follows_the_paper() -> None:
    """Other conventions pick other rows: n - f - 1 neighbours #1, distances squared twice #2, not squared #0."""
    gram = Gram.of([torch.tensor(CONVENTIONS, dtype=torch.float64)], range(7))
    scores = krum_scores(gram.squared_distances, 1)
    assert scores.tolist() == pytest.approx([81, 85, 78, 251, 363, 189, 77], abs=1e-9)
    assert krum_winner(Krum(1), CONVENTIONS) == 6
    assert krum_winner(Krum(2), A11) == 7


def test_the_geometry_behind_the_rules() -> None:
    """Weights that no rule takes from clients, the median norm, and distances beside a common offset of 100."""
    rows = torch.tensor(U7, dtype=torch.float64)
    gram = Gram.of([rows], range(7))
    found = geometric_median(gram, torch.arange(1.0, 8.0, dtype=torch.float64)) @ rows
    np.testing.assert_allclose(found, (1.31445804, 1.01755663), **EXACT)
    assert float(gram.norms.median()) == pytest.approx(1.70293864, abs=6e-8)
    close = 1e-3 * torch.randn(20, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = close.float() + 100
    exact = torch.cdist(moved.double(), moved.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    error = (Gram.of([moved], range(20)).squared_distances - exact).abs().max() / exact.max()
    assert float(error) < 3e-14
    naive = moved @ moved.t()
    wrong = naive.diagonal()[:, None] + naive.diagonal() - 2 * naive
    assert float((wrong - exact).abs().max() / exact.max()) > 10


def test_three_steps_are_not_the_geometric_median() -> None:
    rows = [(0.0,), (1.0,), (4.0,), (5.0,), (30.0,)]
    assert aggregate(GeometricMedian(1), rows)[0] == pytest.approx([4.0], abs=1e-12)
    assert abs(aggregate(GeometricMedian(1, iterations=3), rows)[0][0] - 4) > 1e-3


def test_zeros_of_lazy_clients_beat_krum() -> None:
    """Of 20 clients with equal norms, four that send zeros win where the others' cosine is below .607."""
    for cosine, lazy_win in ((0.55, True), (0.65, False)):
        own = np.eye(16) * np.sqrt(1 - cosine)
        rows = np.concatenate([np.full((16, 1), np.sqrt(cosine)), own], axis=1)
        table = np.concatenate([rows, np.zeros((4, 17))]).tolist()
        assert (krum_winner(Krum(4), table) >= 16) == lazy_win


def test_a_tie_goes_to_the_client_that_comes_first() -> None:
    """With one neighbour left, two mutual neighbours always tie."""
    rows = ((9.0, 0.1), (-7.0, 2.0), (0.3, 0.7), (5.0, -8.0), (0.1, 0.9))
    assert krum_winner(Krum(2), [*rows, (20.0, 20.0), (30.0, 0.0)]) == 2


@pytest.mark.parametrize("name", [*ANSWERS, *NOT_MOVING])
def test_permuted_clients_give_the_same(name: str) -> None:
    rule, rows, expected = {**ANSWERS, **NOT_MOVING}[name]
    module = Sends(len(rows[0]), torch.float64)
    order = list(reversed(range(len(rows))))
    strategy = fl.FederatedStrategy("fedavg", aggregator=rule, engine="sequential")
    trainer(strategy).fit(module, loaders(rows, torch.float64, order))
    assert_near(module.w.tolist(), expected, torch.float64, 0.0)


def test_an_attacker_far_away_does_not_spoil_the_distances_between_the_others() -> None:
    """A mean in the midst would be drawn to the attacker, and the others' distances would drown in rounding."""
    for size in (1e18, 1e150, 1e300):
        for rule in (Krum(1), MultiKrum(1), GeometricMedian(1), Bulyan(1), TrimmedMean(1, [NearestNeighborMixing()])):
            rows = [*U7[:6], (size, -size)]
            expected, _ = aggregate(rule, U7)
            tolerance = 0.01 if type(rule) is GeometricMedian else 1e-7
            np.testing.assert_allclose(aggregate(rule, rows)[0], expected, rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore:Round 0. the updates of 6 hold NaN")
@pytest.mark.parametrize("rule", [MultiKrum(1), Median(1), TrimmedMean(1)])
def test_an_update_with_nan_counts_as_one_of_the_attackers(rule: RowAggregator) -> None:
    """The others are then all taken for honest: six rows and no attacker."""
    found, history = aggregate(rule, [*U7[:6], (float("nan"), 0.0)])
    expected = np.median(U7[:6], axis=0) if type(rule) is Median else np.mean(U7[:6], axis=0)
    assert_near(found, expected.tolist(), torch.float64, 0.0)
    assert (history["refused"], history["left_out"]) == ([6], {})


class Broken(Rows):
    def __getitem__(self, index: int) -> Tensor:
        raise OSError("no such file")


@pytest.mark.filterwarnings("ignore:Round 0.*no such file")
def test_a_round_with_too_few_updates_leaves_the_model_as_it_is() -> None:
    module, data = Sends(2, torch.float64), loaders(U7, torch.float64)
    broken = DataLoader(Broken(torch.zeros(2)))
    strategy = fl.FederatedStrategy("fedavg", aggregator=Bulyan(1), on_client_error="skip")
    fit = trainer(strategy)
    with pytest.warns(UserWarning, match=r"Round 0 has 6 updates \(0 more were refused\), too few for Bulyan"):
        fit.fit(module, fl.datamodules.ClientLoaders({i: broken if i == 2 else data[i] for i in range(7)}))
    assert module.w.tolist() == [0.0, 0.0]
    left_out = strategy.history[-1]["left_out"]
    assert left_out == dict.fromkeys([0, 1, 3, 4, 5, 6], "the round had too few updates")


@pytest.mark.parametrize("rule", [Krum(1), Median(1), GeometricMedian(1)])
def test_a_claim_of_a_million_examples_changes_nothing(rule: RowAggregator) -> None:
    expected, _ = aggregate(rule, U7)
    module, data = Sends(2, torch.float64), loaders(U7, torch.float64)

    class Many(Rows):
        def __len__(self) -> int:
            return 1_000_000

    claims = {i: DataLoader(Many(torch.tensor(row, dtype=torch.float64))) for i, row in enumerate(U7)}
    data = fl.datamodules.ClientLoaders({i: claims[i] if i == 6 else data[i] for i in range(7)})
    trainer(fl.FederatedStrategy("fedavg", aggregator=rule, local_steps=1)).fit(module, data)
    assert module.w.tolist() == expected


def test_bucketing_gives_means_of_buckets() -> None:
    """With buckets of all, any rule is the mean; with buckets of one it is the rule."""
    assert_near(aggregate(Median(0, [Bucketing(7)]), U7)[0], (15, -13.5142857), torch.float64, 0.0)
    assert_near(aggregate(Median(1, [Bucketing(1)]), U7)[0], (1, 0.9), torch.float64, 0.0)
    by_seed = {tuple(aggregate(Median(0, [Bucketing(2)]), U7)[0]) for _ in range(2)}
    assert len(by_seed) == 1


def test_flame_keeps_the_majority_at_the_median_length() -> None:
    rows = [(1.0, 0.0), (2.0, 0.1), (4.0, -0.1), (-50.0, 1.0), (-60.0, 0.0)]
    found, history = aggregate(FLAME(2), rows)
    norms = np.linalg.norm(rows, axis=1)
    expected = (np.array(rows) * np.minimum(1, np.median(norms) / norms)[:, None])[:3].mean(0)
    assert_near(found, expected.tolist(), torch.float64, 0.0)
    assert sorted(history["left_out"]) == [3, 4]


def test_checks_leave_out_what_is_too_long_or_points_elsewhere() -> None:
    rows = [(1.0, 0.0), (1.1, 0.1), (0.9, -0.1), (1.05, 0.05), (1.02, -0.04), (-1.0, 0.0), (50.0, 1.0)]
    for checks, left_out in (
        ([NormCheck()], [6]),
        ([CosineCheck()], [5]),
        ([NormCheck(), CosineCheck()], [5, 6]),
    ):
        for inner in (None, Median(2), MultiKrum(1)):
            found, history = aggregate(Screened(inner, checks), rows)
            assert set(left_out) <= set(history["left_out"])
            assert inner is not None or sorted(history["left_out"]) == left_out
            if len(left_out) == 2:
                np.testing.assert_allclose(found, (1.0, 0.0), atol=0.06)
    found, history = aggregate(Screened(Median(3), [NormCheck()]), [(1.0, 2.0)] * 7)
    assert found == pytest.approx([1.0, 2.0])
    assert history["left_out"] == {}


def test_foolsgold_counts_sybils_less() -> None:
    rows = [(1.0, 0.0, 0.2), (0.0, 1.0, -0.1), (0.3, -0.2, 1.0), (5.0, 5.0, 5.0), (5.0, 5.0, 5.0)]
    found, history = aggregate(FoolsGold(0), rows)
    assert sorted(history["left_out"]) == [3, 4]
    assert np.linalg.norm(found) < 1


def resumed(rule: RowAggregator, rows: Table, stops: Sequence[int], folder: str, engine: str) -> list[float]:
    """The model after the last of ``stops`` rounds, with a new Trainer and module after each of the others."""
    path = None
    for stop in stops:
        module = Sends(len(rows[0]), torch.float64)
        fit = trainer(fl.FederatedStrategy("fedavg", aggregator=rule, engine=engine, seed=0), stop)
        fit.fit(module, loaders(rows, torch.float64), ckpt_path=path)
        path = f"{folder}/{stop}.ckpt"
        fit.save_checkpoint(path)
    return module.w.tolist()


def resumed_and_not(names: Sequence[str], folder: str, engine: str) -> dict[str, tuple[list[float], list[float]]]:
    cases = {**ANSWERS, **NOT_MOVING, "bucketing": (Median(0, [Bucketing(2)]), U7, ())}
    return {
        name: (
            resumed(cases[name][0], cases[name][1], [1, 2], folder, engine),
            resumed(cases[name][0], cases[name][1], [2], folder, engine),
        )
        for name in names
    }


REMEMBERS = ("clipping once", "clipping three times", "bucketing")  # or draws anew: their rounds differ
EVERY_ANSWER = [*ANSWERS, *NOT_MOVING, "bucketing"]


@pytest.mark.parametrize(
    ("world_size", "engine", "names"),
    [
        (1, "sequential", ["krum", "median", *REMEMBERS]),
        slow(1, "vectorized", EVERY_ANSWER),
        slow(2, "sequential", EVERY_ANSWER),
        slow(4, "vectorized", EVERY_ANSWER),
    ],
)
def test_a_resumed_run_has_the_known_answers(
    run_ranks: Any, world_size: int, engine: str, names: Sequence[str], tmp_path: Any
) -> None:
    for answers in run_ranks(world_size, resumed_and_not, names, str(tmp_path), engine):
        for name, (stopped, whole) in answers.items():
            assert stopped == whole, name
            if name not in REMEMBERS:
                expected = {**ANSWERS, **NOT_MOVING}[name][2]
                np.testing.assert_allclose(stopped, 2 * np.array(expected), rtol=1e-7, atol=1.2e-7, err_msg=name)
