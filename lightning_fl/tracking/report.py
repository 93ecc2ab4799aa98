"""A self-contained HTML page about a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

from lightning_fl.tracking import interactive, markup, plots
from lightning_fl.tracking.answers import ANSWERS_FILE, content_of, read_answers
from lightning_fl.tracking.metrics import best_metric, mode_of
from lightning_fl.tracking.run import Run, write_file

MAX_PANELS = 8
EVALUATED = ("personalized/", "global/", "local/")
"""Prefix of the metrics of :class:`~lightning_fl.callbacks.PersonalizedEvaluation`."""
CONTRIBUTION = "contribution/"
LEAST_SECONDS = 0.005
"""Less than that, over a whole run, is not shown: what a run does not do takes some microseconds too."""
PHASES = {
    "read": "waiting for data",
    "train": "local training",
    "wait": "waiting for ranks",
    "communicate": "summing",
    "server": "server update",
    "transform": "clip, noise, epsilon, compression",
}


def write_report(run: Run, path: Path) -> None:
    """Writes the page.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the run has not finished a round.
    """
    write_file(path, render(run))


def render(run: Run) -> str:
    """The page as text."""
    if not run.rounds:
        raise ValueError(f"{run.path} has no finished round to report on. Its status: {run.facts.get('status', '?')}.")
    sections = [
        markup.section("Metrics of the global model", _curves(run, [n for n in run.metric_names if _is_global(n)])),
        markup.section("Local training", _curves(run, [n for n in run.metric_names if n.startswith("train")])),
        markup.section("On each client's validation data", _client_evaluations(run)),
        markup.section("On the simulated clock", _clock(run)),
        markup.section("Privacy", _privacy(run)),
        markup.section("Clients, round by round", _clients(run)),
        markup.section("Contributions of clients", _contributions(run)),
        markup.section("Who has what", _partition(run)),
        markup.section("Questions about the data", _answers(run)),
        markup.section("Updates, time and traffic", _costs(run)),
        markup.section("Left out", _left_out(run)),
        markup.section("Evaluated afterwards", _evaluations(run)),
        markup.section("Settings", _settings(run)),
        markup.section("Do it again", _again(run)),
    ]
    return markup.page(run.name, f"{_head(run)}\n{''.join(sections)}")


def _head(run: Run) -> str:
    status = str(run.facts.get("status", "?"))
    mark = ' class="bad"' if status.startswith("failed") else ""
    lead = (
        f"{escape(run.algorithm)}, {escape(_clients_in_words(run))}. "
        f"Started {escape(started(run))}, <span{mark}>{escape(status)}</span>."
    )
    cards = [(f"{len(run.rounds):,}", "rounds")]
    if run.metric_names:
        name = best_metric([run])
        rounds, values = run.metric(name)
        finite = [(value, at) for at, value in zip(rounds, values, strict=True) if value == value]
        cards.append((markup.number(values[-1]), f"{name} in the last round"))
        mode = mode_of(name, [run])
        for choose, end in ((max, "highest"), (min, "lowest")):
            if finite and mode in (None, choose.__name__):  # both, where it is not known which is the best
                value, at = choose(finite, key=lambda pair: pair[0])
                cards.append((markup.number(value), f"{end} {name}, round {at}"))
    for prefix in ("dp", "dp_example"):
        if f"{prefix}_unit" in run.rounds[-1]:
            epsilon = run.rounds[-1][f"{prefix}_epsilon"]
            shown = "infinite" if epsilon is None else markup.number(epsilon)
            cards.append((shown, f"epsilon, for one {run.rounds[-1][f'{prefix}_unit']}"))
    if run.seconds is not None:
        cards.append((duration(run.seconds), "training and validation"))
    steps, sent = run.total("num_steps"), run.total("num_bytes")
    if steps is not None:
        cards.append((f"{steps:,.0f}", "local steps, all clients"))
    if sent:
        cards.append((_bytes(sent), "sent by this rank"))
    boxes = "".join(f'<div class="card"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in cards)
    return f'<h1>{escape(run.name)}</h1>\n<p class="lead">{lead}</p>\n<div class="cards">{boxes}</div>'


def _clients_in_words(run: Run) -> str:
    if "num_clients" not in run.settings:
        return "no clients: a centralised run"
    kind = "silos" if run.settings.get("clients") == "silos" else "simulated clients"
    return f"{run.settings['num_clients']} {kind}"


def _is_global(name: str) -> bool:
    """Whether a metric is of the global model; training metrics are of the clients' models during local training."""
    return not name.startswith(("train", "fl/", "clients/", *EVALUATED))


def _privacy(run: Run) -> str:
    """The privacy guarantee after the last round, for its unit and adversary, and epsilon by round."""
    facts = {name: value for name, value in run.rounds[-1].items() if name.startswith("dp_")}
    if not facts:
        return ""
    rows = [[_words_of(name), _fact(name, facts[name])] for name in sorted(facts, key=_place_of)]
    places = [row["round"] + 1 for row in run.rounds]
    spent = {name: (places, [_or_nan(row.get(name)) for row in run.rounds]) for name in facts if "epsilon" in name}
    curves = {_words_of(name): curve for name, curve in spent.items()}
    drawn = plots.curves_figure(curves, "epsilon", height=2.8)
    figure = markup.image(drawn, "spent up to each round", curves, "epsilon")
    return markup.table(["what", "after the last round"], rows) + markup.figures([figure])


def _words_of(name: str) -> str:
    return name.removeprefix("dp_").replace("_", " ")


def _place_of(name: str) -> int:
    """Sorts the unit, the adversary, epsilon and delta, which state the guarantee, before the settings behind it."""
    order = ("epsilon", "delta", "unit", "adversary")
    return next((place for place, word in enumerate(order) if name.endswith(word)), len(order))


def _fact(name: str, value: Any) -> Any:
    if name.endswith("is_private"):
        return "yes" if value else "NO"
    return "infinite" if value is None else value


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _client_evaluations(run: Run) -> str:
    """The performance for each client: by round, from the worst to the best client, and one by one."""
    by_round: dict[str, dict[str, Any]] = {}
    for name in run.metric_names:
        if name.startswith(EVALUATED) and len(run.metric(name)[0]) > 1:
            by_round.setdefault(name.partition("/")[2], {})[name] = run.metric(name)
    return _by_round(by_round) + _after_the_last_round(run)


def _after_the_last_round(run: Run) -> str:
    rows = [row for row in run.client_evaluations if row["metrics"]]
    names = dict.fromkeys(name for row in rows for name in row["metrics"])
    if not names:
        return ""
    name = min(names, key=lambda own: (mode_of(own, [run]) != "max", list(names).index(own)))
    mode = mode_of(name, [run])
    first, last = ("worst", "best") if mode else ("lowest", "highest")
    by_model: dict[str, dict[Any, float]] = {}
    for row in rows:
        if row["metrics"].get(name) is not None:
            by_model.setdefault(row["model"], {})[row["client"]] = row["metrics"][name]
    ordered = {model: sorted(values.values(), reverse=mode == "min") for model, values in by_model.items()}
    curves = {model: (list(range(1, len(values) + 1)), values) for model, values in ordered.items()}
    label = f"{name} of a client"
    figure = markup.image(
        plots.curves_figure(curves, label, xlabel=f"clients, the {first} first"),
        f"{name} on each client's own validation data, the {first} client first",
        curves,
        label,
        f"clients, the {first} first",
    )
    summary = markup.table(
        ["model", f"mean {name} over clients", f"{first} client", "median client", f"{last} client"],
        [[model, sum(own) / len(own), own[0], own[len(own) // 2], own[-1]] for model, own in ordered.items()],
    )
    sizes = {row["client"]: row["num_examples"] for row in rows}
    clients = [[client, size, *(own.get(client) for own in by_model.values())] for client, size in sizes.items()]
    table = markup.table(["client", "examples", *by_model], clients)
    return f"{markup.figures([figure])}{summary}<details><summary>client by client</summary>{table}</details>"


def _curves(run: Run, names: Sequence[str]) -> str:
    """A panel for each kind of metric: val_loss and test_loss share one."""
    kinds: dict[str, dict[str, Any]] = {}
    for name in names:
        kind = name.split("_", 1)[1] if name.startswith(("train_", "val_", "test_")) else name
        kinds.setdefault(kind, {})[name] = run.metric(name)
    return _by_round(kinds)


def _by_round(kinds: Mapping[str, Mapping[str, Any]]) -> str:
    """A panel for each of the first kinds of metrics."""
    shown = list(kinds.items())[:MAX_PANELS]
    figures = [
        markup.image(plots.curves_figure(curves, kind), f"{', '.join(curves)} by round", curves, kind)
        for kind, curves in shown
    ]
    more = len(kinds) - len(shown)
    note = f"<p>{more} more metrics are in rounds.jsonl.</p>" if more else ""
    return markup.figures(figures) + note if figures else ""


def _clock(run: Run) -> str:
    """Metrics over the time of the simulated clock, and the staleness of the updates."""
    rows = [row for row in run.rounds if "clock" in row]
    if not rows:
        return ""
    figures = []
    if run.metric_names:
        name = best_metric([run])
        measured = [row for row in rows if row.get("metrics", {}).get(name) is not None]
        seconds, values = [row["clock"] for row in measured], [row["metrics"][name] for row in measured]
        figures.append(markup.image(plots.clock_figure(seconds, values, name), f"{name} by the simulated time"))
    ages = [row.get("staleness", []) for row in rows]
    counts = [sum(own[age] for own in ages if age < len(own)) for age in range(max(map(len, ages)))]
    if len(counts) > 1:
        caption = "staleness of the updates of all rounds, in server updates"
        figures.append(markup.image(plots.counts_figure(counts, "staleness", "updates"), caption))
    words = f"{len(rows)} rounds in {rows[-1]['clock']:,.1f} simulated seconds."
    return f"<p>{words}</p>{markup.figures(figures)}"


def _clients(run: Run) -> str:
    if not run.clients:
        is_private = any(name.startswith("dp_") for name in run.rounds[-1])
        if "algorithm" not in run.settings or is_private or "Secure" in run.settings.get("aggregator", ""):
            return ""
        return "<p>Add the callback <code>fl.callbacks.ClientMetrics()</code> to see loss and drift of each client.</p>"
    captions = {
        "loss": "training loss: a row that stays bright is a client that the model does not fit well",
        "drift": "how far local training moved the model: clients with much brighter rows pull it towards their data",
    }
    figures = [
        markup.image(plots.heat_map_figure(run.clients, name, name), caption)
        for name, caption in captions.items()
        if any(row.get(name) is not None for row in run.clients)
    ]
    explorer = interactive.clients(run.clients, _worst_clients(run))
    return f"{markup.figures(figures)}<h3>One by one</h3>{explorer}"


def _worst_clients(run: Run) -> str:
    last: dict[Any, dict[str, Any]] = {row["client"]: row for row in run.clients}
    known = [row for row in last.values() if row.get("loss") is not None]
    worst = sorted(known, key=lambda row: row["loss"], reverse=True)[:10]
    if not worst:
        return ""
    hidden = {"refused", "weight", *(["rank"] if len({row.get("rank") for row in known}) == 1 else [])}
    columns = [name for name in worst[0] if name not in hidden]
    rows = [[row["round"] + 1 if name == "round" else row.get(name) for name in columns] for row in worst]
    names = [name.removeprefix("num_") for name in columns]
    return "<p>Highest loss in a client's last round:</p>" + markup.table(names, rows)


def _contributions(run: Run) -> str:
    """The contributions measured by :class:`~lightning_fl.callbacks.Contribution`, summed over the rounds."""
    rows = [row for row in run.rounds if any(name.startswith(CONTRIBUTION) for name in row)]
    if not rows:
        return ""
    clients = dict.fromkeys(name for row in rows for name in row if name.startswith(CONTRIBUTION))
    rounds = [row["round"] + 1 for row in rows]
    shares = {name: [row.get(name) for row in rows] for name in clients}
    totals = {name: sum(value for value in own if value is not None) for name, own in shares.items()}
    order = sorted(totals, key=lambda name: -totals[name])
    curves = {
        name.removeprefix(CONTRIBUTION): (rounds, list(accumulate(value or 0.0 for value in shares[name])))
        for name in order[: plots.MAX_LEGEND]
    }
    more = f", of the {len(curves)} clients with the largest" if len(curves) < len(order) else ""
    image = markup.image(
        plots.curves_figure(curves, "sum of contributions"),
        f"contributions up to each round{more}",
        curves,
        "sum of contributions",
    )
    table = markup.table(
        ["client", "contribution", "rounds measured"],
        [
            [name.removeprefix(CONTRIBUTION), totals[name], sum(value is not None for value in shares[name])]
            for name in order
        ],
    )
    return markup.figures([image]) + table


def _answers(run: Run) -> str:
    path = run.path / ANSWERS_FILE
    return content_of(read_answers(path)) if path.is_file() else ""


def _partition(run: Run) -> str:
    summary = run.partition
    if summary is None or not summary.known_sizes:
        return ""
    sizes = summary.known_sizes
    words = f"{summary.num_clients:,} clients with {min(sizes):,} to {max(sizes):,} examples"
    if len(summary.ids) < summary.num_clients:
        words += f" (of {len(summary.ids):,} that were read)"
    if summary.label_skew is not None and summary.label_skew_if_iid is not None:
        words += (
            f". Label skew {summary.label_skew:.2f}: 0 if all have the same mix of labels, 1 if no two share a label; "
            f"with labels drawn at random it would be {summary.label_skew_if_iid:.2f}"
        )
    columns = ["client", "examples", *summary.labels]
    rows = [
        [client, summary.sizes[row], *(summary.counts[row] if len(summary.counts) else ())]
        for row, client in enumerate(summary.ids)
    ]
    table = f"<details><summary>as a table</summary>{markup.table(columns, rows)}</details>"
    return f"<p>{words}.</p>{markup.image(plots.partition_figure(summary), 'examples by client and label')}{table}"


def _costs(run: Run) -> str:
    rows = [row for row in run.rounds if "seconds" in row]
    if not rows:
        return ""
    rounds = [row["round"] + 1 for row in rows]
    figures = []
    norms = {"norm of the mean update": [row.get("update_norm") for row in rows]}
    spread = {"spread of the updates": [row.get("update_spread") for row in rows]}
    shown = [(norms, "how far the global model moved; it should fall as training converges")]
    if not any(value is not None and value < 0 for value in spread["spread of the updates"]):  # negative under noise
        shown.append((spread, "0: all clients pull in the same direction; near 1: they cancel out"))
    for curves, caption in shown:
        drawn = {name: (rounds, [float("nan") if v is None else v for v in values]) for name, values in curves.items()}
        name = next(iter(drawn))
        figures.append(markup.image(plots.curves_figure(drawn, name, height=2.8), caption, drawn, name))
    phases = {label: [row["seconds"].get(name) or 0.0 for row in rows] for name, label in PHASES.items()}
    phases = {label: values for label, values in phases.items() if sum(values) >= LEAST_SECONDS}
    if phases:
        stacked = plots.phases_figure(rounds, phases)
        figures.append(markup.image(stacked, "time of each round by phase, without validation"))
    totals = {label: sum(values) for label, values in phases.items()}
    everything = run.seconds or sum(totals.values())
    totals["validation, saving, logging"] = max(0.0, everything - sum(totals.values()))
    table = markup.table(
        ["phase", "seconds", "share"],
        [[label, f"{value:.2f}", f"{value / everything:.0%}"] for label, value in totals.items()],
    )
    sent = run.total("num_bytes") or 0
    words = (
        f"This rank sent {_bytes(sent)} to the others, {_bytes(sent / len(rows))} per round."
        if sent
        else "One process simulated all clients, so nothing was sent."
    )
    if rows[-1].get("dp_unit") == "example":
        words += " Per-example gradients, clipping and noise are part of local training."
    return f"{markup.figures(figures)}<p>{words}</p>{table}"


def _left_out(run: Run) -> str:
    reasons = {"refused": "update with NaN or Inf", "failed": "its loader raised an error", "empty": "no data"}
    rows = [
        [row["round"] + 1, reasons[key], ", ".join(map(str, row[key][:20])) + (", ..." if len(row[key]) > 20 else "")]
        for row in run.rounds
        for key in reasons
        if row.get(key)
    ]
    for row in run.rounds:
        by_reason: dict[str, list[str]] = {}
        for client, reason in row.get("left_out", {}).items():
            by_reason.setdefault(reason, []).append(str(client))
        rows += [[row["round"] + 1, reason, ", ".join(clients[:20])] for reason, clients in by_reason.items()]
    rows.sort(key=lambda cells: int(cells[0]))
    more = f"<p>and {len(rows) - 50} more</p>" if len(rows) > 50 else ""
    return markup.table(["round", "why", "clients"], rows[:50]) + more if rows else ""


def _evaluations(run: Run) -> str:
    rows = [
        [row["what"], name, value, Path(row["checkpoint"] or "the last round").name]
        for row in run.evaluations
        for name, value in row["metrics"].items()
    ]
    return markup.table(["command", "metric", "value", "model"], rows) if rows else ""


def _settings(run: Run) -> str:
    rows = [[name.replace("_", " "), value] for name, value in run.settings.items()]
    versions = ", ".join(f"{name} {version}" for name, version in dict(run.facts.get("versions", {})).items())
    if versions:
        rows.append(["versions", versions])
    config = run.path / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    details = f"<details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>" if text else ""
    return markup.table(["setting", "value"], rows) + details


def _again(run: Run) -> str:
    commands = f"cd {run.facts.get('directory', '.')}\n{run.facts.get('command', '?')}"
    words = ""
    if (run.path / "config.yaml").is_file():
        words = "<p>The folder's config.yaml holds every setting, including those that the command line changed.</p>"
    checkpoint = run.facts.get("checkpoint")
    kept = f"<p>Best checkpoint: <code>{escape(str(checkpoint))}</code></p>" if checkpoint else ""
    return f"<pre>{escape(commands)}</pre>{words}{kept}"


def started(run: Run) -> str:
    """When a run started, to the minute, in the time zone of its record."""
    return str(run.facts.get("started", "?"))[:16].replace("T", " ")


def duration(seconds: float) -> str:
    """A human-readable duration."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
