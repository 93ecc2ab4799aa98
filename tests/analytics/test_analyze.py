"""Questions about NCCTG lung, whose answers R's survival, lifelines, SciPy and pandas give for the pooled rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_breast_cancer

import lightning_fl as fl
from lightning_fl.aggregation import Aggregator
from lightning_fl.aggregation.robust import Median
from lightning_fl.analytics import (
    PCA,
    Analysis,
    By,
    Cardinality,
    ChiSquare,
    Correlation,
    Count,
    Cox,
    Frequency,
    HeavyHitters,
    Histogram,
    Intersection,
    KaplanMeier,
    LogRank,
    Mean,
    Quantile,
    Question,
    RowLevelDP,
    TTest,
    Variance,
    analyze,
    trie_parameters,
)
from lightning_fl.analytics.disclosure import too_small
from lightning_fl.communication import Group, LocalGroup, Message
from lightning_fl.privacy import Gaussian, InsecureNoiseWarning, Ledger, PrivacyBudgetExceeded, SecureAggregation
from tests.contract.helpers import run_threads
from tests.helpers.federation import join_ranks

LUNG = pd.read_csv(Path(__file__).parents[2] / "examples" / "lung.csv")
GRID = tuple(float(time) for time in sorted(LUNG["time"].unique()))
SEX = ("1", "2")
QUESTIONS: list[Question] = [
    Count(),
    Mean("age"),
    Variance("age"),
    Variance("wt.loss"),
    Quantile("wt.loss", (0.5, 0.9)),
    Quantile("time", (0.25, 0.5, 0.9)),
    Quantile("age", (0.25, 0.5, 0.75)),
    KaplanMeier("time", "status", grid=GRID, at=(365,)),
    By(KaplanMeier("time", "status", grid=GRID, at=(365,)), "sex", SEX),
    LogRank("time", "status", "sex", groups=SEX, grid=GRID),
    Cox("time", "status", ("age", "sex"), grid=GRID),
    Cox("time", "status", ("age", "sex"), "breslow", grid=GRID),
    TTest("age", "sex", SEX),
    TTest("age", "sex", SEX, equal_var=True),
    Correlation("age", "time"),
    ChiSquare("sex", "status", SEX, ("0", "1")),
    Frequency("sex", SEX),
    Histogram("age", (30, 50, 60, 70, 90)),
]


def check_lung(found: Analysis, tolerance: float = 1e-9) -> None:
    """Section by section what the pooled rows say."""
    (
        count,
        mean,
        age,
        loss,
        q_loss,
        q_time,
        q_age,
        km,
        km_sex,
        logrank,
        efron,
        breslow,
        welch,
        pooled,
        r,
        chi2,
        sex,
        hist,
    ) = found.to_dict()["answers"]

    def close(value: Any, expected: Any, to: float = tolerance) -> None:
        assert value == pytest.approx(expected, rel=max(to, tolerance))

    assert (count["count"], loss["n"], chi2["n"], km["n"]) == (228, 214, 228, 228)
    close(mean["mean"], 62.44736842105263)
    close(age["variance"], 82.32761418965917)
    close([loss["mean"], loss["variance"]], [9.83177570093458, 172.65701373349128])
    assert (q_loss["0.5"], q_loss["0.9"]) == (7, 28)
    assert [q_time[q] for q in ("0.25", "0.5", "0.9")] == [166, 252, 624]
    assert [q_age[q] for q in ("0.25", "0.5", "0.75")] == [56, 63, 69]
    male, female = km_sex["parts"]["1"], km_sex["parts"]["2"]
    assert [part["median"] for part in (km, male, female)] == [310, 270, 426]
    year = [(0.4092416, 0.0358236), (0.3360878, 0.0434236), (0.5264630, 0.0597369)]
    for part, (share, se) in zip((km, male, female), year, strict=True):
        close([part["S(365)"]["share"], part["S(365)"]["se"]], [share, se], 2e-6)
    close([logrank["chi2"], logrank["p"]], [10.326741954885637, 0.0013111645], 5e-8)
    assert logrank["observed"]["1"] == 112
    close(logrank["expected"]["1"], 91.58173903)
    for answer, coefs, errors in (
        (efron, (0.01704533, -0.51321852), (0.00922327, 0.16745796)),
        (breslow, (0.01701289, -0.51256479), (0.00922195, 0.16746206)),
    ):
        close([answer[x]["coef"] for x in ("age", "sex")], coefs, 1e-6)
        close([answer[x]["se"] for x in ("age", "sex")], errors, 1e-6)
    close([welch["t"], welch["df"], welch["p"]], [1.8631761513845935, 194.71549828, 0.06394336], 1e-7)
    close([pooled["t"], pooled["p"]], [1.85043463, 0.06555607], 1e-7)
    close(r["r"], -0.07804271042158423)
    close(chi2["chi2"], 13.511174686826863)
    assert sex["parts"] == {"1": 138, "2": 90}
    assert list(hist["parts"].values()) == [20, 63, 89, 56]


def test_one_client_is_the_pooled_table() -> None:
    check_lung(analyze(QUESTIONS, LUNG, min_count=1))


def test_sites_answer_as_the_pooled_table() -> None:
    found = analyze(QUESTIONS, LUNG, client="inst")
    assert found.num_clients == 19  # one of them the row whose site is missing
    check_lung(found)


def test_a_secure_sum_answers_as_the_pooled_table() -> None:
    check_lung(analyze(QUESTIONS, LUNG, client="inst", aggregator=SecureAggregation()))  # its counts bit for bit


def on_ranks(by_site: bool, secure: bool) -> dict[str, Any]:
    group = join_ranks()
    data = LUNG if by_site else LUNG[LUNG.index % group.size == group.rank]
    aggregator = SecureAggregation() if secure else None
    found = analyze(QUESTIONS, data, client="inst" if by_site else None, group=group, aggregator=aggregator)
    check_lung(found)
    return found.to_dict()


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("by_site", "secure"), [(True, False), (True, True), (False, False)])
@pytest.mark.spread(1)
def test_any_number_of_ranks_answers_the_same(run_ranks: Any, world_size: int, by_site: bool, secure: bool) -> None:
    first, *others = run_ranks(world_size, on_ranks, by_site, secure)
    assert all(other == first for other in others)


@pytest.mark.parametrize("size", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_silos_under_secure_aggregation(tmp_path: Path, size: int) -> None:
    make_keys(tmp_path, size)
    pooled = counts_of(analyze(QUESTIONS, LUNG))

    def check(group: Group) -> None:
        aggregator = SecureAggregation(keys=str(tmp_path / "silo{rank}"))
        found = analyze(QUESTIONS, LUNG[LUNG.index % size == group.rank], group=group, aggregator=aggregator)
        assert found.num_clients == size
        check_lung(found)
        assert counts_of(found) == pooled  # bit for bit

    run_threads(size, check)


def counts_of(found: Analysis) -> list[Any]:
    """Numbers of rows, and what follows from counts alone: quantiles, survival, frequencies."""
    answers = found.to_dict()["answers"]
    kinds = ("Count", "Quantile", "KaplanMeier", "LogRank", "ChiSquare", "Frequency", "Histogram")
    return [answer if answer["question"].startswith(kinds) else answer["n"] for answer in answers]


def make_keys(folder: Path, size: int) -> None:
    from lightning_fl.privacy.secagg.keys import KeyFolder

    folders = [KeyFolder(folder / f"silo{rank}") for rank in range(size)]
    public = [folder.create("") for folder in folders]
    for rank, own in enumerate(folders):
        own.trust(public[:rank] + public[rank + 1 :])


def test_what_clients_name_is_found_by_itself() -> None:
    short = [By(Mean("age"), "sex"), LogRank("time", "status", "sex"), KaplanMeier("time", "status"), Frequency("inst")]
    means, logrank, km, sites = analyze(short, LUNG, client="inst").answers
    assert means.parts["1"].values["mean"] == pytest.approx(LUNG[LUNG.sex == 1].age.mean(), rel=1e-12)
    assert logrank.values["chi2"] == pytest.approx(10.326741954885637, rel=1e-10)
    assert km.values["median"] == 310
    assert "curve" not in km.parts
    assert sites.parts["1"] == 36
    assert "33" not in sites.parts  # two rows


def components(secure: bool = False) -> list[float]:
    data = load_breast_cancer(as_frame=True)
    table = data.data.assign(site=np.arange(569) % 5)
    aggregator = SecureAggregation() if secure else None
    (answer,) = analyze([PCA(tuple(data.data.columns))], table, "site", join_ranks(), aggregator).answers
    explained: list[float] = answer.values["explained"]
    return explained


@pytest.mark.parametrize(
    ("world_size", "secure"), [(1, False), (1, True), (2, False), pytest.param(4, True, marks=pytest.mark.slow)]
)
def test_principal_components_of_breast_cancer(run_ranks: Any, world_size: int, secure: bool) -> None:
    for explained in run_ranks(world_size, components, secure):
        assert explained == pytest.approx([0.44272026, 0.18971182, 0.09393163], abs=1e-8)


# ---- edge cases


def sites(**columns: Sequence[Any]) -> dict[str, pd.DataFrame]:
    table = pd.DataFrame(columns)
    return {f"site {site}": rows for site, rows in table.groupby(np.arange(len(table)) % 3)}


def test_large_numbers_keep_their_variance() -> None:
    x = 1e9 + np.random.default_rng(0).standard_normal(300)
    for aggregator in (None, SecureAggregation()):
        (answer,) = analyze([Variance("x")], sites(x=x), aggregator=aggregator).answers
        assert answer.values["variance"] == pytest.approx(np.var(x - 1e9, ddof=1), rel=1e-6)
    naive = float((x**2).sum() - x.sum() ** 2 / 300) / 299
    assert naive != pytest.approx(np.var(x - 1e9, ddof=1), rel=0.1)  # what one pass would give


def test_a_site_with_one_row_and_a_column_without_values() -> None:
    data = {"a": LUNG[:100], "b": LUNG[100:101], "c": LUNG[101:].assign(age=np.nan)}
    mean, empty = analyze(
        [Mean("age"), Mean("nothing")], {k: v.assign(nothing=np.nan) for k, v in data.items()}
    ).answers
    assert mean.values["mean"] == pytest.approx(LUNG[:101].age.mean())
    assert "fewer than 5 rows" in empty.withheld


@pytest.mark.parametrize("q", [0.1, 0.25, 0.5, 0.75, 0.99])
@pytest.mark.parametrize(
    "values", [[1.0] * 7 + [2.0] * 3, [-0.0, 0.0, -1e300, 1e300, 5e-324, 3.0, -7.5], list(range(10))]
)
def test_quantiles_are_those_of_the_inverted_distribution(values: list[float], q: float) -> None:
    (answer,) = analyze([Quantile("x", (q,))], sites(x=values), min_count=1).answers
    assert answer.values[f"{q:g}"] == np.quantile(values, q, method="inverted_cdf")


def test_a_quantile_in_a_range_is_as_fine_as_its_steps() -> None:
    x = np.random.default_rng(0).uniform(0, 100, 1000)
    smallest, median = analyze([Quantile("x", (0.0,), (0, 100)), Quantile("x", (0.5,), (0, 100))], sites(x=x)).answers
    assert median.values["0.5"] == pytest.approx(np.median(x), abs=0.1)
    assert smallest.values["0"] == pytest.approx(x.min(), abs=100 / 16**4)


def test_nobody_has_an_event() -> None:
    data = sites(time=[1, 2, 3, 4, 5, 6], status=[0] * 6, by=["a", "b"] * 3, x=range(6))
    questions = [KaplanMeier("time", "status"), LogRank("time", "status", "by"), Cox("time", "status", ("x",))]
    km, logrank, cox = analyze(questions, data, min_count=1).answers
    assert math.isinf(km.values["median"])
    assert analyze(questions, data, min_count=1).to_dict()["answers"][0]["median"] is None  # as JSON has no infinity
    assert "no events" in logrank.withheld
    assert "no events" in cox.withheld


def test_groups_without_rows() -> None:
    questions = [By(Mean("age"), "sex", ("1", "2", "3")), TTest("age", "sex", ("1", "3"))]
    means, test = analyze(questions[:1], LUNG).answers + analyze(questions[1:], LUNG).answers
    assert means.parts["3"].withheld
    assert means.parts["1"].values["mean"] == pytest.approx(63.34057971014493)
    assert "fewer than 2" in test.withheld


# ---- small counts


def test_what_could_be_subtracted_is_hidden_too() -> None:
    assert too_small({"a": 100, "b": 90, "c": 3}, 5) == {"b", "c"}  # c is all less a and b
    assert too_small({"a": 100, "b": 90, "c": 3, "d": 2}, 5) == {"c", "d"}
    assert too_small({"a": 100, "b": 90, "(other or missing)": 2}, 5) == {"b"}
    assert too_small({"a": 100, "b": 90, "c": 3, "(other or missing)": 40}, 5) == {"c"}
    assert too_small({"a": 100, "b": 90, "c": 0}, 5) == set()


def test_no_few_rows_are_left_after_subtraction() -> None:
    data, groups = sites(group=["a"] * 20 + ["b"] * 10 + ["c"] * 3, x=range(33)), ("a", "b", "c")
    total, means, counts = analyze(
        [Mean("x"), By(Mean("x"), "group", groups), Frequency("group", groups)], data
    ).answers
    for answer in (means, counts):
        shown = [name for name, part in answer.parts.items() if not getattr(part, "withheld", "")]
        assert shown == ["a"]
    assert total.values["mean"] == 16
    assert not means.counts
    assert "3" not in repr(means.parts["c"]).replace("fewer than 5", "")
    unprotected = analyze([By(Mean("x"), "group")], data, min_count=1).answers[0]
    assert unprotected.parts["c"].values["mean"] == 31  # the negative control


def test_missing_values_within_a_group_count() -> None:
    x = [1.0] * 20 + [np.nan] * 8 + [5.0, 7.0]  # b has ten rows, of which two have a value
    (means,) = analyze([By(Mean("x"), "group", ("a", "b"))], sites(group=["a"] * 20 + ["b"] * 10, x=x)).answers
    assert means.parts["a"].withheld
    assert means.parts["b"].withheld


def test_shares_at_many_times_are_no_way_around_a_curve_that_is_withheld() -> None:
    times = sites(time=np.arange(1.0, 41.0), status=[1] * 40)
    for grid in ((), tuple(range(1, 41))):
        few, many = (KaplanMeier("time", "status", grid=grid, at=at) for at in ((10, 20, 30), (10, 12, 30)))
        (shown,), (hidden,) = (analyze([question], times).answers for question in (few, many))
        assert shown.values["S(20)"]["share"] == pytest.approx(0.5)
        assert "fewer than 5" in hidden.withheld
        assert not hidden.values
        with pytest.raises(ValueError, match="divide the column 'time' in different ways"):
            analyze([few, replace(few, at=(12,))], times)


def test_answers_hold_no_small_count_in_any_place() -> None:
    """Whatever was withheld must not be found in an answer's other fields."""
    data, groups = sites(group=["a"] * 33 + ["b"] * 30 + ["c"] * 3, x=np.arange(66.0)), ("a", "b", "c")
    questions = [Frequency("group", groups), By(Variance("x"), "group", groups)]
    for answer in analyze(questions, data).answers:
        assert not answer.counts
        assert not answer.fewest
        assert all(not part.n for part in answer.parts.values() if getattr(part, "withheld", ""))
    assert analyze(questions, data, min_count=1).answers[0].counts["c"] == 3  # the negative control


def test_a_test_of_two_groups_is_withheld_if_few_rows_are_in_neither() -> None:
    data = sites(group=["a"] * 20 + ["b"] * 20 + [None] * 3, x=np.arange(43.0))
    hidden = analyze([TTest("x", "group", ("a", "b"))], data).answers[0]
    assert "has fewer than 5" in hidden.withheld
    more = sites(group=["a"] * 20 + ["b"] * 20 + [None] * 6, x=np.arange(46.0))
    assert analyze([TTest("x", "group", ("a", "b"))], more).answers[0].values["means"] == {"a": 9.5, "b": 29.5}


def test_a_small_cell_that_margins_and_statistic_tell_is_withheld() -> None:
    def answer(cell: int) -> fl.analytics.Answer:
        x, y = ["a"] * 30 + ["b"] * 30, ["c"] * (30 - cell) + ["d"] * cell + ["d"] * 30
        return analyze([ChiSquare("x", "y", ("a", "b"), ("c", "d"))], sites(x=x, y=y)).answers[0]

    assert "fewer than 5" in answer(3).withheld
    assert answer(5).values["df"] == 1


@pytest.mark.parametrize("events", [3, 37])
def test_few_events_or_few_without_are_withheld(events: int) -> None:
    status = [1] * events + [0] * (40 - events)
    data = sites(time=np.arange(1.0, 41.0), status=status, by=["a", "b"] * 20, x=[0.0, 1.0, 2.0, 4.0] * 10)
    questions: list[Question] = [KaplanMeier("time", "status"), LogRank("time", "status", "by")]
    for answer in analyze([*questions, Cox("time", "status", ("x",))], data).answers:
        assert answer.withheld
        assert not answer.values


@pytest.mark.parametrize("few", [0, 3, 6])
def test_events_of_few_rows_that_are_left_out_do_not_follow(few: int) -> None:
    """All events less those of the groups, or of the rows with covariates, would be those of the few."""
    time, status = np.arange(1.0, 61.0), [1, 1, 0] * 20
    by = [None] * few + ["a", "b"] * ((60 - few) // 2) + ["a"] * (few % 2)
    x = [np.nan] * few + [0.0, 1.0, 2.0] * ((60 - few) // 3)
    questions: list[Question] = [LogRank("time", "status", "by", groups=("a", "b")), Cox("time", "status", ("x",))]
    logrank, cox = analyze(questions, sites(time=time, status=status, by=by, x=x)).answers
    assert bool(logrank.withheld) is (few == 3)
    assert isinstance(cox.parts["events"], fl.analytics.Answer) is (few == 3)
    assert "coef" in cox.values["x"]


def test_quantiles_that_are_close_would_list_the_rows() -> None:
    data = sites(x=np.arange(100.0))
    many = analyze([Quantile("x", tuple(q / 100 for q in range(6, 95)))], data).answers[0]
    assert "fewer than 5" in many.withheld
    assert analyze([Quantile("x", (0.25, 0.5, 0.75))], data).answers[0].values["0.5"] == 49
    with pytest.raises(ValueError, match="divide the column 'quantiles of x' in different ways"):
        analyze([Quantile("x", (0.5,)), Quantile("x", (0.51,))], data)


def test_clients_name_no_value_that_few_of_their_rows_have() -> None:
    told: list[Any] = []

    class Spy(LocalGroup):
        def all_gather(self, message: Message, topic: str = "") -> list[Message]:
            told.append(message.fields)
            return super().all_gather(message, topic)

    data = {site: pd.DataFrame({"x": ["common"] * 9 + ["rare", "other"]}) for site in range(6)}
    (answer,) = analyze([Frequency("x")], data, group=Spy()).answers
    assert answer.parts == {"common": 54}  # "rare" is not, though six rows have it: declare it
    assert "rare" not in repr(told)
    assert analyze([Frequency("x", ("common", "rare"))], data).answers[0].parts["rare"] == 6
    analyze([Frequency("x")], data, group=Spy(), min_count=1)
    assert "rare" in repr(told)  # the negative control


def test_silos_name_no_single_row() -> None:
    def check(group: Group) -> None:
        own = LUNG[LUNG.index % group.size == group.rank]
        for question in (
            KaplanMeier("time", "status"),
            By(LogRank("time", "status", "sex"), "sex"),
            Intersection("time"),
        ):
            with pytest.raises(ValueError, match="would have to reveal 'time' of each of its rows"):
                analyze([question], own, group=group)
        (km,) = analyze([KaplanMeier("time", "status")], own, group=group, min_count=1).answers
        assert km.values["median"] == 310

    run_threads(2, check)


def test_a_silo_with_few_rows_answers_by_secure_sums_only(tmp_path: Path) -> None:
    make_keys(tmp_path, 3)

    def check(group: Group) -> float:
        own = LUNG[:100] if group.rank == 0 else LUNG[100:101] if group.rank == 1 else LUNG[101:]
        with pytest.raises(ValueError, match="Rank 1: This silo has 1 rows, fewer than 5"):
            analyze([Mean("age")], own, group=group)
        aggregator = SecureAggregation(keys=str(tmp_path / "silo{rank}"))
        mean: float = analyze([Mean("age")], own, group=group, aggregator=aggregator).answers[0].values["mean"]
        return mean

    assert run_threads(3, check) == [pytest.approx(62.44736842105263, rel=1e-12)] * 3


def test_two_ways_of_dividing_a_column_are_refused() -> None:
    with pytest.raises(ValueError, match="divide the column 'sex' in different ways"):
        analyze([By(Mean("age"), "sex", ("1",)), By(Mean("age"), "sex", SEX)], LUNG)


# ---- refusals


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        (By(Mean("age"), "sex"), {"aggregator": "secure"}, "does not declare values"),
        (KaplanMeier("time", "status"), {"aggregator": "secure"}, "does not declare grid of the column 'time'"),
        (Cardinality("meal.cal"), {"aggregator": "secure"}, "which values a client may hold"),
        (Mean("age"), {"privacy": 1.0}, "no declared range"),
        (Quantile("age"), {"privacy": 1.0}, "no declared range"),
        (Cox("time", "status", ("age",), grid=GRID), {"privacy": 1.0}, "no bound on one row's contribution"),
        (Frequency("sex"), {"privacy": 1.0}, "does not declare values"),
        (Mean("age"), {"aggregator": Median()}, "Median is not a sum"),
        (Mean("agee"), {}, "There is no column 'agee'"),
        (Mean("age"), {"data": LUNG.assign(age="old")}, "is text"),
        (Mean("age"), {"data": LUNG.assign(age=1e300)}, "Measure the column in a larger unit"),
    ],
)
def test_refused(question: Question, options: dict[str, Any], message: str) -> None:
    data = options.pop("data", LUNG)
    if options.get("aggregator") == "secure":
        options = {"aggregator": SecureAggregation()}
    if "privacy" in options:
        options = {"privacy": RowLevelDP(options["privacy"])}
    with pytest.raises(ValueError, match=message):
        analyze([question], data, client="inst", **options)


def test_a_secure_sum_of_two_is_refused() -> None:
    with pytest.raises(ValueError, match="no sum over fewer than 3"):
        analyze([Mean("age")], {"a": LUNG[:100], "b": LUNG[100:]}, aggregator=SecureAggregation())


def test_minimum_and_maximum_need_a_range() -> None:
    with pytest.raises(ValueError, match="a single row's value"):
        Quantile("age", (0.0,))


def test_a_quantile_that_is_nearly_the_minimum_or_maximum_is_withheld() -> None:
    x = sites(x=np.arange(100.0))
    shown = analyze([Quantile("x", (0.05, 0.5, 0.95))], x).answers[0]
    assert shown.values == {"0.05": 4.0, "0.5": 49.0, "0.95": 94.0}
    for q in (0.01, 0.04, 0.97, 0.999):
        answer = analyze([Quantile("x", (0.5, q))], x).answers[0]
        assert "fewer than 5" in answer.withheld
        assert not answer.values


def test_a_silo_that_lacks_a_column_stops_all() -> None:
    def check(group: Group) -> str:
        with pytest.raises(ValueError, match="Rank 1: There is no column 'age'") as error:
            analyze([Mean("age")], LUNG if group.rank == 0 else LUNG.drop(columns="age"), group=group)
        return str(error.value)

    assert len(set(run_threads(2, check))) == 1


def test_silos_that_ask_differently_are_told() -> None:
    def check(group: Group) -> None:
        with pytest.raises(ValueError, match="asks other questions"):
            analyze([Mean("age" if group.rank else "time")], LUNG, group=group)

    run_threads(2, check)


def test_silos_need_a_secure_sum_for_noise() -> None:
    def check(group: Group) -> None:
        with pytest.raises(ValueError, match="each silo adds a share"):
            analyze([Count()], LUNG, group=group, privacy=RowLevelDP(1.0))

    run_threads(2, check)


# ---- differential privacy


@pytest.mark.slow
def test_noise_has_the_deviation_that_is_recorded() -> None:
    with pytest.warns(InsecureNoiseWarning):
        privacy = RowLevelDP(2.0, insecure_test_seed=1)
    for question, sensitivity in ((Count(), 1.0), (Mean("age", (0, 120)), math.sqrt(2))):
        answers = analyze([question] * 2000, LUNG, privacy=privacy, min_count=1).answers
        draws = np.array([answer.n for answer in answers]) - 228
        assert draws.std() == pytest.approx(2.0 * sensitivity, rel=0.03)
        assert abs(draws.mean()) < 0.2


def test_no_row_adds_more_than_the_sensitivity() -> None:
    extremes = pd.DataFrame({"x": [-1e9, 0, 50, 1e9], "y": [1e9, 50, 0, -1e9], "g": ["a", "b", "b", "a"]})
    bounds = (0.0, 100.0)
    questions: list[Question] = [
        Count(),
        Mean("x", bounds),
        Variance("x", bounds),
        Correlation("x", "y", (bounds, bounds)),
        PCA(("x", "y"), 2, ranges=(bounds, bounds)),
        Quantile("x", (0.2, 0.5), bounds),
        Histogram("x", (0, 50, 100)),
        TTest("x", "g", ("a", "b"), range=bounds),
        By(Mean("x", bounds), "g", ("a",)),
        Frequency("g", ("a", "b")),
        KaplanMeier("x", "y", grid=(10, 100)),
        LogRank("x", "y", "g", groups=("a", "b"), grid=(10, 100)),
    ]
    for question in questions:
        state = question.start()
        for _ in range(2):
            for row in range(len(extremes)):
                sums = question.local(extremes[row : row + 1], state).values()
                norm = math.sqrt(sum(float(value.square().sum()) for value in sums))
                assert norm <= question.sensitivity(state) + 1e-9, question
            state = question.step(question.local(extremes, state), state)
            if isinstance(state, fl.analytics.Answer):
                break


def test_answers_under_noise_are_near() -> None:
    questions = [Variance("age", (0, 120)), Quantile("age", (0.5,), (0, 120)), By(Mean("age", (0, 120)), "sex", SEX)]
    found = analyze(questions, LUNG, client="inst", privacy=RowLevelDP(0.5))
    variance, median, means = found.answers
    assert variance.values["mean"] == pytest.approx(62.4, abs=3)
    assert median.values["0.5"] == pytest.approx(63, abs=5)
    assert means.parts["1"].values["mean"] == pytest.approx(63.3, abs=5)


def test_the_ledger_adds_up_over_questions() -> None:
    privacy = RowLevelDP(4.0)
    first = analyze([Mean("age", (0, 120)), Variance("age", (0, 120))], LUNG, privacy=privacy)
    second = analyze([Quantile("age", (0.5,), (0, 120))], LUNG, privacy=privacy, ledger=first.ledger)
    expected = Ledger()
    expected.record(Gaussian(4.0, adversary="model"), 1 + 2 + 4)
    assert second.ledger == expected
    assert second.epsilon == (expected.epsilon(1e-5), 1e-5)
    assert first.epsilon is not None
    assert first.epsilon[0] < second.epsilon[0]
    assert analyze([Count()], LUNG).epsilon is None


def test_a_budget_ends_the_questions_before_a_release() -> None:
    ledger = Ledger()
    with pytest.raises(PrivacyBudgetExceeded, match="above max_epsilon=1"):
        analyze([Count()] * 3, LUNG, privacy=RowLevelDP(4.0, max_epsilon=1.0), ledger=ledger)
    assert list(ledger) == []
    analyze([Count()], LUNG, privacy=RowLevelDP(8.0, max_epsilon=1.0))


def test_a_ledger_file_adds_up_over_calls() -> None:
    words = {site: pd.DataFrame({"word": ["flu"] * 5000, "age": 50}) for site in range(2)}
    privacy = RowLevelDP(4.0, max_epsilon=12.0)
    analyze([Mean("age", (0, 120))], words, privacy=privacy, ledger="ledger.json")
    analyze([HeavyHitters("word", epsilon=2, delta=1e-6, length=3)], words, ledger="ledger.json")
    last = analyze([Variance("age", (0, 120))], words, privacy=privacy, ledger="ledger.json")
    expected = Ledger()
    expected.record(Gaussian(4.0, adversary="model"), 1 + 2)
    assert last.ledger == expected
    assert last.epsilon == (pytest.approx(float(expected.epsilon(1e-5)) + 2), pytest.approx(1e-5 + 1e-6))
    with pytest.raises(PrivacyBudgetExceeded):
        analyze([HeavyHitters("word", epsilon=9, length=3)], words, privacy=privacy, ledger="ledger.json")
    # An answer without noise tells everything, and the ledger says so.
    analyze([Count()], words, ledger="ledger.json")
    with pytest.raises(PrivacyBudgetExceeded, match="epsilon to inf"):
        analyze([Count()], words, privacy=privacy, ledger="ledger.json")


def test_a_ledger_file_remembers_how_columns_were_divided() -> None:
    analyze([By(Mean("age"), "sex", SEX)], LUNG, ledger="ledger.json")
    analyze([Frequency("sex", SEX)], LUNG, ledger="ledger.json")
    with pytest.raises(ValueError, match="divide the column 'sex' in different ways"):
        analyze([Frequency("sex", ("1",))], LUNG, ledger="ledger.json")
    assert analyze([Frequency("sex", ("1",))], LUNG).answers[0].n == 138  # the negative control: nothing is remembered


def test_a_ledger_file_is_written_before_a_sum_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_fl.aggregation.WeightedMean.result", dies)
    with pytest.raises(KeyboardInterrupt):
        analyze([Count()], LUNG, privacy=RowLevelDP(4.0), ledger="ledger.json")
    monkeypatch.undo()
    assert [count for _, count in analyze([Count()], LUNG, privacy=RowLevelDP(4.0), ledger="ledger.json").ledger] == [2]


@pytest.mark.parametrize("content", ["{}", "[1]", '{"format": 2}', "no json"])
def test_another_file_is_no_ledger(content: str) -> None:
    Path("ledger.json").write_text(content)
    with pytest.raises(ValueError, match=r"ledger\.json is not a ledger of questions"):
        analyze([Count()], LUNG, ledger="ledger.json")
    assert Path("ledger.json").read_text() == content


def test_the_budget_of_one_silo_stops_all(tmp_path: Path) -> None:
    make_keys(tmp_path, 3)

    def check(group: Group) -> None:
        privacy = RowLevelDP(4.0, max_epsilon=1.5)
        before = Ledger()
        if group.rank == 1:
            before.record(Gaussian(4.0), 3)
        aggregator = SecureAggregation(keys=str(tmp_path / "silo{rank}"))
        with pytest.raises(PrivacyBudgetExceeded, match="Rank 1: The next step would raise epsilon to"):
            analyze([Count()], LUNG, group=group, aggregator=aggregator, privacy=privacy, ledger=before)

    run_threads(3, check)


def test_words_that_are_private_by_themselves_count_against_the_budget() -> None:
    data = {site: pd.DataFrame({"word": ["flu"] * 5000}) for site in range(2)}
    words = HeavyHitters("word", epsilon=4, delta=1e-6, length=3)
    with pytest.raises(PrivacyBudgetExceeded, match="epsilon to 8, above max_epsilon=5"):
        analyze([words] * 2, data, privacy=RowLevelDP(4.0, max_epsilon=5.0))
    with pytest.raises(PrivacyBudgetExceeded):
        analyze([words, Count()], data, privacy=RowLevelDP(4.0, max_epsilon=4.1))
    assert analyze([words], data, privacy=RowLevelDP(4.0, max_epsilon=5.0)).answers[0].values["words"] == ["flu"]


def test_noise_of_a_test_seed_is_no_privacy() -> None:
    with pytest.warns(InsecureNoiseWarning):
        privacy = RowLevelDP(4.0, insecure_test_seed=0)
    epsilon = analyze([Count()], LUNG, privacy=privacy).epsilon
    assert epsilon is not None
    assert math.isinf(epsilon[0])


def test_silos_add_shares_of_the_noise(tmp_path: Path) -> None:
    make_keys(tmp_path, 3)

    def check(group: Group) -> list[float]:
        aggregator = SecureAggregation(keys=str(tmp_path / "silo{rank}"), min_clients=3)
        silo, questions = LUNG[LUNG.index % 3 == group.rank], [Histogram("age", tuple(range(0, 1001)))]
        found = analyze(questions, silo, group=group, aggregator=aggregator, privacy=RowLevelDP(4.0), min_count=1)
        return list(found.answers[0].parts.values())

    first, *others = run_threads(3, check)
    assert all(other == first for other in others)
    # Three shares of which two have the noise of z = 4; ages from 100 on have no rows.
    assert np.std(first[100:]) == pytest.approx(4.0 * math.sqrt(3 / 2), rel=0.1)


# ---- words and ids


@pytest.mark.parametrize(
    ("n", "epsilon", "delta", "expected"),
    [(10_000, 4, 2.3e-12, (15, 219)), (10_000, 1, 1e-6, (10, 95)), (1_000_000, 4, 1e-9, (13, 25359))],
)
def test_the_parameters_of_the_trie(n: int, epsilon: float, delta: float, expected: tuple[int, int]) -> None:
    assert trie_parameters(n, epsilon, delta, 10) == expected


def test_frequent_words_are_found_and_rare_ones_not() -> None:
    rng = np.random.default_rng(0)
    words = rng.choice(["covid", "flu", "cold", "asthma"], 20_000, p=[0.4, 0.3, 0.2, 0.1])
    words[:5] = "rarity"
    data = {site: pd.DataFrame({"word": words[site::4]}) for site in range(4)}
    found = analyze([HeavyHitters("word", epsilon=8, delta=1e-6, length=7)], data)
    assert {"covid", "flu", "cold"} <= set(found.answers[0].values["words"])
    assert "rarity" not in found.answers[0].values["words"]
    assert found.epsilon == (8, 1e-6)
    few = analyze([HeavyHitters("word")], {0: data[0][:50]}).answers[0]
    assert "too few" in few.withheld


def test_how_many_values_there_are() -> None:
    data = {site: pd.DataFrame({"id": range(site * 500, site * 500 + 1000)}) for site in range(3)}
    distinct, shared = analyze([Cardinality("id"), Intersection("id")], {**data, 3: data[1]}).answers
    assert distinct.values["distinct"] == pytest.approx(2000, rel=0.05)
    assert shared.withheld  # nobody's ids are with all
    (shared,) = analyze([Intersection("id")], {0: data[0], 1: data[1]}).answers
    assert shared.values["shared"] == 500


def test_answers_are_plain_data(tmp_path: Path) -> None:
    found = analyze([Mean("age"), By(Mean("age"), "sex"), Frequency("inst")], LUNG, client="inst")
    found.save(tmp_path / "answers.json")
    import json

    assert json.loads((tmp_path / "answers.json").read_text()) == found.to_dict()


def test_every_aggregator_of_sums_is_taken() -> None:
    aggregators: list[Aggregator] = [fl.aggregation.WeightedMean(), SecureAggregation(protocol="bonawitz")]
    for aggregator in aggregators:
        (answer,) = analyze([Mean("age")], LUNG, client="inst", aggregator=aggregator).answers
        assert answer.values["mean"] == pytest.approx(62.44736842105263, rel=1e-12)
