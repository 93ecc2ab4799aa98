"""The command line: ``lightning-fl``, ``python -m lightning_fl`` or ``torchrun -m lightning_fl``."""

from typing import TYPE_CHECKING

from lightning_fl.cli.main import COMMANDS, main
from lightning_fl.cli.recipes import recipes_directory
from lightning_fl.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fl.cli.lightning_cli import FederatedCLI, check_strategy_name, federated_strategy_names

__all__ = ["COMMANDS", "FederatedCLI", "check_strategy_name", "federated_strategy_names", "main", "recipes_directory"]

# LightningCLI takes seconds to import, which most commands do not need.
__getattr__, __dir__ = lazy_names(__name__)
