"""Logs what a language model writes, round by round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_fl.callbacks.round_end import RoundEndCallback
from lightning_fl.tracking import loggers


class GenerationSamples(RoundEndCallback):
    """Logs what the global model answers to prompts after rounds, by greedy decoding.

    The texts are a table ``samples`` in TensorBoard and W&B, with prompt and answer, and lines in the log.

    Args:
        prompts: The instructions, which the datamodule's ``encode_prompt`` and ``decode`` turn into tokens and back, as
            those of :class:`~lightning_fl.datamodules.InstructionDataModule`.
        every_n_rounds: After how many rounds each time.
        max_new_tokens: Tokens of the longest answer.

    Raises:
        ValueError: If there are no prompts, or a number is not positive.
        MisconfigurationException: When training starts, if the datamodule has no ``encode_prompt`` and ``decode``.
    """

    def __init__(self, prompts: Sequence[str], every_n_rounds: int = 1, max_new_tokens: int = 32) -> None:
        if isinstance(prompts, str) or not prompts or every_n_rounds < 1 or max_new_tokens < 1:
            raise ValueError(
                f"GenerationSamples needs a list of prompts and positive numbers, found prompts={prompts!r}, "
                f"every_n_rounds={every_n_rounds}, max_new_tokens={max_new_tokens}."
            )
        self.prompts = list(prompts)
        self.every_n_rounds = every_n_rounds
        self.max_new_tokens = max_new_tokens
        self.samples: list[list[str]] = []
        """The answers by round in which some were made."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forgets an earlier run of another Trainer."""
        if stage == "fit" and trainer.current_epoch == 0:
            self.samples = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes sure that there is a tokenizer."""
        super().on_train_start(trainer, pl_module)
        datamodule = getattr(trainer, "datamodule", None)
        if not all(hasattr(datamodule, name) for name in ("encode_prompt", "decode", "end_token")):
            raise MisconfigurationException(
                f"GenerationSamples needs a datamodule with encode_prompt, decode and end_token, found "
                f"{type(datamodule).__name__}. Use fl.datamodules.InstructionDataModule, or give yours these methods."
            )

    def on_round_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Generates and logs, on the first rank."""
        if (trainer.current_epoch + 1) % self.every_n_rounds or not trainer.is_global_zero:
            return
        answers = [self._answer(module, trainer.datamodule, prompt) for prompt in self.prompts]  # type: ignore[attr-defined]
        self.samples.append(answers)
        rows = [[trainer.current_epoch, *both] for both in zip(self.prompts, answers, strict=True)]
        loggers.log_table(trainer, "samples", ["round", "prompt", "answer"], rows)
        for _, prompt, answer in rows:
            rank_zero_info(f"Round {trainer.current_epoch}: {prompt!r} -> {answer!r}")

    def _answer(self, module: L.LightningModule, datamodule: Any, prompt: str) -> str:
        tokens = datamodule.encode_prompt(prompt)
        was_training, start = module.training, len(tokens)
        module.eval()
        try:
            with torch.no_grad():
                for _ in range(self.max_new_tokens):
                    own = torch.tensor([tokens], device=module.device)
                    tokens = [*tokens, int(module(own)[0, -1].argmax())]
                    if tokens[-1] == datamodule.end_token:
                        break
        finally:
            module.train(was_training)
        text: str = datamodule.decode(tokens[start:])
        return text
