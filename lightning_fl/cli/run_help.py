"""The short help of ``fit``, ``validate``, ``test`` and ``predict``: their most common options, without Lightning."""

from __future__ import annotations

import textwrap

from lightning_fl.cli.command import PROGRAM

HELP_ALL = "--help-all"
_EVERY_RUN = {
    "--config FILE": "The configuration in YAML. It may be given several times: later files override earlier ones.",
    "--model.NAME VALUE": "A hyper-parameter of the module, such as --model.lr 0.1.",
    "--data.NAME VALUE": "A setting of the datamodule.",
    "--trainer.accelerator NAME": "cpu, gpu, or auto.",
    "--trainer.logger false": "Keep no record.",
    "--seed_everything N": "The seed; false for none.",
    "--ckpt_path FILE": "A checkpoint. last: the newest last.ckpt in the logger's folder, or else checkpoint.",
    "--print_config": "Print the whole configuration, with all defaults, and stop.",
    "--model.help CLASS": "A module's hyper-parameters; likewise --data.help and --trainer.strategy.help.",
}
_FIT = {
    "--trainer.max_epochs N": "The number of rounds.",
    "--trainer.strategy NAME": f"An algorithm (`{PROGRAM} algorithms` lists them); auto: train without a federation.",
    "--trainer.strategy.algorithm NAME": "Another algorithm, with all other settings of the strategy unchanged.",
    "--trainer.strategy.algorithm.NAME VALUE": "A hyper-parameter of the algorithm.",
    "--trainer.strategy.local_epochs N": "Passes of a client over its data in a round; or local_steps.",
    "--trainer.strategy.clients_per_round N": "Clients in a round: a number such as 10, or a share such as 0.1.",
    "--trainer.strategy.num_clients N": "Simulated clients among whom the data is split.",
    "--trainer.devices N": "Processes on this machine that share the clients.",
    "--dry-run": "Show which clients would train on which rank and what a round would send, and stop.",
}
_EXAMPLES = {
    "fit": (
        f"{PROGRAM} fit --config config.yaml",
        f"{PROGRAM} fit --config config.yaml --trainer.strategy scaffold --trainer.max_epochs 50",
        f"{PROGRAM} fit --config config.yaml --trainer.max_epochs 40 --ckpt_path last",
        "torchrun --standalone --nproc_per_node 3 -m lightning_fl fit --config silos.yaml",
    )
}


def short_help(name: str, description: str) -> str:
    """The purpose of a LightningCLI command, its most common options, and examples.

    Args:
        name: The command.
        description: Its purpose, in one line.
    """
    options = _EVERY_RUN | (_FIT if name == "fit" else {})
    options[HELP_ALL] = "Show all options, including those of Lightning's Trainer; takes some seconds."
    lines = []
    for option, text in options.items():
        filled = textwrap.wrap(text, 76)
        lines += [f"  {option}", *(f"      {line}" for line in filled)]
    examples = _EXAMPLES.get(name, (f"{PROGRAM} {name} --config config.yaml --ckpt_path last",))
    return "\n".join(
        [
            f"usage: {PROGRAM} {name} --config FILE [options]",
            "",
            description,
            "",
            "options:",
            *lines,
            "",
            "examples:",
            *(f"  {example}" for example in examples),
        ]
    )
