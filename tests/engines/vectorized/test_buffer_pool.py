"""Memory that is handed out again only once nothing refers to it."""

from __future__ import annotations

import torch

from lightning_fl.engines.vectorized.buffer_pool import MIN_BYTES, BufferPool

LIKE = torch.empty(0)
SHAPE = (MIN_BYTES, 2)


def test_memory_that_nothing_refers_to_is_handed_out_again() -> None:
    pool = BufferPool()
    first = pool.empty(SHAPE, LIKE)
    address = first.data_ptr()
    assert (first.shape, first.dtype) == (SHAPE, torch.float32)
    del first
    smaller = pool.empty((MIN_BYTES,), torch.empty(0, dtype=torch.float64))
    assert smaller.data_ptr() == address


def test_memory_in_use_is_left_alone_also_where_only_autograd_holds_it() -> None:
    pool = BufferPool()
    held = pool.empty(SHAPE, LIKE)
    view = held[1:]
    weight = torch.ones(SHAPE, requires_grad=True)
    loss = (pool.empty(SHAPE, LIKE).fill_(3.0) * weight).sum()
    addresses = {held.data_ptr()}
    del held
    addresses.add(pool.empty(SHAPE, LIKE).fill_(7.0).data_ptr())
    assert len(addresses) == 2
    assert view.data_ptr() - view.element_size() * SHAPE[1] in addresses
    loss.backward()
    assert weight.grad is not None
    assert (weight.grad == 3.0).all()


def test_a_free_buffer_that_is_too_small_gives_way() -> None:
    pool = BufferPool()
    for factor in range(1, 5):
        pool.empty((MIN_BYTES * factor,), LIKE)
    assert len(pool._buffers) == 1
