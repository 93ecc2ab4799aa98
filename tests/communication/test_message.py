from __future__ import annotations

import json
import pickle
import struct
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lightning_fl.communication import Message

FIELDS = {"metrics": {"loss": 0.25, "nested": [1, None, True, "ä\n\x00"]}, "refused": ["client", 3], "empty": {}}
TENSORS = {"weights": torch.arange(6.0).reshape(2, 3), "counts": torch.tensor([1, 2]), "none": torch.zeros(0, 2)}
DATA = Message(FIELDS, TENSORS).encode()

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def assemble(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def with_tensor(entry: Any, fields: Any = "{}", body: bytes = bytes(8)) -> bytes:
    return assemble({"__metadata__": {"__fields__": fields}, "a": entry}, body)


def is_message_or_refused(data: bytes) -> bool:
    """Whether the bytes are a message; fails if they are neither taken nor refused in the promised way."""
    try:
        message = Message.decode(data)
    except ValueError as error:
        refusal = str(error)
    else:
        assert isinstance(message.fields, dict)
        assert all(isinstance(tensor, Tensor) for tensor in message.tensors.values())
        return True
    assert "not a valid message" in refusal
    return False


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_fields_arrive_as_they_were(fields: dict[str, Any]) -> None:
    assert Message.decode(Message(fields).encode()).fields == fields


@pytest.mark.parametrize(
    "tensor",
    [
        *(torch.tensor([0, 1, 2]).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int8)),
        torch.tensor([True, False]),
        torch.tensor(3.5),
        torch.zeros(0, 3),
        torch.arange(6.0).reshape(2, 3).t(),
        torch.arange(6.0)[::2],
        torch.ones(2, requires_grad=True),
        torch.tensor([float("nan"), float("inf")]),
    ],
    ids=lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)}",
)
def test_tensors_arrive_bit_for_bit(tensor: Tensor) -> None:
    received = Message.decode(Message({}, {"value": tensor}).encode()).tensors["value"]
    assert received.dtype == tensor.dtype
    assert torch.equal(received.nan_to_num(7), tensor.detach().nan_to_num(7))


def test_one_tensor_may_stand_under_two_names() -> None:
    shared = torch.ones(3)
    received = Message({}, {"a": shared, "b": shared[1:]}).encode()
    assert {name: tensor.tolist() for name, tensor in Message.decode(received).tensors.items()} == {
        "a": [1.0, 1.0, 1.0],
        "b": [1.0, 1.0],
    }


def test_what_json_cannot_hold_is_refused_by_the_sender() -> None:
    with pytest.raises(TypeError):
        Message({"value": object()}).encode()


def test_every_truncation_is_refused() -> None:
    assert is_message_or_refused(DATA)
    assert not any(is_message_or_refused(DATA[:length]) for length in range(len(DATA)))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_are_refused_and_not_run(protocol: int) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return exec, ("raise SystemExit",)

    trap = pickle.dumps(Trap(), protocol)
    assert not is_message_or_refused(trap)
    assert not is_message_or_refused(assemble(trap))


@pytest.mark.parametrize("fields", ["[1]", "1", "null", '"text"', "{", 5, None, {}], ids=repr)
def test_fields_that_are_no_json_object_are_refused(fields: Any) -> None:
    assert not is_message_or_refused(assemble({"__metadata__": {"__fields__": fields}}))


@pytest.mark.parametrize("header", [[], {}, "text", 1, {"__metadata__": {}}, {"__metadata__": []}, None], ids=repr)
def test_headers_without_fields_are_refused(header: Any) -> None:
    assert not is_message_or_refused(assemble(header))


@pytest.mark.parametrize(
    "data",
    [
        assemble(b"[" * 100_000),
        assemble(b"1" * 5_000),
        with_tensor({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, fields="[" * 100_000),
        with_tensor({"dtype": "F32", "shape": [0, 2**63 - 1, 2**63 - 1], "data_offsets": [0, 0]}, body=b""),
        with_tensor({"dtype": "F32", "shape": [0, 2**63, 2], "data_offsets": [0, 0]}, body=b""),
        with_tensor({"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}),
        with_tensor({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}),
        with_tensor({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}),
        struct.pack("<Q", 2**64 - 1) + b"{}",
    ],
    ids=["nested header", "huge number", "nested fields", "strides", "shape", "dtype", "size", "offsets", "length"],
)
def test_malicious_bytes_are_refused(data: bytes) -> None:
    assert not is_message_or_refused(data)


@given(st.binary(max_size=200))
@example(b"")
@example(bytes(8))
def test_random_bytes_are_refused(data: bytes) -> None:
    assert not is_message_or_refused(data)


@given(st.data())
def test_mutated_messages_never_raise_anything_else(data: st.DataObject) -> None:
    mutated = bytearray(DATA)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(mutated)))
        end = data.draw(st.integers(start, min(start + 4, len(mutated))))
        mutated[start:end] = data.draw(st.binary(max_size=4))
    is_message_or_refused(bytes(mutated))


@given(
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "I64", "BOOL", "F8_E8M0", "C64", "F4"]) | json_values,
            "shape": st.lists(st.integers(-1, 2**64), max_size=3) | json_values,
            "data_offsets": st.lists(st.integers(-1, 16), min_size=2, max_size=2) | json_values,
        }
    )
    | json_values
)
def test_mutated_headers_never_raise_anything_else(entry: Any) -> None:
    is_message_or_refused(with_tensor(entry))
