"""What a callback may know and do of a round, and how its hooks get it."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

import lightning_fl as fl
from lightning_fl.callbacks import FederatedCallback
from lightning_fl.strategies.round_view import RoundView, personal_tensors
from tests.helpers.training import Plain, image_clients, trainer

SIZES = (7, 4, 9, 5)


def fit(callback: L.Callback, rounds: int = 2, module: Any = None, **options: Any) -> L.Trainer:
    run = trainer(fl.FederatedStrategy(**{"engine": "sequential", "seed": 1, **options}), rounds, callbacks=[callback])
    run.fit(Plain() if module is None else module, image_clients(SIZES))
    return run


# ---- hooks with and without `view`

HOOKS = ("on_round_start", "on_client_start", "on_phase_end", "on_client_end", "on_group_end", "on_aggregate_end")


class WithView(FederatedCallback):
    """Names ``view`` in each hook."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def on_round_start(self, trainer: Any, module: Any, round: int, cohort: Any, view: RoundView) -> None:
        self.calls.append(("on_round_start", view))

    def on_client_start(self, trainer: Any, module: Any, client: Any, view: RoundView) -> None:
        self.calls.append(("on_client_start", view))

    def on_phase_end(self, trainer: Any, module: Any, client: Any, view: RoundView) -> None:
        self.calls.append(("on_phase_end", view))

    def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any, view: RoundView) -> None:
        self.calls.append(("on_client_end", view))

    def on_group_end(self, trainer: Any, module: Any, clients: Any, view: RoundView) -> None:
        self.calls.append(("on_group_end", view))

    def on_aggregate_end(self, trainer: Any, module: Any, aggregate: Any, view: RoundView) -> None:
        self.calls.append(("on_aggregate_end", view))


class WithoutView(FederatedCallback):
    """Does not."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def on_round_start(self, trainer: Any, module: Any, round: int, cohort: Any) -> None:  # type: ignore[override]
        self.calls.append(("on_round_start", None))

    def on_client_start(self, trainer: Any, module: Any, client: Any) -> None:  # type: ignore[override]
        self.calls.append(("on_client_start", None))

    def on_phase_end(self, trainer: Any, module: Any, client: Any) -> None:  # type: ignore[override]
        self.calls.append(("on_phase_end", None))

    def on_client_end(self, *args: Any) -> None:  # type: ignore[override]
        assert len(args) == 5
        self.calls.append(("on_client_end", None))

    def on_group_end(self, trainer: Any, module: Any, clients: Any) -> None:  # type: ignore[override]
        self.calls.append(("on_group_end", None))

    def on_aggregate_end(self, trainer: Any, module: Any, aggregate: Any) -> None:  # type: ignore[override]
        self.calls.append(("on_aggregate_end", None))


class OnlyLightning(L.Callback):
    """Has the hooks' names without being a FederatedCallback."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        for hook in HOOKS:
            setattr(self, hook, lambda *args, hook=hook: self.calls.append((hook, None)))


@pytest.mark.parametrize("kind", [WithView, WithoutView, OnlyLightning])
def test_each_hook_is_called_in_turn_and_gets_the_view_if_it_names_it(kind: Any) -> None:
    callback = kind()
    run = fit(callback, rounds=1, clients_per_round=2)
    a_client = ["on_client_start", "on_phase_end", "on_client_end", "on_group_end"]
    assert [name for name, _ in callback.calls] == ["on_round_start", *a_client, *a_client, "on_aggregate_end"]
    view: Any = run.strategy.view if kind is WithView else None
    assert all(given is view for _, given in callback.calls)


def test_a_hook_by_keyword_only_gets_the_view() -> None:
    class Keyword(FederatedCallback):
        seen: Any = None

        def on_round_start(self, *args: Any, view: RoundView) -> None:  # type: ignore[override]
            assert len(args) == 4
            self.seen = view

    callback = Keyword()
    run: Any = fit(callback, rounds=1)
    assert callback.seen is run.strategy.view


# ---- what it shows


class Notes(FederatedCallback):
    """Keeps the answers of a function at each hook."""

    def __init__(self, ask: Any) -> None:
        self.ask = ask
        self.answers: dict[str, list[Any]] = {hook: [] for hook in (*HOOKS, "on_train_epoch_end")}

    def on_round_start(self, trainer: Any, module: Any, round: int, cohort: Any, view: RoundView) -> None:
        self.answers["on_round_start"].append(self.ask(view))

    def on_client_start(self, trainer: Any, module: Any, client: Any, view: RoundView) -> None:
        self.answers["on_client_start"].append(self.ask(view))

    def on_aggregate_end(self, trainer: Any, module: Any, aggregate: Any, view: RoundView) -> None:
        self.answers["on_aggregate_end"].append(self.ask(view))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.answers["on_train_epoch_end"].append(self.ask(trainer.strategy.view))


def test_the_federation() -> None:
    notes = Notes(lambda view: view)
    run: Any = fit(notes, clients_per_round=0.5, weighting="uniform")
    view = notes.answers["on_round_start"][0]
    assert all(answer is view for answers in notes.answers.values() for answer in answers)
    assert (view.settings.population, view.settings.weighting, view.settings.seed) == (4, "uniform", 1)
    assert list(view.population.ids) == [0, 1, 2, 3]
    assert view.participation.clients_per_round == 0.5
    assert (view.group.rank, view.group.size) == (0, 1)
    assert view.expected_cohort_size == 2
    assert view.history == run.strategy.history
    assert view.server_state.keys() == {"params"}
    assert view.max_work.epochs == 1
    assert not view.trains_groups


def test_the_round_at_each_hook() -> None:
    notes = Notes(lambda view: (view.round, tuple(view.cohort), tuple(view.clients), len(view.history)))
    run: Any = fit(notes, clients_per_round=2)
    cohorts = [answer[1] for answer in notes.answers["on_round_start"]]
    assert all(len(cohort) == 2 for cohort in cohorts)
    expected = [(index, cohort, cohort, index) for index, cohort in enumerate(cohorts)]
    assert notes.answers["on_round_start"] == expected
    assert notes.answers["on_client_start"] == [answer for answer in expected for _ in range(2)]
    after = [(index, cohort, cohort, index + 1) for index, cohort in enumerate(cohorts)]
    assert notes.answers["on_aggregate_end"] == after
    assert [answer[3] for answer in notes.answers["on_train_epoch_end"]] == [1, 2]
    assert run.strategy.view.server_state["params"].keys() == run.strategy.driver.state.server["params"].keys()


def test_the_groups_and_the_work() -> None:
    notes = Notes(lambda view: (list(view.groups), view.trains_groups, view.work_of(0), view.work_of("a stranger")))
    trainer(fl.FederatedStrategy(engine="vectorized", local_epochs=3, seed=1), 1, callbacks=[GroupNotes(notes)]).fit(
        Plain(), image_clients((8, 8, 8))
    )
    ((groups, trains_groups, (work,), (most,)),) = notes.answers["on_round_start"]
    assert groups == [(0, 1, 2)]
    assert trains_groups
    assert (work.epochs, most.epochs) == (3, 3)


class GroupNotes(FederatedCallback):
    """Notes at a round's start only, so that clients may train side by side."""

    def __init__(self, notes: Notes) -> None:
        self.on_round_start = notes.on_round_start  # type: ignore[method-assign]


def test_placement() -> None:
    notes = Notes(lambda view: (view.place([0, 1, 2]), view.place([3, 1], sticky=True)))
    fit(notes, rounds=1)
    assert notes.answers["on_round_start"] == [([[0, 1, 2]], [[3, 1]])]


def test_the_model_is_that_of_the_moment() -> None:
    notes = Notes(lambda view: {name: tensor.detach().clone() for name, tensor in view.params.items()})
    module = Plain()
    fit(notes, module=module)
    starts, ends = notes.answers["on_round_start"], notes.answers["on_aggregate_end"]
    torch.testing.assert_close(ends[0], starts[1], rtol=0, atol=0)
    torch.testing.assert_close(ends[1], dict(module.state_dict()), rtol=0, atol=0)
    for number, values in enumerate(notes.answers["on_client_start"]):
        torch.testing.assert_close(values, starts[number // 4], rtol=0, atol=0)
    assert not torch.equal(ends[0]["net.1.weight"], starts[0]["net.1.weight"])


def test_the_model_is_there_in_training_only() -> None:
    run: Any = fit(Notes(lambda view: None), rounds=1)
    with pytest.raises(AssertionError, match="only between the start and the end of training"):
        _ = run.strategy.view.params


# ---- client states and facts


def test_personal_tensors_of_a_client() -> None:
    notes = Notes(lambda view: (view.clients_with_state(), personal_tensors(view, 0, "cpu")))
    fit(notes, clients_per_round=None, personal=["net.3.*"])
    (none, nothing), (every, own) = notes.answers["on_round_start"]
    assert (none, nothing) == ([], {})
    assert sorted(every) == [0, 1, 2, 3]
    assert own.keys() == {"net.3.weight", "net.3.bias"}


def test_a_ledger_is_kept_whatever_becomes_of_the_round() -> None:
    class Spends(FederatedCallback):
        keeps_client_state = True

        def on_client_start(self, trainer: Any, module: Any, client: Any, view: RoundView) -> None:
            view.record_ledger(client, torch.tensor([float(client)]))
            if client == 2:
                raise RuntimeError("the round is over")

    strategy = fl.FederatedStrategy(engine="sequential")
    run = trainer(strategy, 1, callbacks=[Spends()])
    with pytest.raises(RuntimeError, match="the round is over"):
        run.fit(Plain(), image_clients(SIZES))
    store = strategy.active_driver.store
    assert [store.get(client)["ledger"].item() for client in store.clients()] == [0.0, 1.0, 2.0]


def test_facts_are_added_to_the_last_round() -> None:
    class Adds(FederatedCallback):
        def on_aggregate_end(self, trainer: Any, module: Any, aggregate: Any, view: RoundView) -> None:
            view.add_facts({"spent": 1.5 + view.round})

    run: Any = fit(Adds())
    assert [entry["spent"] for entry in run.strategy.history] == [1.5, 2.5]
