"""Silos of several processes that train one model together: for the federation each is one client."""

from lightning_fl.silos.silo import DDP, FSDP2, Silo

__all__ = ["DDP", "FSDP2", "Silo"]
