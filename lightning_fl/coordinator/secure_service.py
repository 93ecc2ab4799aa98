"""A coordinator that learns the sum of updates and no single one: silos send keys, sealed shares and masked vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning_fl.aggregation import RoundContext, WeightedMean
from lightning_fl.aggregation.weighted_mean import WeightedSum
from lightning_fl.communication import Message
from lightning_fl.coordinator import wire
from lightning_fl.coordinator.machine import Exchange, RoundMachine
from lightning_fl.coordinator.refused import Refused
from lightning_fl.coordinator.report_check import check_evaluation, read_report
from lightning_fl.coordinator.secure_sum import ROSTER, VECTOR, Advert, SecureSum, check_advert, in_order
from lightning_fl.coordinator.service import MAX_REPORT_BYTES, UPDATE, Coordinator, check_names
from lightning_fl.coordinator.store import OUTCOME, Upload
from lightning_fl.federation import Closing, RankReport, ServerRound, close_server
from lightning_fl.federation.report_masking import unmask
from lightning_fl.privacy.secagg import SecureAggregation, SecureAggregationError
from lightning_fl.privacy.secagg.packing import Packing, split_report
from lightning_fl.privacy.secagg.participant import MIN_CLIENTS, two_thirds
from lightning_fl.tree import Layout


class SecureCoordinator(Coordinator):
    """A coordinator of a federation under :class:`~lightning_fl.privacy.SecureAggregation`.

    A round's ``update`` holds keys instead of tensors. When all of the cohort have sent theirs, or at the deadline, the
    sum begins; if it fails, nothing was revealed, and the round opens again with the silos that ask for it.

    Args:
        settings: The federation's settings.
        expected: The settings by name that every silo must have.
        rules: When rounds open and close; at least three silos.
        store: The federation's folder.
        audit: Where every join, refusal and round is written down.
        now: The time, in seconds of a clock that never goes back.
    """

    def prepare(self) -> None:
        settings = self.settings
        assert isinstance(settings.aggregator, SecureAggregation)
        self.secure = settings.aggregator
        self.ranges = self.secure.ranges_of(lambda: 1.0 if settings.weighting == "uniform" else None)
        if len(self.rules.silos) < MIN_CLIENTS:
            raise ValueError(
                f"federation.yaml names {len(self.rules.silos)} silos; a secure sum needs {MIN_CLIENTS}, or each would "
                "learn the other's update by subtracting its own."
            )

    def load(self, now: float) -> None:
        self.sums: dict[tuple[int, str], SecureSum] = {}
        self.attempt = 0
        super().load(now)
        round = self.machine.round
        self.attempt = self.store.attempt(round)
        if self.machine.phase == "training" and self._resume_sum(round, f"{UPDATE}.{self.attempt}", now):
            self.machine.begin_close()
        for (index, topic), exchange in self.exchanges.items():
            exchange.is_over = self._resume_sum(index, topic, now)

    def make_machine(self, round: int, expected: set[str]) -> RoundMachine:
        # Keys are made for a sum over a cohort that does not change.
        fewest = self.secure.min_clients_of
        return RoundMachine(self.rules, round=round, expected=expected, fewest=fewest, takes_late=False)

    def _context(self) -> RoundContext:
        # What the silos' noise is made for, whatever cohort a sum ends with.
        fewest = self.secure.min_clients_of(0)
        return replace(super()._context(), min_clients=fewest, integer_bits=self.secure.integer_bits)

    # ---- what the calls do besides

    def join(self, silo: str, request: Mapping[str, Any], now: float) -> dict[str, Any]:
        answer = super().join(silo, request, now)
        for own in self.sums.values():  # its process has forgotten its secrets: nobody waits for it
            own.gone.add(silo)
        return answer

    def next_round(self, silo: str, after: int, now: float) -> Message | None:
        message = super().next_round(silo, after, now)
        # A silo that asks again has died and forgotten the keys that it has sent.
        own = {"attempt": self.attempt, "already_sent": None}
        return None if message is None else Message({**message.fields, **own}, message.tensors)

    def step(self, now: float) -> bool:
        machine = self.machine
        if machine.phase == "training" and now >= machine.closes_at and machine.lacks:
            # The silos that are there may do without those that are not.
            self._give_up(f"Round {machine.round} lacks {machine.lacks} silos at its deadline.")
        if super().step(now):
            self._begin_sum_of_round(now)
        return self._advance_sums(now)

    def close(self) -> None:
        try:
            super().close()
        except SecureAggregationError as error:
            self._give_up(str(error))
            return
        self.attempt = 0
        self.sums = {key: value for key, value in self.sums.items() if key[0] >= self.machine.round}

    def progressed(self, silo: str, now: float) -> None:
        super().progressed(silo, now)
        for own in self.sums.values():
            own.progressed(silo, now)

    def target(self, silo: str, round: int | None, topic: str, digest: str, length: int) -> Upload:
        check_names(topic, digest)
        upload = super().target(silo, round, topic, digest, length) if topic.count(".") < 2 else None
        return upload or self._target_of_step(silo, round, topic, digest, length)

    def accept(self, upload: Upload, round: int | None, topic: str, now: float) -> None:
        if topic.count(".") < 2:
            super().accept(upload, round, topic, now)
            return
        exchange = self._sum_of(upload.silo, round, topic).exchange
        self.store.keep(upload)
        exchange.accept(upload.silo, upload.digest, now)

    def _check_content(self, upload: Upload, topic: str, header: wire.Header) -> None:
        if topic.count(".") == 2:
            self._check_step(upload, header)
        else:
            self._check_advert(upload, header, topic)

    def outcome(self, round: int, topic: str, silo: str = "") -> Path | None:
        check_names(topic)
        base = topic.rpartition(".")[0]
        if topic.count(".") < 2 or (self.store.folder(round, topic) / OUTCOME).exists():
            return super().outcome(round, topic, silo)
        if base.startswith(f"{UPDATE}.") and round < self.machine.round:
            raise Refused(410, f"Round {round} is over.", newest=self.machine.round - 1)
        # Of a step that will not come to an end, the outcome is that of the whole sum.
        path = self.store.folder(round, base) / OUTCOME
        return path if path.exists() else super().outcome(round, topic, silo)

    def _close_exchange(self, round: int, topic: str, exchange: Exchange, now: float) -> None:
        exchange.is_over = True
        self._begin_sum_of_messages(round, topic, exchange, now)

    # ---- secure sums

    def _sum_of(self, silo: str, round: int | None, topic: str) -> SecureSum:
        base, _, step = topic.rpartition(".")
        own = self.sums.get((-1 if round is None else round, base))
        if own is None or own.step != step or silo not in own.exchange.expected or silo in own.gone:
            raise Refused(410, f"The secure sum takes no {topic} of {silo!r} any more.", newest=self.machine.round - 1)
        return own

    def _target_of_step(self, silo: str, round: int | None, topic: str, digest: str, length: int) -> Upload:
        upload = Upload(self.store.folder(round or 0, topic), silo, digest)
        if upload.ok.exists():  # the answer to an earlier call was lost
            return upload
        own = self._sum_of(silo, round, topic)
        if own.exchange.done.get(silo, digest) != digest:
            raise Refused(410, f"Silo {silo!r} has sent its {topic} already.", newest=self.machine.round - 1)
        limit = own.size * own.dtype.itemsize + wire.MAX_HEADER_BYTES if own.step == "send" else MAX_REPORT_BYTES
        if not 0 < length <= limit:
            raise Refused(413, f"Silo {silo!r} wants to send {length} bytes; at most {limit} are taken.")
        self.store.disk.make_folder(upload.folder)
        return upload

    def _check_step(self, upload: Upload, header: wire.Header) -> None:
        round, topic = int(upload.folder.parent.name), upload.folder.name
        own = self._sum_of(upload.silo, round, topic)
        if own.step == "send":
            name = "I32" if own.dtype == torch.int32 else "I64"
            wire.check_shapes({VECTOR: (name, (own.size,))}, header.shapes)
            wire.read(upload.part)
        else:
            own.check(upload.silo, _message_of(header))

    def _check_advert(self, upload: Upload, header: wire.Header, topic: str) -> None:
        """Looks at what a silo has sent as an update or an evaluation: its keys, and what of it is no secret."""
        if header.shapes:
            raise wire.BadFile("it holds tensors, but in a secure sum they come with masks")
        machine, is_update = self.machine, topic == UPDATE
        report, found = header.fields.get("report" if is_update else "message"), header.fields.get("advert")
        if not isinstance(report, dict):
            raise wire.BadFile("it holds no report")
        if is_update:
            self._read_report(upload.silo, report)
            cohort, round, attempt, done = sorted(machine.cohort), machine.round, self.attempt, machine.done
            threshold = self.secure.min_clients_of(len(cohort))
        else:
            check_evaluation(report, ())
            cohort, round, attempt = self.progress.members, machine.round - 1, 0
            done, threshold = self._exchange(round, topic).done, two_thirds(len(cohort))
        if found is None and is_update:  # the silo has refused its own
            return
        if found is None:
            raise wire.BadFile("it holds no keys")
        if upload.silo not in cohort:
            raise wire.BadFile("it is not among the silos of the round")
        expected = {
            "number": cohort.index(upload.silo) + 1,
            "round": round,
            "attempt": attempt,
            "num_clients": len(cohort),
            "threshold": threshold,
        }
        others = [advert for advert in self._adverts(upload.folder, done).values() if advert is not None]
        check_advert(Advert.read(found), expected, others)

    def _read_report(self, silo: str, fields: Mapping[str, Any], weight: float = 0.0, count: int = 0) -> RankReport:
        report = read_report(Message({**fields, "num_clients": count, "weight": weight}), silo)
        if report.has_late_values:
            raise wire.BadFile("it logs values after the secure sum")
        return report

    def _adverts(self, folder: Path, digests: Mapping[str, str]) -> dict[str, Advert | None]:
        """By silo its key advertisement; None if it has no update."""
        found: dict[str, Advert | None] = {}
        for silo, digest in dict(digests).items():  # a copy: others may come while this thread reads
            advert = wire.read_header(Upload(folder, silo, digest).ok).fields.get("advert")
            found[silo] = None if advert is None else Advert.read(advert)
        return found

    def _begin_sum_of_round(self, now: float) -> None:
        """Ends the round's training: the silos that have an update add them up."""
        machine, base = self.machine, f"{UPDATE}.{self.attempt}"
        adverts = self._adverts(self.store.folder(machine.round, UPDATE), machine.done)
        own = {silo: advert for silo, advert in adverts.items() if advert is not None}
        needed = self.secure.min_clients_of(len(machine.cohort))
        if len(own) < needed:
            reason = (
                f"Round {machine.round} has {len(own)} update(s), and a secure sum over {len(machine.cohort)} silos is "
                f"not made with fewer than {needed}. No update has left its silo."
            )
            is_final = machine.done.keys() == machine.cohort  # those without an update would have none again
            self._give_up(reason, is_final)
            return
        machine.begin_close()
        self._start_sum(machine.round, base, own, self._template_packing().vector_size, now)

    def _begin_sum_of_messages(self, round: int, topic: str, exchange: Exchange, now: float) -> None:
        adverts = self._adverts(self.store.folder(round, topic), exchange.done)
        own = {silo: advert for silo, advert in adverts.items() if advert is not None}
        if len(own) < two_thirds(len(self.progress.members)):
            self._drop_sum(round, topic, f"Only {len(own)} of {len(self.progress.members)} silos have come.")
            return
        self._start_sum(round, topic, own, 0, now)

    def _start_sum(self, round: int, base: str, adverts: Mapping[str, Advert], size: int, now: float) -> None:
        own = self._make_sum(adverts, size, now)
        folder = self.store.disk.make_folder(self.store.folder(round, f"{base}.{ROSTER}"))
        self.store.write_outcome(folder, {}, own.roster())
        self.sums[round, base] = own
        self.audit.append("sum begun", round=round, topic=base, silos=sorted(adverts))

    def _make_sum(self, adverts: Mapping[str, Advert], size: int, now: float) -> SecureSum:
        rules, dtype = self.rules, self._template_packing().dtype
        return SecureSum(adverts, size, dtype, rules.evaluation_s, rules.max_deadline_s, now)

    def _template_packing(self) -> Packing:
        assert self._template is not None
        return Packing(in_order(self._template), self.ranges)

    def _resume_sum(self, round: int, base: str, now: float) -> bool:
        """Goes on with a sum whose roster was written before the process died; returns whether there is one."""
        path = self.store.folder(round, f"{base}.{ROSTER}") / OUTCOME
        if not path.exists() or (self.store.folder(round, base) / OUTCOME).exists():
            return False
        members = wire.read_header(path).fields["members"]
        is_update = base.startswith(f"{UPDATE}.")
        folder = self.store.folder(round, UPDATE if is_update else base)
        whole = self.store.whole(folder)
        found = self._adverts(folder, {silo: whole[silo] for silo in members})
        size = self._template_packing().vector_size if is_update else 0
        own = self._make_sum({silo: advert for silo, advert in found.items() if advert is not None}, size, now)
        while own.step is not None:
            folder = self.store.folder(round, f"{base}.{own.step}")
            whole = self.store.whole(folder) if folder.exists() else {}
            is_over = (folder / OUTCOME).exists()
            members = wire.read_header(folder / OUTCOME).fields["members"] if is_over else list(whole)
            for silo in members:
                own.exchange.accept(silo, whole[silo], now)
            if not is_over:
                break
            own.finish_step(partial(_read_message, folder), now)
        self.sums[round, base] = own
        return True

    def _advance_sums(self, now: float) -> bool:
        """Ends the steps that are due; returns whether the round's sum can be made."""
        is_whole = False
        for (round, base), own in list(self.sums.items()):
            is_update = base.startswith(f"{UPDATE}.")
            try:
                if own.due(now, self.machine.left):
                    folder = self.store.disk.make_folder(self.store.folder(round, f"{base}.{own.step}"))
                    outcome = own.finish_step(partial(_read_message, folder), now)
                    if own.step is not None:  # nobody asks for that of the last step, but for the sum
                        self.store.write_outcome(folder, {}, outcome)
                if own.step is None and is_update:
                    is_whole = True
                elif own.step is None:
                    self._finish_sum_of_messages(round, base, own)
                    del self.sums[round, base]
            except SecureAggregationError as error:
                if is_update:
                    self._give_up(str(error))
                else:
                    self._drop_sum(round, base, str(error))
        return is_whole

    def _aggregate(self) -> tuple[dict[str, RankReport], dict[str, str], Closing]:
        assert self._model is not None
        assert self._template is not None
        machine, base = self.machine, f"{UPDATE}.{self.attempt}"
        own = self.sums[machine.round, base]
        total, survivors = own.total(partial(self._read_vector, machine.round, base))
        packed, scalars = split_report(total, own.names, len(survivors))
        sums = self._template_packing().unpack(packed, len(machine.cohort))
        folder = self.store.folder(machine.round, UPDATE)
        silos = sorted({*survivors, *(machine.done.keys() - own.adverts.keys())})
        digests = {silo: machine.done[silo] for silo in silos}
        public = {silo: wire.read_header(Upload(folder, silo, digests[silo]).ok).fields["report"] for silo in silos}
        first, *others = survivors
        messages = unmask([Message({**public[first], "sums": scalars}), *(Message(public[silo]) for silo in others)])
        reports = {
            silo: RankReport.from_message(Message({**message.fields, "num_clients": 0, "weight": 0.0}, message.tensors))
            for silo, message in zip(survivors, messages, strict=True)
        }
        reports[first] = replace(reports[first], num_clients=sums.num_clients, weight=sums.weight)
        reports.update({silo: self._read_report(silo, public[silo]) for silo in silos if silo not in reports})
        # What is left to do is what the weighted mean does with its sums.
        acc = WeightedSum(Layout.of({}), {}, sums.trees, sums.weight, sums.num_clients)
        settings = replace(self.settings, aggregator=WeightedMean())
        opened = ServerRound(settings, self._model.state, self._model.buffers, self._template, self._context())
        closing = close_server(opened, acc, RankReport.join(list(reports.values())))
        facts = {**closing.facts, "num_clipped": sums.num_clipped}
        return reports, digests, replace(closing, facts=facts)

    def _read_vector(self, round: int, base: str, silo: str, digest: str) -> torch.Tensor:
        return wire.read(Upload(self.store.folder(round, f"{base}.send"), silo, digest).ok)[VECTOR]

    def _finish_sum_of_messages(self, round: int, base: str, own: SecureSum) -> None:
        total, survivors = own.total(partial(self._read_vector, round, base))
        _, scalars = split_report(total, own.names, len(survivors))
        folder, whole = self.store.folder(round, base), self._exchange(round, base).done
        messages = [wire.read_header(Upload(folder, silo, whole[silo]).ok).fields["message"] for silo in survivors]
        messages[0] = {**messages[0], "sums": scalars}
        self.store.write_outcome(folder, {}, {"members": survivors, "messages": messages})

    def _give_up(self, reason: str, is_final: bool = False) -> None:
        """Drops the sum of the open round, which opens again with the silos that ask for it; nothing was revealed."""
        machine, base = self.machine, f"{UPDATE}.{self.attempt}"
        self._drop_sum(machine.round, base, reason)
        if is_final:
            self._end(reason)
            return
        self.store.give_up(machine.round)
        self.attempt += 1
        machine.reopen()

    def _drop_sum(self, round: int, base: str, reason: str) -> None:
        self.sums.pop((round, base), None)
        folder = self.store.disk.make_folder(self.store.folder(round, base))
        self.store.write_outcome(folder, {}, {"dropped": reason, "members": [], "messages": []})
        self.audit.append("sum dropped", round=round, topic=base, reason=reason)


def _message_of(header: wire.Header) -> bytes:
    try:
        return bytes.fromhex(header.fields["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise wire.BadFile("it holds no message of a secure sum") from error


def _read_message(folder: Path, silo: str, digest: str) -> bytes:
    return _message_of(wire.read_header(Upload(folder, silo, digest).ok))
