"""Causal language models of transformers, fine-tuned on next tokens or preferences, also with peft's adapters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional
from torchmetrics import MeanMetric
from torchmetrics.text import Perplexity

from lightning_fl.models.libraries import library

IGNORED = -100
"""The label of a token that is not predicted, such as one of a prompt."""


class CausalLM(L.LightningModule):
    r"""A causal language model of transformers, whole or with low-rank adapters of peft.

    Batches are mappings with ``input_ids``, ``attention_mask`` and ``labels``, int64 of shape ``[batch, length]``,
    where a label of -100 is not predicted; or pairs of tokens and the same tokens shifted by one, as in
    :class:`~lightning_fl.datamodules.ShakespeareDataModule`. Logs ``train_loss``, and in validation ``val_loss``,
    ``val_perplexity`` :math:`= \exp(\text{mean negative log-likelihood of a token})`, and for prompts with responses
    ``val_exact_match``, the share of responses that greedy decoding reproduces exactly, because each token is the most
    likely one after those before it.

    Args:
        config: Options of ``AutoConfig.for_model``, including ``model_type``, for a model with random weights. None:
            use ``pretrained``.
        pretrained: A folder with a model from ``save_pretrained``; nothing is downloaded. None: use ``config``.
        base: A checkpoint or ``.safetensors`` file of this class without adapters, whose weights are loaded as the base
            model. None: the initial weights are kept.
        lora: Options of ``peft.LoraConfig``, such as ``{"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}``; the
            base model is then frozen. None: the whole model is trained.
        lr: Learning rate of AdamW. Default 0.001.
        weight_decay: Weight decay of AdamW. Default 0.
        gradient_checkpointing: Whether to recompute activations in the backward pass, which saves memory. Default
            False.

    Raises:
        ImportError: If transformers or peft is not installed.
        ValueError: If not exactly one of ``config`` and ``pretrained`` is given.

    Example:
        >>> model = CausalLM(
        ...     {"model_type": "llama", "vocab_size": 81, "hidden_size": 32, "intermediate_size": 64,
        ...      "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2},
        ...     lora={"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        ... )
        >>> sum(param.numel() for param in model.parameters() if param.requires_grad)
        512
    """

    def __init__(
        self,
        config: dict[str, Any] | None = None,
        pretrained: str | Path | None = None,
        base: str | Path | None = None,
        lora: dict[str, Any] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if (config is None) == (pretrained is None):
            found = "none of them" if config is None else "both"
            raise ValueError(f"CausalLM takes either config (random weights) or pretrained (a folder); found {found}.")
        self.save_hyperparameters("config", "lora", "lr", "weight_decay")
        self.lr, self.weight_decay = lr, weight_decay
        transformers = library("transformers")
        auto = transformers.AutoModelForCausalLM
        if config is not None:
            own = transformers.AutoConfig.for_model(**config)
            self.model = auto.from_config(own)
        else:
            self.model = auto.from_pretrained(str(pretrained), local_files_only=True)
        if base is not None:
            self.model.load_state_dict(_weights(Path(base)))
        if lora is not None:
            peft = library("peft")
            with warnings.catch_warnings():  # peft 0.21 uses an old name of transformers 5.24
                warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
                self.model = peft.get_peft_model(self.model, peft.LoraConfig(task_type="CAUSAL_LM", **lora))
        if gradient_checkpointing:
            # transformers 5.24 has renamed it, and warns about the old name.
            name = "activation" if hasattr(self.model, "activation_checkpointing_enable") else "gradient"
            getattr(self.model, f"{name}_checkpointing_enable")({"use_reentrant": False})
            if lora is not None:  # otherwise no block's input requires a gradient, and the adapters get none
                self.model.enable_input_require_grads()
        self.val_perplexity = Perplexity(ignore_index=IGNORED)
        self.val_exact_match = MeanMetric()

    def configure_model(self) -> None:
        """Shards the model block by block over ``device_mesh["data_parallel"]``, if the strategy has one."""
        mesh = self.device_mesh
        if mesh is None or isinstance(self.model, FSDPModule):
            return
        for part in list(self.model.modules()):
            if type(part).__name__.endswith("DecoderLayer"):
                fully_shard(part, mesh=mesh["data_parallel"])
        fully_shard(self.model, mesh=mesh["data_parallel"])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of the next tokens, ``[batch, length, vocabulary]``."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    def predictions(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits ``[batch, length, vocabulary]`` and the tokens that they predict ``[batch, length]``."""
        if isinstance(batch, Mapping):
            logits = self(batch["input_ids"], batch["attention_mask"])
            return logits[:, :-1], batch["labels"][:, 1:]
        tokens, following = batch
        return self(tokens), following

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean negative log-likelihood of the predicted tokens; 0 if there is none."""
        total = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        return total / (labels != IGNORED).sum().clamp(min=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, labels = self.predictions(batch)
        loss = self.loss(logits, labels)
        self.log("train_loss", loss, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Any, name: str) -> None:
        logits, labels = self.predictions(batch)
        self.val_perplexity(logits.float(), labels)
        # Weighted by tokens, so that its exponential is the perplexity.
        self.log(f"{name}_loss", self.loss(logits, labels), batch_size=int((labels != IGNORED).sum()))
        self.log(f"{name}_perplexity", self.val_perplexity, on_step=False, on_epoch=True, batch_size=len(labels))
        if isinstance(batch, Mapping):
            is_right = ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(-1)
            self.val_exact_match(is_right.float())
            self.log(f"{name}_exact_match", self.val_exact_match, on_step=False, on_epoch=True, batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [param for param in self.parameters() if param.requires_grad]
        return torch.optim.AdamW(trained, lr=self.lr, weight_decay=self.weight_decay)


class DPO(CausalLM):
    r"""Direct preference optimisation of adapters; the reference is the same model without them.

    .. math::
        \ell = -\log \sigma \left( \beta \left[ \log \frac{\pi(y^+ | x)}{\pi_0(y^+ | x)}
        - \log \frac{\pi(y^- | x)}{\pi_0(y^- | x)} \right] \right)

    Initially the adapters have no effect, so the loss is :math:`\ln 2`. Batches are those of :class:`CausalLM` for the
    chosen responses :math:`y^+`, plus the entries ``rejected_input_ids``, ``rejected_attention_mask`` and
    ``rejected_labels`` of the rejected responses :math:`y^-`. Logs ``train_loss`` and ``train_preferred``, the share of
    pairs in which the model has moved towards the chosen response, and both in validation.

    Args:
        beta: The strength :math:`\beta` with which the model is kept near the reference. Default 0.1.
        **kwargs: Arguments of :class:`CausalLM`; ``lora`` is required.

    Raises:
        ValueError: If there are no adapters, or ``beta`` is not positive.

    Reference:
        Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", NeurIPS 2023.
    """

    def __init__(self, beta: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if kwargs.get("lora") is None or not beta > 0:
            raise ValueError(
                f"DPO needs adapters (lora), because the reference is the model without them, and beta > 0; found lora="
                f"{kwargs.get('lora')}, beta={beta}."
            )
        self.beta = beta

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._preference(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._preference(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._preference(batch, "test")

    def _preference(self, batch: Any, name: str) -> Tensor:
        rejected = {key: batch[f"rejected_{key}"] for key in ("input_ids", "attention_mask", "labels")}
        gains = []
        for own in (batch, rejected):
            with torch.no_grad(), self.model.disable_adapter():
                reference = self._log_likelihood(own)
            gains.append(self._log_likelihood(own) - reference)
        margin = gains[0] - gains[1]
        loss = -functional.logsigmoid(self.beta * margin).mean()
        self.log(f"{name}_loss", loss, batch_size=len(margin))
        self.log(f"{name}_preferred", (margin > 0).float().mean(), batch_size=len(margin))
        return loss

    def _log_likelihood(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The log-likelihood of each response, ``[batch]``."""
        logits, labels = self.predictions(batch)
        each = functional.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")
        return -each.sum(-1)


def _weights(path: Path) -> dict[str, Tensor]:
    """The weights of a :class:`CausalLM` without adapters, by their names in the transformers model."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        found = load_file(path)
    else:
        found = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    return {name.removeprefix("model."): value for name, value in found.items() if name.startswith("model.")}
