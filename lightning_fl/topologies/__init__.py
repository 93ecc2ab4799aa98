"""Topologies: which nodes mix their models, as mixing matrices."""

from lightning_fl.topologies.hierarchy import Cyclic, Edges, Swarm
from lightning_fl.topologies.static import Complete, Graph, Grid, Hypercube, Path, Ring, Star, Torus
from lightning_fl.topologies.time_varying import Exponential, Random
from lightning_fl.topologies.topology import Lazy, Topology

__all__ = [
    "Complete",
    "Cyclic",
    "Edges",
    "Exponential",
    "Graph",
    "Grid",
    "Hypercube",
    "Lazy",
    "Path",
    "Random",
    "Ring",
    "Star",
    "Swarm",
    "Topology",
    "Torus",
]
