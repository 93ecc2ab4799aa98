"""Which metric to show by default, and whether its maximum or its minimum is the best."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from lightning_fl.tracking.run import Run

Mode = Literal["min", "max"]

WORDS = {
    "max": "acc accuracy f1 f2 fbeta fscore auroc auc rocauc roc prauc prc auprc aupr ap map precision recall "
    "sensitivity specificity tpr tnr ppv npv score r2 iou miou giou jaccard dice psnr ssim msssim bleu "
    "sacrebleu rouge rougel rougelsum meteor chrf cider mcc matthews matthewscorrcoef kappa cohenkappa qwk mrr "
    "ndcg hit hits hitrate top cindex concordance corr corrcoef correlation pearson pcc spearman kendall ccc "
    "reward return success nmi ari similarity match em preferred likelihood loglikelihood elbo",
    "min": "loss losses err error errors mse rmse nrmse mae medae mape smape msle rmsle nll bce ce crossentropy "
    "logloss ppl perplexity brier crps pinball deviance fid kid lpips ece mce calibration wer cer ter eer fpr "
    "fnr kl kld divergence distance hausdorff hd assd chamfer drift regret bpc bpd cost",
    "neither": "std var variance gap diff difference delta neg negative minus count num",
}
"""Words of names; beside those of ``neither`` the direction of an accuracy or of a loss is not that of the whole."""
MAX, MIN, NEITHER = (frozenset(words.split()) for words in WORDS.values())


def mode_of_name(name: str) -> Mode | None:
    """The direction in which a metric of that name gets better, by its words; None if they do not say so.

    Words are whole, ``map`` in ``val_mAP@50`` but not in ``val_remap``. A loss of an accuracy is a loss: ``min`` wins.
    """
    words: set[str] = set()
    for part in re.split(r"[^A-Za-z0-9]+", name):
        # CamelCase as in the names of torchmetrics; whole too, for mAP and IoU.
        words.update(word.lower() for word in (part, *re.findall(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*", part)))
    words |= {word.rstrip("0123456789") for word in words}
    if words >= {"c", "index"}:
        words.add("cindex")
    if words >= {"log", "likelihood"} and words & {"neg", "negative"}:
        return "min"
    if words & NEITHER:
        return None
    return "min" if words & MIN else "max" if words & MAX else None


def mode_of(name: str, runs: Sequence[Run] = ()) -> Mode | None:
    """The direction in which a metric gets better: as the runs' ``ModelCheckpoint`` says, else by its name."""
    plain = name.removeprefix("personalized/").removeprefix("global/").removeprefix("local/")
    declared = {run.modes[own] for run in runs for own in {name, plain} & run.modes.keys()}
    return declared.pop() if len(declared) == 1 else mode_of_name(name)


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
        return not is_personal, not is_val, mode_of(name, runs) != "max", shared.index(name)

    return min(shared, key=rank)
