"""Communication between ranks: process groups, collectives and messages."""

from lightning_fl.communication.equality import all_hold_the_same
from lightning_fl.communication.group import Group, LocalGroup, RankLost, TorchGroup
from lightning_fl.communication.message import Message
from lightning_fl.communication.rendezvous import connect, connect_silos, launched_group
from lightning_fl.communication.silo import SiloGroup

__all__ = [
    "Group",
    "LocalGroup",
    "Message",
    "RankLost",
    "SiloGroup",
    "TorchGroup",
    "all_hold_the_same",
    "connect",
    "connect_silos",
    "launched_group",
]
