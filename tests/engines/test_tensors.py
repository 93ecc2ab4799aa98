from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_fl.engines.tensors import FederatedTensors


class Everything(nn.Module):
    """Trainable, frozen and tied parameters; persistent and non-persistent buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.body[0].weight
        self.head = nn.Linear(2, 1)
        self.register_buffer("scratch", torch.zeros(1), persistent=False)


BATCH_NORM = ["body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"]
PARAMS = ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "tied.bias", "head.weight", "head.bias"]


def test_tensors_are_sorted_by_their_part_in_the_federation() -> None:
    tensors = FederatedTensors(Everything())
    assert list(tensors.params) == PARAMS
    assert list(tensors.buffers) == BATCH_NORM
    assert not tensors.personal


def test_they_are_the_modules_own() -> None:
    module = Everything()
    tensors = FederatedTensors(module, ["head.*"])
    assert tensors.params["body.0.weight"] is module.body[0].weight
    assert tensors.buffers["body.1.running_mean"] is module.body[1].running_mean
    assert tensors.personal["head.bias"].data_ptr() == module.head.bias.data_ptr()


@pytest.mark.parametrize(
    ("personal", "names"),
    [
        (["head.*"], ["head.weight", "head.bias"]),
        (["*running*"], BATCH_NORM[:2]),
        (["head.bias", "body.1.*"], ["body.1.weight", "body.1.bias", "head.bias", *BATCH_NORM]),
        (["body.0.weight"], ["body.0.weight"]),
        (["tied.weight"], ["body.0.weight"]),
        (["tied.*"], ["body.0.weight", "tied.bias"]),
    ],
)
def test_globs_make_tensors_personal_by_any_of_their_names(personal: list[str], names: list[str]) -> None:
    tensors = FederatedTensors(Everything(), personal)
    assert list(tensors.personal) == names
    assert [*tensors.params, *tensors.buffers] == [name for name in PARAMS + BATCH_NORM if name not in names]


@pytest.mark.parametrize("pattern", ["haed.*", "HEAD.*", "scratch"])
def test_a_glob_that_matches_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"personal='.*' matches none .*body\.0\.weight, .*, \.\.\."):
        FederatedTensors(Everything(), ["head.*", pattern])


@pytest.mark.parametrize("personal", [["*"], ["*.weight", "*.bias"]])
def test_something_trainable_must_be_shared(personal: list[str]) -> None:
    with pytest.raises(ValueError, match="No trainable parameter is left to share"):
        FederatedTensors(Everything(), personal)
    with pytest.raises(ValueError, match="No trainable parameter is left to share"):
        FederatedTensors(Everything().requires_grad_(False))


@pytest.mark.parametrize(("personal", "kind"), [([], "buffers"), (["body.1.*"], "personal")])
def test_a_buffer_that_the_module_replaces_is_found_again(personal: list[str], kind: str) -> None:
    module = Everything()
    tensors = FederatedTensors(module, personal)
    module.body[1].running_mean = torch.full((2,), 7.0)
    found: dict[str, Tensor] = getattr(tensors, kind)
    assert found["body.1.running_mean"].tolist() == [7.0, 7.0]
