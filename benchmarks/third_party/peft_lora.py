"""peft: LoRA on a small BERT; only the adapters and the head train."""

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.third_party.transformers_bert import loader, loss, network
from benchmarks.third_party.wrapping import Wrapped

DISTRIBUTIONS = ("peft",)
WHAT = "LoRA on BertForSequenceClassification"


def make(client):
    net = network()
    torch.manual_seed(0)
    config = LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["query", "value"])
    return Wrapped(get_peft_model(net, config), loss), loader(client)
