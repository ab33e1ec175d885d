"""
Predicted against measured, both on logarithmic axes.

    plot_predicted(Path("itl.png"), [("NIM", measured_ms, predicted_ms), ...], "ITL")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mock_engine.plot_style import BLUE, DPI, GREY, ORANGE, plain

COLOURS = (BLUE, ORANGE, "#4e9a06", "#75507b")


def plot_predicted(path: Path, pairs: Sequence[tuple[str, float, float]], title: str) -> None:
    """One point a row, coloured by table; the grey lines are no error, and 15 % either way."""
    figure = Figure(figsize=(6, 6), dpi=DPI, layout="constrained")
    panel = figure.subplots()
    values = np.array([pair[1:] for pair in pairs])
    span = np.array([values.min() / 1.3, values.max() * 1.3])
    for factor, style in ((1.0, "-"), (1.15, ":"), (1 / 1.15, ":")):
        panel.plot(span, span * factor, style, color=GREY, linewidth=1)
    for colour, table in zip(COLOURS, dict.fromkeys(pair[0] for pair in pairs), strict=False):
        own = np.array([pair[1:] for pair in pairs if pair[0] == table])
        panel.plot(*own.T, ".", color=colour, markersize=4, label=table)
    panel.set(xscale="log", yscale="log", xlabel="measured, ms", ylabel="simulated, ms", title=title)
    panel.legend(frameon=False)
    plain(panel)
    figure.savefig(path)
