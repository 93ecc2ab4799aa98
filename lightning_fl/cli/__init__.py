"""The command line: ``lightning-fl``, ``python -m lightning_fl`` or ``torchrun -m lightning_fl``."""

from lightning_fl.cli.lightning_cli import FederatedCLI, check_strategy_name, federated_strategy_names
from lightning_fl.cli.main import COMMANDS, main
from lightning_fl.cli.recipes import recipes_directory

__all__ = ["COMMANDS", "FederatedCLI", "check_strategy_name", "federated_strategy_names", "main", "recipes_directory"]
