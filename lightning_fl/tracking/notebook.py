"""The report of a run in a notebook."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from lightning_fl.tracking.report import render
from lightning_fl.tracking.run import Run


class ReportPage:
    """A report that a notebook displays inline.

    Args:
        page: The HTML of the page.
        height: Its height in pixels.
    """

    def __init__(self, page: str, height: int) -> None:
        self.page, self.height = page, height

    def _repr_html_(self) -> str:
        # In a separate frame, so that the styles of page and notebook don't affect each other.
        return (
            f'<iframe srcdoc="{escape(self.page)}" sandbox style="width: 100%; height: {self.height}px; border: 0">'
            "</iframe>"
        )


def show_report(run: str | Path | Any, height: int = 800) -> ReportPage:
    """The page of ``lightning-fl report`` as the last value of a notebook's cell.

    Args:
        run: The folder of the run, or the Trainer that had the callback :class:`~lightning_fl.callbacks.RunRecord`.
        height: Height in pixels.

    Raises:
        ValueError: If there is no run.
    """
    if not isinstance(run, str | Path):
        paths = [callback.path for callback in run.callbacks if getattr(callback, "path", None) is not None]
        if not paths:
            raise ValueError("The Trainer has no record of a run. Give it callbacks=[fl.callbacks.RunRecord()].")
        run = paths[0]
    return ReportPage(render(Run.read(run)), height)
