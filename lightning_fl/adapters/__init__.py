"""Low-rank adapters: how those of several clients become one."""

from lightning_fl.adapters.lora_product import LoRAProduct

__all__ = ["LoRAProduct"]
