"""One colour for each method, in all figures and on the live page. Imports neither pandas nor
plotly."""

from collections.abc import Mapping, Sequence

from testbed.results.names import BASELINE, method_order

BASELINE_COLOUR = "#4d4d4d"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a4fbf")
"""Okabe and Ito's palette, which the colour-blind can tell apart, less its yellow, which paper
swallows."""
DASHES = ("solid", "dash", "dot", "dashdot")

Palette = Mapping[str, Mapping[str, str]]


def palette(methods: Sequence[str]) -> Palette:
    """Line style of each method: {"color", "dash"}; past the last colour the dashes tell methods
    apart."""
    others = [method for method in method_order(methods) if method != BASELINE]
    styles = {
        m: {"color": COLOURS[i % len(COLOURS)], "dash": DASHES[i // len(COLOURS) % 4]}
        for i, m in enumerate(others)
    }
    return {BASELINE: {"color": BASELINE_COLOUR, "dash": "solid"}, **styles}
