"""What secure aggregation costs a client: ``python benchmarks/secagg.py``.

Prints, a line of JSON each: the rate of masking against that of AES-256-CTR on the same core, measured alternately; the
bytes that a silo sends in a round, against float32; the seconds of a client's share of a round (keys, rounding, masks)
by number of clients and of parameters; and those of a whole simulated round with double masking and dropouts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch

from lightning_fl.privacy.secagg.journal import Journal
from lightning_fl.privacy.secagg.masks import BLOCK_BYTES, apply_masks
from lightning_fl.privacy.secagg.messages import ADVERTISEMENT_BYTES, SessionParams
from lightning_fl.privacy.secagg.packing import NUM_CHECKS, Packing, Ranges
from lightning_fl.privacy.secagg.pairwise import PairwiseClient
from lightning_fl.privacy.secagg.participant import two_thirds
from lightning_fl.privacy.secagg.primitives import SigningKey, keystream
from lightning_fl.privacy.secagg.simulate import Simulation
from lightning_fl.types import Update

RANGES = Ranges(clip=16.0, aux_clip=1024.0, max_weight=65536.0, modulus_bits=32)


def seconds(function: Callable[[], object]) -> float:
    """Seconds of the processor, so that what else runs on the machine counts little."""
    start = time.process_time()
    function()
    return time.process_time() - start


def session_params(num_clients: int, threshold: int) -> SessionParams:
    return SessionParams(os.urandom(32), bytes(32), bytes(32), 0, 0, num_clients, threshold)


def masking_seconds(words: torch.Tensor, masks: list[tuple[bytes, int]]) -> float:
    return seconds(lambda: apply_masks(words, masks))


def masking_rate(vector_size: int, repeats: int) -> None:
    """AES-256-CTR in blocks that stay in the cache, against making masks and adding them to a vector."""
    zeros, block, num_bytes = bytes(BLOCK_BYTES), bytearray(BLOCK_BYTES + 15), 4 * vector_size
    words = torch.zeros(vector_size, dtype=torch.int32)

    def aes() -> None:
        encryptor = keystream(os.urandom(32))
        for _ in range(num_bytes // BLOCK_BYTES):
            encryptor.update_into(zeros, block)

    for num_masks in (2, 9):
        masks = [(os.urandom(32), 1) for _ in range(num_masks)]
        apply_masks(words, masks)
        pairs = [(num_masks * seconds(aes), masking_seconds(words, masks)) for _ in range(repeats)]
        ratio = statistics.median(plain / masked for plain, masked in pairs)
        rate = statistics.median(num_masks * num_bytes / plain for plain, _ in pairs) / 1e9
        print(json.dumps({"masks": num_masks, "aes_gigabytes_per_second": rate, "masking_over_aes": ratio}), flush=True)


def bytes_of_a_round(num_params: int) -> None:
    packing = Packing(Update({"w": torch.empty(num_params, device="meta")}), RANGES)
    sent = 4 * (packing.vector_size + NUM_CHECKS)
    print(
        json.dumps(
            {
                "parameters": num_params,
                "bytes_plain": 4 * num_params,
                "bytes_secure": sent,
                "bytes_of_keys": ADVERTISEMENT_BYTES,
                "ratio": (sent + ADVERTISEMENT_BYTES) / (4 * num_params),
            }
        ),
        flush=True,
    )


def client_seconds(num_clients: int, num_params: int) -> None:
    """One client's work in a pairwise round; the others only make their keys."""
    update = Update({"w": torch.randn(num_params).mul_(0.01)}, weight=100.0)
    agreed, identities = session_params(num_clients, 3), [SigningKey() for _ in range(num_clients)]
    clients = [PairwiseClient(n, key, agreed, None, Journal()) for n, key in enumerate(identities, start=1)]
    advertisements = [client.advertise() for client in clients]
    packing = Packing(update, RANGES)
    words = packing.zeros(torch.device("cpu"))
    rounding = seconds(lambda: packing.add(words, update, num_clients))
    masks: list[tuple[bytes, int]] = []
    keys = seconds(lambda: masks.extend(clients[0].masks(advertisements, b"vector")))
    masking = seconds(lambda: apply_masks(words, masks))
    result = {"clients": num_clients, "parameters": num_params, "keys": keys, "rounding": rounding, "masking": masking}
    print(json.dumps({**result, "seconds": keys + rounding + masking}), flush=True)


def simulated_seconds(num_clients: int, vector_size: int) -> None:
    """A whole round of double masking in one process: all clients and the coordinator, a fifth of the clients gone."""
    agreed = session_params(num_clients, two_thirds(num_clients))
    identities = {number: SigningKey() for number in range(1, num_clients + 1)}
    gone = dict.fromkeys(range(1, num_clients // 5 + 1), "send")
    start = time.perf_counter()
    simulation = Simulation(agreed, identities, vector_size, torch.int32, gone)
    keys = time.perf_counter() - start
    for number in identities:
        if simulation.is_waiting_for(number):
            simulation.send(number, torch.zeros(vector_size, dtype=torch.int32), b"vector")
    simulation.finish()
    whole = time.perf_counter() - start
    print(
        json.dumps(
            {
                "protocol": "bonawitz",
                "clients": num_clients,
                "gone": len(gone),
                "words": vector_size,
                "seconds_all_clients": whole,
                "seconds_keys_and_shares": keys,
                "bytes_besides_vectors_per_client": (simulation.num_bytes - 4 * vector_size * (num_clients - len(gone)))
                // num_clients,
            }
        ),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[3, 10, 30, 100])
    parser.add_argument("--params", type=int, nargs="+", default=[1_000_000, 10_000_000, 100_000_000])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    masking_rate(1 << 23, arguments.repeats)
    for num_params in arguments.params:
        bytes_of_a_round(num_params)
    for num_params in arguments.params:
        for num_clients in arguments.clients:
            client_seconds(num_clients, num_params)
    for num_clients in arguments.clients:
        if num_clients >= 5:
            simulated_seconds(num_clients, 100_000)


if __name__ == "__main__":
    main()
