"""Dependencies point one way and have no cycle, and what libraries keep private is touched in one place each."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torchmetrics import SumMetric

import lightning_fl

PACKAGE = Path(lightning_fl.__file__).parent
NAME = "lightning_fl"
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities")

LAYERS = (
    ("types", "tree", "seeding", "optimizer_tree", "torch_internals", "lazy", "files", "os_differences", "yaml_files"),
    ("algorithms", "clients", "data", "communication", "topologies"),
    ("aggregation", "engines"),
    ("privacy", "compression", "schedules"),
    ("federation", "silos"),
    ("coordinator",),
    ("strategies",),
    (
        "callbacks",
        "datamodules",
        "models",
        "tracking",
        "attacks",
        "analytics",
        "vertical",
        "audit",
        "serving",
        "devices",
        "adapters",
    ),
    ("cli",),
)
"""Each room may import the rooms before its own layer; within a layer those that make no cycle."""
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
WITHOUT_LIGHTNING = [room for rooms in LAYERS[: LAYER["strategies"]] for room in rooms]

PRIVATE = {
    "lightning": ("strategies/internals.py", "strategies/loops.py", "strategies/results.py"),
    "torch": ("torch_internals.py",),
    # The values that Lightning logs are torchmetrics, whose private attributes Lightning sets and reads itself.
    "torchmetrics": ("strategies/torchmetrics_internals.py", "strategies/results.py"),
    "opacus": ("privacy/sample_level/per_sample.py",),
}
"""Where what a library keeps private may be touched; each touch has its reason there, and a test."""
LIGHTNING_OBJECTS = {"trainer", "lightning_module", "pl_module", "fit_loop", "epoch_loop"}

Finding = tuple[int, str]


def imported_names(tree: ast.AST) -> Iterator[Finding]:
    """The line and full name of everything imported, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the full name"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def is_below(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files() -> list[Path]:
    found = sorted(PACKAGE.rglob("*.py"))
    top = {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}
    return [path for path in found if path not in top and "starter" not in path.parts]


def wrong_directions(sources: Mapping[Path, str]) -> list[str]:
    """Imports of a room in a later layer than one's own."""
    return [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path, source in sources.items()
        for line, name in imported_names(ast.parse(source))
        if name.startswith(f"{NAME}.") and LAYER.get(name.split(".")[1], -1) > LAYER[room_of(path)]
    ]


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """By module those that it imports, at whatever level and for whatever purpose."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        graph[module] = set()
        for _, name in imported_names(ast.parse(source)):
            target = name if name in sources else name.rpartition(".")[0]
            if target in sources and target != module:
                graph[module].add(target)
    return graph


def cycle_in(graph: Mapping[str, Iterable[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle: list[str] = error.args[1]
        return cycle
    return []


def private_names(*objects: object) -> set[str]:
    return {name for found in objects for name in dir(found) if is_private(name)} - {"_abc_impl"}


LAYER_OF_TORCH = torch.nn.Linear(1, 1)
PRIVATE_NAMES = {
    "torch": private_names(
        *(torch.Tensor, LAYER_OF_TORCH, torch.optim.SGD(LAYER_OF_TORCH.parameters()), dist.ProcessGroupGloo._Options)
    ),
    "torchmetrics": private_names(SumMetric()),
    "opacus": {"_forward_counter", "_current_grad_sample"},
}
"""Private names of the objects that the package is handed; the first library that has a name counts."""


def library_of(module: str) -> str:
    top = module.split(".")[0]
    return "lightning" if top in LIGHTNING else top


def libraries_by_local_name(tree: ast.AST) -> dict[str, str]:
    """By the name that an import binds, the library that it comes from."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                module = alias.name if isinstance(node, ast.Import) else str(node.module)
                found[alias.asname or alias.name.split(".")[0]] = library_of(module)
    return found


def names_defined_in(tree: ast.AST) -> set[str]:
    """Functions, variables, and attributes of ``self``."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names


def private_touches(source: str) -> list[tuple[int, str, str]]:
    """Line, library and name of each use of what a library keeps private or calls experimental.

    These are imports, attributes of anything but ``self`` and ``cls``, and strings that name a known attribute, as for
    ``getattr``. An attribute that neither the file itself nor another library defines is taken for Lightning's.
    """
    tree = ast.parse(source)
    touches = [
        (line, library_of(name), name)
        for line, name in imported_names(tree)
        if library_of(name) != NAME and any(is_private(part) or part == "experimental" for part in name.split("."))
    ]
    by_local_name, defined = libraries_by_local_name(tree), names_defined_in(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            owner, name = None, node.value
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            owner, name = ast.unparse(node.value), node.attr
        else:
            continue
        library = next((library for library, names in PRIVATE_NAMES.items() if name in names), None)
        if owner is not None:
            parts = owner.replace("(", ".").replace(")", ".").split(".")
            imported = by_local_name.get(parts[0], NAME)
            if owner in ("self", "cls", "super()"):
                library = None
            elif imported != NAME:
                library = imported
            elif library is None and (name not in defined or LIGHTNING_OBJECTS & set(parts)):
                library = "lightning"
        if library is not None:
            touches.append((node.lineno, library, f"{owner}.{name}" if owner else name))
    return touches


def test_rooms_import_earlier_layers_only() -> None:
    assert wrong_directions({path: path.read_text() for path in files()}) == []


def test_every_room_has_its_layer() -> None:
    assert {room_of(path) for path in files()} == set(LAYER)


def test_no_file_imports_itself_in_a_circle() -> None:
    sources = {
        f"{NAME}." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text()
        for path in files()
        if path.name != "__init__.py"
    }
    assert cycle_in(import_graph(sources)) == []


BLOCKED = f"""
import importlib, pkgutil, sys, types

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {LIGHTNING!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Block())
package = types.ModuleType({NAME!r})  # without its __init__, which registers the strategies
package.__path__ = [{str(PACKAGE)!r}]
sys.modules[{NAME!r}] = package
for room in {WITHOUT_LIGHTNING!r}:
    module = importlib.import_module(f"{NAME}.{{room}}")
    for found in pkgutil.walk_packages(getattr(module, "__path__", ()), f"{{module.__name__}}."):
        importlib.import_module(found.name)

import torch
from lightning_fl.aggregation import WeightedMean
from lightning_fl.algorithms import FedAvg
from lightning_fl.clients import ClientStore, LocalWork
from lightning_fl.engines import OptimizerStates, SequentialEngine, StepFunctions
from lightning_fl.federation import (
    ClientBatches, ClientData, FederationSettings, FederationState, LocalFederation, RankReport, Round
)

torch.manual_seed(0)
network = torch.nn.Linear(2, 1)
functions = StepFunctions(lambda batch, offset: (network(batch[0]) - batch[1]).square().mean())
trainer = SequentialEngine(network, OptimizerStates([torch.optim.SGD(network.parameters(), 0.1)]), functions=functions)
settings = FederationSettings(FedAvg(), WeightedMean(), (), "examples", seed=0, population=2)
state, store, work = FederationState(), ClientStore(), LocalWork(epochs=3)
x = torch.randn(8, 2)
data = {{0: [(x[:4], x[:4].sum(1, keepdim=True))], 1: [(x[4:], x[4:].sum(1, keepdim=True))]}}
for index in range(30):
    round = Round.open(settings, state, trainer, store, LocalFederation(), index, [0, 1])
    for client, loader in data.items():
        task = round.start(ClientData(ClientBatches(client, loader, [work], index, work), 4))
        for batch, position in task.batches:
            round.step(task, batch, position)
        round.finish(task)
    state = round.close(round.merge(RankReport())).state
print(float((network(x) - x.sum(1, keepdim=True)).square().mean()))
"""


def test_a_round_over_a_plain_module_runs_without_lightning() -> None:
    run = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 1e-4


def test_what_libraries_keep_private_is_touched_in_few_files() -> None:
    touches = [
        (str(path.relative_to(PACKAGE)), line, library, name)
        for path in files()
        for line, library, name in private_touches(path.read_text())
    ]
    found = [
        f"{path}:{line}: {name} belongs into {PRIVATE.get(library, 'no file')}"
        for path, line, library, name in touches
        if path not in PRIVATE.get(library, ())
    ]
    assert found == []
    allowed = {(library, path) for library, paths in PRIVATE.items() for path in paths}
    assert allowed == {(library, path) for path, _, library, _ in touches}


# ---- the rules find what they are there for


def test_wrong_directions_are_found() -> None:
    path = PACKAGE / "federation" / "round.py"
    source = "from lightning_fl.strategies.driver import RoundDriver\nfrom lightning_fl.types import Tree\n"
    assert wrong_directions({path: source}) == [
        "federation/round.py:1: lightning_fl.strategies.driver.RoundDriver",
    ]


def test_circles_are_found_also_behind_type_checking() -> None:
    sources = {
        "lightning_fl.a": "if TYPE_CHECKING:\n    from lightning_fl.b import B\n",
        "lightning_fl.b": "def f():\n    import lightning_fl.a\n",
    }
    assert set(cycle_in(import_graph(sources))) == set(sources)
    assert cycle_in(import_graph({**sources, "lightning_fl.b": ""})) == []


@pytest.mark.parametrize(
    ("source", "libraries"),
    [
        ("from lightning.pytorch.loops.utilities import _is_max_limit_reached", ["lightning"]),
        ("from lightning.pytorch.trainer import Trainer", []),
        ("self.trainer._accelerator_connector.use_distributed_sampler = False", ["lightning"]),
        ("self.lightning_module.trainer.fit_loop._data_fetcher", ["lightning"]),
        ("self._results = self.trainer._results", ["lightning"]),
        ("trainer.fit_loop.epoch_loop.__class__", []),
        ("self._trainer_name = other._trainer_name", []),
        ("module._trainer", ["lightning"]),
        ("from torch.utils import _pytree as pytree", ["torch"]),
        ("from torch.utils._pytree import tree_map", ["torch"]),
        ("def f():\n    import torch._dynamo", ["torch"]),
        ("from torch.fx.experimental.proxy_tensor import make_fx", ["torch"]),
        ("from torch.func import vmap", []),
        ("from torch import nn\nnn.modules.conv._ConvNd", ["torch"]),
        ("import torch\ntorch._foreach_add_(tensors, 1)", ["torch"]),
        ("tensor._version", ["torch"]),
        ("self._buffers = module._buffers", ["torch"]),
        ("any(m._backward_hooks for m in module.modules())", ["torch"]),
        ("optimizer._optimizer_step_pre_hooks", ["torch"]),
        ("options._timeout = timeout", ["torch"]),
        ("getattr(param, '_post_accumulate_grad_hooks', None)", ["torch"]),
        ("from torchmetrics.utilities import dim_zero_sum", []),
        ("from torchmetrics.utilities.imports import _SCIPY_AVAILABLE", ["torchmetrics"]),
        ("self.metrics[name]._update_count", ["torchmetrics"]),
        ("metric._defaults, metric._reductions, metric._computed", ["torchmetrics"] * 3),
        ("import functools\nfunctools._lru_cache_wrapper", ["functools"]),
        ("from lightning_fl.federation.report import _joined", []),
    ],
)
def test_private_touches_are_found(source: str, libraries: list[str]) -> None:
    assert [library for _, library, _ in private_touches(source)] == libraries
