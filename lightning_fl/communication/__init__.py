"""How ranks reach each other: process groups, collectives and messages."""

from lightning_fl.communication.equality import all_hold_the_same
from lightning_fl.communication.group import Group, LocalGroup, RankLost, TorchGroup
from lightning_fl.communication.message import Message
from lightning_fl.communication.rendezvous import connect, launched_group

__all__ = ["Group", "LocalGroup", "Message", "RankLost", "TorchGroup", "all_hold_the_same", "connect", "launched_group"]
