from __future__ import annotations

import sys

import pytest
import torch

from lightning_fl.datamodules import DigitsDataModule


@pytest.fixture(scope="module")
def digits() -> DigitsDataModule:
    data = DigitsDataModule()
    data.setup()
    return data


def test_sizes_types_and_range(digits: DigitsDataModule) -> None:
    x, y = digits.train_set.tensors
    assert (x.shape, x.dtype) == ((1437, 1, 8, 8), torch.float32)
    assert (y.shape, y.dtype) == ((1437,), torch.int64)
    assert (x.min(), x.max()) == (0.0, 1.0)
    assert len(digits.test_set) == 360


def test_both_sets_together_are_all_the_digits(digits: DigitsDataModule) -> None:
    from sklearn.datasets import load_digits

    pixels = torch.cat([digits.train_set.tensors[0], digits.test_set.tensors[0]]).flatten(1) * 16
    source = torch.from_numpy(load_digits().data).float()
    assert torch.equal(*(torch.tensor(sorted(rows.tolist())) for rows in (pixels, source)))


def test_split_is_stratified(digits: DigitsDataModule) -> None:
    shares = [torch.bincount(part.tensors[1]) / len(part) for part in (digits.train_set, digits.test_set)]
    assert torch.allclose(*shares, atol=2e-3)


def test_split_depends_on_the_seed_alone(digits: DigitsDataModule) -> None:
    again, other = DigitsDataModule(batch_size=8), DigitsDataModule(seed=1)
    again.setup()
    other.setup()
    assert torch.equal(again.test_set.tensors[0], digits.test_set.tensors[0])
    assert not torch.equal(other.test_set.tensors[0], digits.test_set.tensors[0])


def test_loaders(digits: DigitsDataModule) -> None:
    assert len(digits.train_dataloader()) == 45
    first, again = (next(iter(digits.train_dataloader()))[1] for _ in range(2))
    assert not torch.equal(first, again)
    for loader in (digits.val_dataloader(), digits.test_dataloader(), digits.predict_dataloader()):
        assert torch.equal(torch.cat([y for _, y in loader]), digits.test_set.tensors[1])


@pytest.mark.parametrize("test_share", [0.0, 1.0, -0.1])
def test_share_out_of_range_is_refused(test_share: float) -> None:
    with pytest.raises(ValueError, match=f"test_share={test_share} must be between 0 and 1"):
        DigitsDataModule(test_share=test_share)


def test_missing_scikit_learn_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'needs scikit-learn.*pip install "lightning-fl\[data\]"'):
        DigitsDataModule().setup()
