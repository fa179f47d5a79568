"""Records of a cell under time dilation: in the time of the experiment, and in that of the
machine."""

from collections.abc import Mapping
from typing import Any

import pandas as pd


def undilated(
    table: pd.DataFrame, factors: Mapping[str, float], *, inverse: bool = False
) -> pd.DataFrame:
    """A table of records with times (``*_s``) divided and rates (``*_bps``) multiplied by the
    factor of each row's cell.

    factors: by name of the cell. inverse: what the clocks said, from what was reported.
    """
    factor = table["cell"].map(factors).fillna(1.0).astype(float)
    if (factor == 1).all():
        return table
    if inverse:
        factor = 1 / factor
    scaled: dict[str, Any] = {
        name: table[name] / factor if name.endswith("_s") else table[name] * factor
        for name in table.columns
        if name.endswith(("_s", "_bps"))
    }
    return table.assign(**scaled)
