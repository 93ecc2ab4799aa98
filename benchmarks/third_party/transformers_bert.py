"""Hugging Face transformers: a small BERT, with batches that are dictionaries."""

import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.third_party.wrapping import Wrapped

DISTRIBUTIONS = ("transformers",)
WHAT = "BertForSequenceClassification"


def network():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    own = {"vocab_size": 20, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
    return BertForSequenceClassification(BertConfig(**sizes, **own))


def loader(client):
    generator = torch.Generator().manual_seed(client)
    examples = [
        {
            "input_ids": torch.randint(20, (6,), generator=generator),
            "attention_mask": torch.ones(6, dtype=torch.long),
            "labels": torch.randint(3, (), generator=generator),
        }
        for _ in range(6 + 2 * (client % 2))
    ]
    return DataLoader(examples, batch_size=2)


def loss(net, batch):
    return net(**batch).loss


def make(client):
    return Wrapped(network(), loss), loader(client)
