"""Aggregation of the clients' low-rank adapters."""

from lightning_fl.adapters.lora_product import LoRAProduct

__all__ = ["LoRAProduct"]
