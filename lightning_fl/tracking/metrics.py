"""Choice of the default metric, and whether higher is better."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_fl.tracking.run import Run

HIGHER_IS_BETTER = ("acc", "f1", "auroc", "auc", "precision", "recall", "score", "r2", "iou", "dice", "psnr", "bleu")


def is_higher_better(name: str) -> bool:
    """Whether higher is better for a metric, as for an accuracy; guessed from parts of its name."""
    return any(word in name.lower() for word in HIGHER_IS_BETTER)


def best_metric(runs: Sequence[Run]) -> str:
    """The most informative metric that all runs have: personalized models, then validation, then training.

    Within each of these groups, an accuracy comes before a loss. With personalized models, clients don't use the global
    one.

    Raises:
        ValueError: If the runs have no metric in common.
    """
    shared = [name for name in runs[0].metric_names if all(name in run.metric_names for run in runs)]
    if not shared:
        found = "; ".join(f"{run.path}: {', '.join(run.metric_names) or 'none'}" for run in runs)
        raise ValueError(f"The runs have no metric in common ({found}). Log one with self.log(...) in validation_step.")

    def rank(name: str) -> tuple[bool, bool, bool, int]:
        is_personal = name.startswith("personalized/")
        is_val = name.removeprefix("personalized/").startswith("val")
        return not is_personal, not is_val, not is_higher_better(name), shared.index(name)

    return min(shared, key=rank)
