"""
What all pictures have in common.
"""

from __future__ import annotations

from typing import Any

BLUE, ORANGE, SAND, GREY = "#3465a4", "#d9822b", "#e9d8a6", "#888888"
DPI = 110


def plain(panel: Any) -> None:
    """No frame, and a faint grid to read heights by."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color=GREY, alpha=0.2)


def legend_above(panel: Any) -> None:
    """A legend beside the title, where it covers nothing."""
    panel.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=2)
