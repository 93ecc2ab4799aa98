"""Silos of several processes that train one model together; each silo is one client of the federation."""

from lightning_fl.silos.silo import DDP, FSDP2, Silo

__all__ = ["DDP", "FSDP2", "Silo"]
