"""Adapters of a language model: tokens, losses, metrics by client, peft's folder, samples."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_fl as fl
from lightning_fl.communication import TorchGroup
from tests.helpers.training import trainer

pytest.importorskip("peft")
pytest.importorskip("transformers")

TINY = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def write_instructions(path: Path, number: int = 24) -> Path:
    kinds = {"plus": lambda a, b: a + b, "minus": lambda a, b: a - b, "double": lambda a, b: 2 * a}
    rows = [
        {
            "client": kind,
            "instruction": f"{kind} {a} {b}",
            "response": str(answer(a, b)),
            "rejected": str(answer(a, b) + 1),
        }
        for kind, answer in kinds.items()
        for a, b in [(index % 7, index % 5) for index in range(number)]
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def data_of(folder: Path, **options: Any) -> fl.datamodules.InstructionDataModule:
    path = write_instructions(folder / "instructions.jsonl")
    return fl.datamodules.InstructionDataModule(path, vocabulary_size=300, batch_size=4, test_share=0.25, **options)


def tiny(kind: Any = fl.models.CausalLM, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config=TINY, lora=LORA, lr=0.01, **options)


def test_only_responses_are_predicted(tmp_path: Path) -> None:
    data = data_of(tmp_path)
    tokens, labels = data.encode("plus 3 4", "7")
    assert data.decode(tokens) == "plus 3 4\n7"
    assert [label for label in labels if label != -100] == tokens[-2:]
    assert tokens[-1] == data.end_token
    data.setup()
    assert list(data.client_ids) == ["double", "minus", "plus"]
    batch = data.collate([data.client_dataset("plus")[0], {"input_ids": [5], "labels": [-100]}])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"][1].sum() == 1
    assert (batch["labels"][1] == -100).all()
    long = fl.datamodules.InstructionDataModule(data.path, max_length=5, vocabulary_size=300)
    tokens, labels = long.encode("plus 3 4 and more", "7")
    assert len(tokens) == 5
    assert tokens[-1] == long.end_token


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            '{"client": 1, "instruction": "a"}',
            r"line 2: expected an object with client, instruction, response \(KeyError",
        ),
        ('{"client": 1, "instruction": "a", "response": 3}', "must be strings"),
        ("[1, 2]", "line 2"),
        ("plus 3", "line 2"),
        ('{"client": [1], "instruction": "a", "response": "b"}', "client id"),
    ],
)
def test_lines_that_are_no_examples_are_named(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"client": 1, "instruction": "a", "response": "b"}\n' + line)
    with pytest.raises(ValueError, match=words):
        fl.datamodules.InstructionDataModule(path).setup()


class Table(fl.models.CausalLM):
    """Gives fixed scores, to check losses and metrics by hand."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(config=TINY)
        self.logits = logits

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.logits[input_ids]


def test_perplexity_and_exact_match_by_hand() -> None:
    """Each token is followed by the next one with probability 3/4, of 4."""
    logits = torch.full((4, 4), math.log(1 / 12))
    for token in range(4):
        logits[token, (token + 1) % 4] = math.log(3 / 4)
    model = Table(logits)
    right = {"input_ids": torch.tensor([[0, 1, 2]]), "labels": torch.tensor([[-100, 1, 2]])}
    wrong = {"input_ids": torch.tensor([[0, 1, 3]]), "labels": torch.tensor([[-100, 1, 3]])}
    batches = [{**own, "attention_mask": torch.ones(1, 3, dtype=torch.int64)} for own in (right, wrong)]
    fit = trainer("auto")
    (found,) = fit.validate(model, DataLoader(batches, batch_size=None), verbose=False)
    mean = -(3 * math.log(3 / 4) + math.log(1 / 12)) / 4
    assert found["val_loss"] == pytest.approx(mean, rel=1e-5)
    assert found["val_perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert found["val_exact_match"] == 0.5


def test_gradient_checkpointing_keeps_less_and_changes_no_gradient() -> None:
    tokens = torch.arange(8)[None].repeat(2, 1)
    found: list[tuple[dict[str, Any], int]] = []
    for checkpoints in (False, True):
        model: Any = tiny(gradient_checkpointing=checkpoints)
        kept: list[int] = []
        nn.init.ones_(next(own for name, own in model.named_parameters() if "lora_B" in name))
        model.train()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda own, kept=kept: kept.append(own.numel()) or own, lambda own: own
        ):
            loss = model.loss(model(tokens), tokens + 1)
        loss.backward()
        grads = {name: own.grad for name, own in model.named_parameters() if own.requires_grad}
        found.append((grads, sum(kept)))
    (plain, all_kept), (again, few_kept) = found
    assert few_kept < 0.6 * all_kept
    assert max(grad.abs().max() for grad in plain.values()) > 0
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft 0.21 in transformers 5.24
def test_a_federation_of_tasks(tmp_path: Path) -> None:
    """Training moves the adapters alone; metrics by client, samples, and peft's folder with the same answers."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    data, model = data_of(tmp_path), tiny()
    base = {name: own.clone() for name, own in model.named_parameters() if not own.requires_grad}
    by_client = fl.callbacks.PersonalizedEvaluation(finetune_epochs=0, local_epochs=0)
    samples = fl.callbacks.GenerationSamples(["plus 1 2"], max_new_tokens=4)
    adapter = fl.callbacks.AdapterCheckpoint(tmp_path / "adapter")
    fit = trainer("fedavg", max_epochs=2, callbacks=[by_client, samples, adapter])
    fit.fit(model, data)
    assert {"val_perplexity", "val_exact_match", "val_loss"} <= fit.callback_metrics.keys()
    metrics = by_client.metrics
    assert list(metrics) == ["double", "minus", "plus"]
    for client, found in metrics.items():
        own = found["global"]
        assert own["val_perplexity"] == pytest.approx(math.exp(own["val_loss"]), rel=1e-4), client
        assert own["val_exact_match"] in [index / 6 for index in range(7)]
    assert len({own["global"]["val_perplexity"] for own in metrics.values()}) == 3
    assert [len(answers) for answers in samples.samples] == [1, 1]
    assert all(torch.equal(base[name], model.get_parameter(name)) for name in base)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    torch.manual_seed(0)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY))
    prefix = "model.base_model.model."
    renamed = {name.removeprefix(prefix).replace("base_layer.", ""): own for name, own in base.items()}
    fresh.load_state_dict(renamed, strict=False)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    tokens = torch.arange(20)[None]
    loaded.eval()
    model.eval()
    torch.testing.assert_close(loaded(input_ids=tokens).logits, model(tokens), rtol=0, atol=0)
    with torch.no_grad(), loaded.disable_adapter():
        assert not torch.equal(loaded(input_ids=tokens).logits, model(tokens))


@pytest.mark.slow
def test_preferences_start_at_the_logarithm_of_two(tmp_path: Path) -> None:
    data, model = data_of(tmp_path, rejected="rejected"), tiny(fl.models.DPO, beta=0.5)
    data.setup()
    batch = data.collate([data.client_dataset("plus")[index] for index in range(4)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are trying to `self.log")
        assert float(model.training_step(batch, 0)) == pytest.approx(math.log(2), abs=1e-6)
    fit = trainer("fedavg", max_epochs=4)
    fit.fit(model, data)
    assert fit.callback_metrics["train_loss"] < math.log(2) - 0.004
    assert fit.callback_metrics["train_preferred"] > 0.6
    assert {"val_loss", "val_preferred"} <= fit.callback_metrics.keys()
    with pytest.raises(ValueError, match="DPO needs adapters"):
        fl.models.DPO(config=TINY)


def what_travels() -> dict[str, Any]:
    """The sizes of all tensors that a rank hands to collectives, by kind."""
    seen: dict[str, list[int]] = {"all_reduce": [], "broadcast": []}
    with pytest.MonkeyPatch.context() as patch:
        for name, sizes in seen.items():
            own = getattr(TorchGroup, name)

            def spy(group: Any, tensor: Tensor, *args: Any, own: Any = own, sizes: list[int] = sizes) -> Tensor:
                sizes.append(tensor.numel())
                return own(group, tensor, *args)

            patch.setattr(TorchGroup, name, spy)
        model = tiny()
        tokens = torch.arange(8)[None].repeat(4, 1)
        strategy = fl.FederatedStrategy("fedavg", num_clients=2)
        fit = trainer(strategy, max_epochs=2, limit_val_batches=0)
        fit.fit(model, DataLoader(TensorDataset(tokens, tokens + 1), 2), [])
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    return {**seen, "trained": trained, "bytes": [entry["num_bytes"] for entry in strategy.history]}


@pytest.mark.slow
def test_nothing_frozen_travels(run_ranks: Any) -> None:
    for found in run_ranks(2, what_travels):
        assert found["trained"] == 448
        assert found["all_reduce"] == [found["trained"]] * 2
        assert sum(found["broadcast"]) == found["trained"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fl.models.CausalLM(), "found none of them"),
        (lambda: fl.models.CausalLM(config=TINY, pretrained="folder"), "found both"),
        (lambda: fl.callbacks.GenerationSamples("one text"), "a list of prompts"),
        (lambda: fl.callbacks.AdapterCheckpoint(every_n_rounds=0), "at least 1"),
        (lambda: fl.datamodules.InstructionDataModule("x", template="no place"), "needs {instruction}"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
