"""Adapters of a large language model: bytes a round, tokens a second beside a plain Trainer, and memory.

    python benchmarks/language.py
    python benchmarks/language.py --tiny --device cpu

A model of 1.1 billion random weights in bfloat16, LoRA of rank 16 on its queries and values in float32, three clients;
without and with gradient checkpointing. One line each, as a Markdown table: what the clients send in a round, tokens
a second and the peak of the memory, each beside those of a plain Trainer that takes the same steps on the same model.
It fails if clients send anything but their adapters in float32, or on a GPU if the federation trains fewer than 0.9 of
the plain Trainer's tokens a second. ``--tiny`` tries the script on a small model, and ``--device cpu`` where no GPU is.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import TensorDataset
from workloads import QUIET, prepare_process

import lightning_fl as fl

CLIENTS = 3
LEAST = 0.9  # of a plain Trainer's tokens a second
MODEL = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "dtype": "bfloat16",
}
TINY = {
    **MODEL,
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
COLUMNS = (
    "gradient checkpointing",
    "bytes a round",
    "tokens/s",
    "plain Trainer",
    "ratio",
    "peak memory",
    "plain Trainer",
)


class Gauge(fl.callbacks.FederatedCallback):
    """Seconds of the epochs after the first, the bytes of each client's update, and the peak of the memory."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.sent: list[int] = []

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        if trainer.current_epoch == 1:
            self._forget_peak()
        self.started, self.sent = time.perf_counter(), []

    def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any) -> None:
        trees = (update.delta, update.buffers, update.aux)
        self.sent.append(sum(tensor.numel() * tensor.element_size() for tree in trees for tensor in tree.values()))

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        if trainer.current_epoch > 0:
            self.seconds.append(time.perf_counter() - self.started)
        self.peak = self._read_peak()

    def _forget_peak(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

    def _read_peak(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def train(strategy: Any, checkpoints: bool, options: argparse.Namespace) -> tuple[Gauge, int]:
    """Trains the model for some epochs; returns what was measured, and the number of trained parameters."""
    torch.manual_seed(0)
    config = TINY if options.tiny else MODEL
    with torch.device(options.device):
        module = fl.models.CausalLM(config=config, lora=LORA, gradient_checkpointing=checkpoints)
    generator = torch.Generator().manual_seed(0)
    shape = (CLIENTS, options.steps * options.batch, options.length + 1)
    tokens = torch.randint(config["vocab_size"], shape, generator=generator)
    data = fl.datamodules.ClientDatasets(
        [TensorDataset(own[:, :-1], own[:, 1:]) for own in tokens], batch_size=options.batch
    )
    gauge = Gauge(options.device)
    settings = {**QUIET, "accelerator": "gpu" if options.device == "cuda" else "cpu", "devices": 1}
    trainer = L.Trainer(
        strategy=strategy, max_epochs=options.rounds + 1, precision="bf16-mixed", callbacks=[gauge], **settings
    )
    trainer.fit(module, data)
    return gauge, sum(param.numel() for param in module.parameters() if param.requires_grad)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model instead")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that are timed, after a first one")
    parser.add_argument("--steps", type=int, default=10, help="steps of a client in a round")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens of an example")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no GPU here; --device cpu tries the script without one.")
    prepare_process(options.threads)
    print(torch.cuda.get_device_name() if options.device == "cuda" else "CPU", f"torch {torch.__version__}")
    print("|", " | ".join(COLUMNS), "|\n|", " | ".join("---" for _ in COLUMNS), "|")
    wrong = []
    num_tokens = CLIENTS * options.steps * options.batch * options.length
    for checkpoints in (False, True):
        own, size = train("fedavg", checkpoints, options)
        plain, _ = train("auto", checkpoints, options)
        speed, plain_speed = (num_tokens / min(gauge.seconds) for gauge in (own, plain))
        cells = (
            "with" if checkpoints else "without",
            f"{CLIENTS} x {own.sent[0]:,}",
            f"{speed:,.0f}",
            f"{plain_speed:,.0f}",
            f"{speed / plain_speed:.2f}",
            f"{own.peak / 1e9:.2f} GB",
            f"{plain.peak / 1e9:.2f} GB",
        )
        print("|", " | ".join(cells), "|", flush=True)
        if own.sent != [4 * size] * CLIENTS:
            wrong.append(f"clients sent {own.sent} bytes, expected {4 * size} each")
        if options.device == "cuda" and speed < LEAST * plain_speed:
            wrong.append(f"{speed / plain_speed:.2f} of the plain Trainer's tokens a second, expected {LEAST}")
    if wrong:
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    main()
