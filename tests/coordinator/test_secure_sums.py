"""Secure sums over the coordinator: it learns the sum of the updates, whoever drops out, and no single one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_fl.aggregation import RoundContext
from lightning_fl.coordinator.audit import AuditLog
from lightning_fl.coordinator.client import CallRefused
from lightning_fl.coordinator.policy import PolicyBroken
from lightning_fl.coordinator.refused import Refused
from lightning_fl.coordinator.secure_service import SecureCoordinator
from lightning_fl.coordinator.secure_sum import SecureSum
from lightning_fl.coordinator.store import OUTCOME, Store
from lightning_fl.coordinator.wire import BadFile
from lightning_fl.federation.server import update_template
from lightning_fl.privacy.secagg import ProtocolError, RetryRefused, SecureAggregation, SecureAggregationError
from lightning_fl.privacy.secagg.keys import KeyFolder
from lightning_fl.privacy.secagg.messages import Signatures, Unmasking
from lightning_fl.privacy.secagg.packing import with_report
from lightning_fl.types import Update
from tests.helpers.distributed import PATIENCE
from tests.helpers.network import (
    Died,
    LiveCoordinator,
    TinySilo,
    in_threads,
    live_coordinator,
    make_keys,
    make_kits,
    rules,
    settings,
    wait_until,
)

NAMES = ("east", "north", "south", "west")
STEPS = dict(zip(NAMES, (1.0, 2.0, 6.0, -3.0), strict=True))
SECURE = SecureAggregation("bonawitz", max_weight=1.0)
BOUND = SECURE.ranges_of(lambda: 1.0).quantizer("delta", 4).step + 2e-7
"""By how much the mean of four updates may differ from the exact one, and float32 near 1."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_kits(tmp_path, NAMES)
    make_keys(tmp_path, NAMES)
    return tmp_path


@contextlib.contextmanager
def coordinator(folder: Path, **options: Any) -> Iterator[LiveCoordinator]:
    with live_coordinator(folder, rules(**{"silos": NAMES, **options}), settings(aggregator=SECURE)) as live:
        yield live


@pytest.fixture
def live(folder: Path) -> Iterator[LiveCoordinator]:
    with coordinator(folder) as own:
        yield own


def silo(live: LiveCoordinator, name: str, **options: Any) -> TinySilo:
    return TinySilo(live.folder, live.address, name, STEPS[name], aggregator=SECURE, **options).join()


def dying(action: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with contextlib.suppress(Died):
            return action()

    return run


def silos_of(live: LiveCoordinator, names: tuple[str, ...] = NAMES) -> list[TinySilo]:
    return [silo(live, name) for name in names]


def test_the_model_moves_by_the_mean_update(live: LiveCoordinator) -> None:
    silos = silos_of(live)
    for models in in_threads(*(silo.run for silo in silos)):
        assert models == pytest.approx([1.5, 3.0, 4.5], abs=3 * BOUND)
    assert [silo.counted for silo in silos] == [3] * 4
    closed = live.events("round closed")
    assert [sorted(event["members"]) for event in closed] == [list(NAMES)] * 3


DROPOUTS = {"share": False, "send": False, "agree": True, "unmask": True}
"""For each message that a silo does not send any more, whether its update counts."""


@pytest.mark.parametrize("message", DROPOUTS)
@pytest.mark.spread(2)
def test_a_silo_that_dies_between_two_messages_is_left_out_unless_its_vector_has_come(
    live: LiveCoordinator, message: str
) -> None:
    silos = silos_of(live)
    openings = in_threads(*(silo.open for silo in silos))
    silos[0].die_before(message)
    again: list[TinySilo] = []

    def die_and_come_back() -> float:
        with pytest.raises(Died):
            silos[0].send(openings[0])
        again.append(silo(live, NAMES[0]))
        return again[0].round()

    others = [
        lambda own=own, opening=opening: [own.send(opening), own.round()]
        for own, opening in zip(silos[1:], openings[1:], strict=True)
    ]
    last, *models = in_threads(die_and_come_back, *others)
    counts = DROPOUTS[message]
    mean = 1.5 if counts else 5 / 3
    assert models == [pytest.approx([mean, mean + 1.5], abs=2 * BOUND)] * 3
    assert last == models[0][1]
    assert again[0].counted == 1 + counts
    closed = live.events("round closed")[0]
    assert (list(closed["members"]), closed["lost"]) == ((list(NAMES), []) if counts else (list(NAMES[1:]), ["east"]))


@pytest.mark.slow
@pytest.mark.parametrize("message", ["keys", "send"])
def test_a_silo_that_stays_away_is_waited_for_until_the_deadline(folder: Path, message: str) -> None:
    with coordinator(folder, deadline_s=4.0, evaluation_s=4.0) as live:
        silos = silos_of(live)
        openings = in_threads(*(silo.open for silo in silos))
        silos[0].die_before(message)

        def send(own: TinySilo, opening: Any) -> float:
            if own is silos[0]:
                if message == "send":
                    with pytest.raises(Died):
                        own.send(opening)
                return 0.0
            return own.send(opening)

        sends = [partial(send, own, opening) for own, opening in zip(silos, openings, strict=True)]
        assert in_threads(*sends)[1:] == [pytest.approx(5 / 3, abs=BOUND)] * 3


@pytest.mark.parametrize("message", [pytest.param("keys", marks=pytest.mark.slow), "share"])
def test_with_too_few_silos_the_round_opens_again_and_no_vector_is_sent(folder: Path, message: str) -> None:
    with coordinator(folder, deadline_s=4.0 if message == "keys" else PATIENCE, gather_s=1.0) as live:
        silos = silos_of(live)
        openings = in_threads(*(silo.open for silo in silos))
        # Two of four are lost, and three are needed.
        for own in silos[:2]:
            own.die_before(message)
        if message == "keys":
            threads = [partial(own.send, opening) for own, opening in zip(silos[2:], openings[2:], strict=True)]
        else:
            threads = [partial(own.send, opening) for own, opening in zip(silos, openings, strict=True)]

        def come_back(name: str) -> float:
            live.wait_for("sum dropped" if message == "keys" else "sum begun")
            return silo(live, name).round()

        with_dead = [dying(thread) for thread in threads]
        *models, east, north = in_threads(*with_dead, partial(come_back, "east"), partial(come_back, "north"))
        assert models[-2:] == [pytest.approx(1.5, abs=BOUND)] * 2
        assert (east, north) == (models[-1], models[-1])
        (dropped,) = live.events("sum dropped")
        assert dropped["topic"] == "update.0"
        # Of the sum that was dropped there is no masked vector anywhere.
        assert not list(live.folder.glob("federation/rounds/*/update.0.send/*"))
        assert list(live.folder.glob("federation/rounds/*/update.1.send/*.ok"))


@pytest.mark.slow
def test_a_silo_that_is_late_for_a_step_takes_part_when_the_round_opens_again(folder: Path) -> None:
    with coordinator(folder, silos=NAMES[:3], evaluation_s=2.0) as live:
        silos = silos_of(live, NAMES[:3])
        post = silos[0].federation._post

        def late(round: int, topic: str, *content: Any) -> bool:
            if topic == "update.0.share":
                live.wait_for("sum dropped")
            return post(round, topic, *content)

        silos[0].federation._post = late  # type: ignore[method-assign]
        # All three are needed.
        assert in_threads(*(own.round for own in silos)) == [pytest.approx(3.0, abs=2 * BOUND)] * 3
        assert not list(live.folder.glob("federation/rounds/*/update.0.send/*"))


@pytest.mark.parametrize("message", ["agree", "unmask"])
def test_what_was_sent_for_a_sum_that_was_dropped_is_not_sent_again(live: LiveCoordinator, message: str) -> None:
    silos = silos_of(live)
    openings = in_threads(*(silo.open for silo in silos))
    for own in silos[:2]:
        own.die_before(message)

    def send(own: TinySilo, opening: Any) -> str:
        with pytest.raises((Died, RetryRefused)) as caught:
            own.send(opening)
        if own.name in NAMES[:2]:  # so that nobody waits for it
            silo(live, own.name)
        return str(caught.value)

    sends = [partial(send, own, opening) for own, opening in zip(silos, openings, strict=True)]

    told = in_threads(*sends)
    assert "difference of the two sums" in told[2]
    assert "difference of the two sums" in told[3]
    assert "Only 2 of 4 silos have answered" in live.events("sum dropped")[0]["reason"]
    assert not live.events("round closed")
    # Those that have died know it too, before they train again.
    again = TinySilo(live.folder, live.address, NAMES[0], aggregator=SECURE).join()
    state = openings[0].state
    template = update_template(again.settings, state.server["params"], {})
    ctx = RoundContext(0, list(NAMES), 4, templates=[template])
    with pytest.raises(RetryRefused):
        again.federation.start(again.settings, state, state.server["params"], ctx)


@pytest.mark.parametrize("message", ["send", pytest.param("agree", marks=pytest.mark.slow)])
def test_of_three_silos_one_may_die_after_vectors_were_sent_and_come_back(folder: Path, message: str) -> None:
    """All three are needed, so a vector whose sender has not helped to open the sum is as good as never sent."""
    with coordinator(folder, silos=NAMES[:3]) as live:
        silos = silos_of(live, NAMES[:3])
        openings = in_threads(*(own.open for own in silos))
        silos[0].die_before(message)

        def die_and_come_back() -> float:
            with pytest.raises(Died):
                silos[0].send(openings[0])
            if message == "send":  # the others have sent theirs
                done = partial(live.folder.glob, "federation/rounds/*/update.0.send/*.ok")
                wait_until(lambda: len(list(done())) == 2, "two vectors")
            return silo(live, NAMES[0]).round()

        sends = [partial(own.send, opening) for own, opening in zip(silos[1:], openings[1:], strict=True)]
        assert in_threads(die_and_come_back, *sends) == [pytest.approx(3.0, abs=2 * BOUND)] * 3
        (dropped,) = live.events("sum dropped")
        assert dropped["topic"] == "update.0"
        assert [event["round"] for event in live.events("round closed")] == [0]


def test_of_three_silos_those_that_have_helped_to_open_a_sum_do_not_send_again(folder: Path) -> None:
    with coordinator(folder, silos=NAMES[:3]) as live:
        silos = silos_of(live, NAMES[:3])
        openings = in_threads(*(own.open for own in silos))
        silos[0].die_before("unmask")

        def send(own: TinySilo, opening: Any) -> None:
            with pytest.raises((Died, RetryRefused)):
                own.send(opening)
            if own is silos[0]:
                answers = partial(live.folder.glob, "federation/rounds/*/update.0.unmask/*.ok")
                wait_until(lambda: len(list(answers())) == 2, "two answers")
                silo(live, own.name)

        in_threads(*(partial(send, own, opening) for own, opening in zip(silos, openings, strict=True)))
        assert not live.events("round closed")


@pytest.mark.parametrize("step", ["roster", "share", "send", "agree"])
@pytest.mark.spread(1)
def test_the_coordinator_that_is_started_again_goes_on_with_the_sum(folder: Path, step: str) -> None:
    died = threading.Event()
    topics: list[str] = []

    def before(operation: str) -> None:
        if operation == "rename outcome.safetensors":
            topics.append(operation)
            if len(topics) == 1 + ["roster", "share", "send", "agree"].index(step):
                died.set()
                raise Died

    with coordinator(folder) as live:
        silos = silos_of(live)
        live.store.disk.before = before
        sends = [partial(own.round) for own in silos]

        def start_again() -> None:
            assert died.wait(PATIENCE)
            live.error = None
            live._thread.join(PATIENCE)
            live.error = None
            live.start()

        *models, _ = in_threads(*sends, start_again)
        assert models == [pytest.approx(1.5, abs=BOUND)] * 4


class Spy:
    """Everything that the coordinator is given, and what it writes."""

    def __init__(self, live: LiveCoordinator) -> None:
        self.files: list[bytes] = []
        check = live.coordinator.check

        def look(upload: Any, topic: str) -> None:
            self.files.append(upload.part.read_bytes())
            check(upload, topic)

        live.coordinator.check = look  # type: ignore[method-assign]

    def sees(self, own: TinySilo, update: Update, weight: str) -> bool:
        """Whether it has seen a silo's update: its bytes, its integers or what goes with it."""
        quantizer = SECURE.ranges_of(lambda: 1.0).quantizer("delta", 4)
        levels = update.delta["x"].double() / quantizer.step
        for content in self.files:
            if update.delta["x"].numpy().tobytes() in content or weight.encode() in content:
                return True
            start = content.find(b'"vector"')
            if start >= 0:
                size = 8 + int.from_bytes(content[:8], "little")
                vector = torch.frombuffer(bytearray(content[size:]), dtype=torch.int32)[: len(levels)]
                if bool(((vector.double() - levels).abs() < 2).any()):
                    return True
        return False


@pytest.mark.parametrize("is_secure", [True, False])
def test_the_coordinator_sees_sealed_shares_and_masked_vectors_only(folder: Path, is_secure: bool) -> None:
    """The negative control: without secure aggregation the same spy sees every update."""
    own = SECURE if is_secure else None
    with live_coordinator(folder, rules(silos=NAMES), settings(aggregator=own)) as live:
        silos = [TinySilo(folder, live.address, name, size=200, aggregator=own).join() for name in NAMES]
        generator = torch.Generator().manual_seed(0)
        updates = [Update({"x": torch.randn(200, generator=generator)}, weight=1.0) for _ in NAMES]
        spy = Spy(live)
        openings = in_threads(*(silo.open for silo in silos))
        numbers = [812_345_671 + index for index in range(4)]  # examples, which a report tells the coordinator
        for silo_, number in zip(silos, numbers, strict=True):
            silo_.num_examples = number
        in_threads(*(partial(s.send, o, u) for s, o, u in zip(silos, openings, updates, strict=True)))
        seen = [spy.sees(s, u, str(n)) for s, u, n in zip(silos, updates, numbers, strict=True)]
        assert seen == [not is_secure] * 4
        assert live.coordinator.progress.history[0]["num_examples"] == sum(numbers)
        mean = torch.stack([update.delta["x"] for update in updates]).mean(0)
        model = live.coordinator.store.read_state(live.coordinator.progress and live.coordinator._model.shared)
        torch.testing.assert_close(next(iter(model.values())), mean, atol=2 * BOUND if is_secure else 1e-6, rtol=0)


def test_a_silo_whose_identity_the_others_do_not_trust_stops_them_before_they_send(folder: Path) -> None:
    (folder / "west" / "keys" / "identity.key").unlink()
    (folder / "west" / "keys" / "identity.pub").unlink()
    KeyFolder(folder / "west" / "keys").create("an impostor")
    with coordinator(folder) as live:
        silos = silos_of(live)

        def left_alone(round: int, dropped: Exception) -> bool:
            raise SecureAggregationError(f"It would wait for others. {dropped}")

        silos[3].federation._asks_again = left_alone  # type: ignore[method-assign]
        told = in_threads(*(partial(refusal, own) for own in silos))
        assert "Only 1 of 4 silos" in told[3]
        assert all("is not among the trusted identities" in reason for reason in told[:3])
        assert not list(folder.glob("federation/rounds/*/*.send"))


def refusal(own: TinySilo) -> str:
    with pytest.raises((ProtocolError, SecureAggregationError)) as caught:
        own.round()
    own.federation.leave(str(caught.value))
    return str(caught.value)


def test_a_silo_without_keys_is_told_how_to_make_them(folder: Path) -> None:
    with coordinator(folder) as live:
        (folder / "west" / "keys" / "trusted").unlink()
        with pytest.raises(ValueError, match=r"lightning-fl keys trust .*west"):
            silo(live, "west")
        (folder / "west" / "keys" / "identity.key").unlink()
        with pytest.raises(ValueError, match=r"lightning-fl keys create .*west"):
            silo(live, "west")
        assert not live.events("join")


def test_the_policy_may_require_it(folder: Path) -> None:
    (folder / "east" / "policy.yaml").write_text("require: [secure aggregation]")
    with coordinator(folder) as live:
        silo(live, "east")
        with pytest.raises(PolicyBroken, match="requires secure aggregation"):
            TinySilo(folder, live.address, "east").join()


def test_too_few_silos_for_a_sum_are_refused_when_the_coordinator_starts(tmp_path: Path) -> None:
    store = Store(tmp_path / "federation")
    with pytest.raises(ValueError, match="a secure sum needs 3"):
        SecureCoordinator(settings(aggregator=SECURE), {}, rules(silos=NAMES[:2]), store, AuditLog(tmp_path / "log"))
    store.close()


def test_names_that_are_none_reach_no_file(tmp_path: Path) -> None:
    """A topic and a digest become parts of a path: no silo may read other files with them, or stop the coordinator."""
    store = Store(tmp_path / "federation")
    own = SecureCoordinator(settings(aggregator=SECURE), {}, rules(silos=NAMES), store, AuditLog(tmp_path / "log"))
    store.disk.make_folder(store.folder(0, "update"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / OUTCOME).write_bytes(b"of another federation")
    (tmp_path / "elsewhere" / "east.x.ok").write_bytes(b"")
    for topic in ("../../../elsewhere.x", "../../../elsewhere/x.y.z", f"update.0.{'x' * 300}"):
        with pytest.raises(Refused, match="no such place"):
            own.outcome(0, topic, "east")
        with pytest.raises(Refused, match="no such place"):
            own.target("east", 0, topic, "0" * 64, 1)
    for digest in ("x", "../../../elsewhere/east.x", "0" * 300):
        with pytest.raises(Refused, match="no such place"):
            own.target("east", 0, "update.0.share", digest, 1)
    store.close()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda file: file.update(keys="00"), "in the middle of a field"),
        (lambda file: file.update(names=3), "key advertisement can't be read"),
        (lambda file: file.update(number=2), "its keys are for number"),
    ],
)
def test_a_bad_advertisement_is_refused(live: LiveCoordinator, change: Any, reason: str) -> None:
    east = silos_of(live)[0]
    secure = east.federation.secure
    assert secure is not None
    advertise = secure.advertise

    def badly(params: Any, number: int, names: Any) -> Any:
        content: dict[str, Any] = {"number": number}
        change(content)
        client, advert = advertise(params, content["number"], names)
        fields = {**advert.fields(), **{key: value for key, value in content.items() if key != "number"}}
        return client, SimpleNamespace(fields=lambda: fields)

    secure.advertise = badly  # type: ignore[method-assign]

    def tell() -> str:
        with pytest.raises(CallRefused, match=reason):
            east.round()
        return "told"

    others = [silo(live, name) for name in NAMES[1:]]
    openings: list[Any] = []
    in_threads(tell, *(lambda own=own: openings.append(own.open()) for own in others))
    assert "east" in live.coordinator.machine.refused


def adverts_of(live: LiveCoordinator, names: tuple[str, ...]) -> tuple[Any, list[Any], dict[str, Any], dict[str, Any]]:
    """The parameters of a sum of a scalar, the silos' secure sums, their clients and their key advertisements."""
    secures = [silo(live, name).federation.secure for name in names]
    assert secures[0] is not None
    params = secures[0].params_of_messages(0, "evaluation.0", names)
    made = [secure.advertise(params, number, ["loss"]) for number, secure in enumerate(secures, 1) if secure]
    clients, adverts = ([pair[index] for pair in made] for index in (0, 1))
    return params, secures, dict(zip(names, clients, strict=True)), dict(zip(names, adverts, strict=True))


def test_names_of_an_earlier_sum_of_the_same_round_are_refused(live: LiveCoordinator) -> None:
    names = NAMES[:3]
    params, secures, clients, adverts = adverts_of(live, names)
    own = SecureSum(adverts, 0, torch.int64, 60.0, 60.0, 0.0)
    honest = own.roster()
    _, old = secures[1].advertise(params, 2, ["loss", "one silo's own"])
    forged = {**adverts["north"].fields(), "names": old.names, "signature": old.signature.hex()}
    replayed = {**honest, "names": {**honest["names"], "2": forged}}  # type: ignore[dict-item]

    def take_part(name: str, roster: Any) -> list[str]:
        sent: list[str] = []

        def post(topic: str, tensors: Any, fields: Any) -> bool:
            sent.append(topic)
            return False

        secure, client = secures[names.index(name)], clients[name]
        own = secure.empty_vector(), {"loss": 1.0}, b"", post, lambda topic: roster
        secure.take_part(name, "evaluation.0", params, client, *own)
        return sent

    with pytest.raises(ProtocolError, match="over the names"):
        take_part("east", replayed)
    assert take_part("south", honest) == ["evaluation.0.share"]


def test_a_silo_that_signs_for_others_or_holds_back_shares_is_refused(live: LiveCoordinator) -> None:
    names = NAMES[:3]
    _, secures, clients, adverts = adverts_of(live, names)
    own = SecureSum(adverts, 0, torch.int64, 60.0, 60.0, 0.0)
    roster = bytes.fromhex(str(own.roster()["roster"]))

    def step(messages: dict[str, bytes]) -> Any:
        for name, message in messages.items():
            if own.step != "send":
                own.check(name, message)
            own.exchange.accept(name, name, 0.0)
        return own.finish_step(lambda name, digest: messages[name], 0.0)

    bundles = step({name: client.share(roster) for name, client in clients.items()})["bundles"]
    for number, (name, client) in enumerate(clients.items()):
        vector = with_report(secures[0].empty_vector(), ["loss"], {"loss": 1.0}, 1)
        client.send(bytes.fromhex(bundles[name]), vector, b"vector %d" % number)
    survivors = bytes.fromhex(step(dict.fromkeys(names, b""))["survivors"])
    agreed = {name: client.agree(survivors) for name, client in clients.items()}
    by_number = {n: sign for message in agreed.values() for n, sign in Signatures.decode(message).by_number.items()}
    with pytest.raises(BadFile, match="signed for others"):
        own.check("east", Signatures({1: by_number[1], 3: bytes(64)}).encode())
    with pytest.raises(BadFile, match="speaks for participant 0"):
        own.check("east", Signatures({}).encode())
    signatures = bytes.fromhex(step(agreed)["signatures"])
    answers = {name: client.unmask(signatures) for name, client in clients.items()}
    whole = Unmasking.decode(answers["east"])
    with pytest.raises(BadFile, match="lacks shares"):
        own.check("east", Unmasking(1, {1: whole.self_masks[1]}, {}).encode())
    own.check("east", answers["east"])
