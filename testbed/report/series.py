"""From step and link records to series short enough to draw. Times in s after t = 0; rates in
bits/s."""

import numpy as np
import pandas as pd

POINTS = 300
"""A line of more points than this shows nothing more."""
MIN_BIN_S = 0.5


def bin_edges(t_end_s: float) -> np.ndarray:
    """Edges in s of at most ``POINTS`` equal bins that cover 0…``t_end_s``, none shorter than
    ``MIN_BIN_S``."""
    bins = max(1, min(POINTS, int(t_end_s / MIN_BIN_S)))
    return np.linspace(0, t_end_s, bins + 1)


def flow(t_s: np.ndarray, cumulative: np.ndarray, edges_s: np.ndarray) -> np.ndarray:
    """Mean rate per s in each bin of a quantity of which ``cumulative`` had flowed by ``t_s``,
    evenly in between.

    Spreading a step over its duration keeps a slow step from looking like a pause and a peak.
    """
    order = np.argsort(t_s, kind="stable")
    rates: np.ndarray = np.diff(np.interp(edges_s, t_s[order], cumulative[order])) / np.diff(
        edges_s
    )
    return rates


def throughput(steps: pd.DataFrame) -> pd.DataFrame:
    """Samples/s of all ranks of one cell: columns t_s (middle of the bin), samples_per_s."""
    known = steps.dropna(subset=["samples", "t_s"]).sort_values("t_s")
    if known.empty:
        return pd.DataFrame({"t_s": [], "samples_per_s": []}, dtype="float64")
    edges_s = bin_edges(known["t_s"].iloc[-1])
    # Rank by rank: all ranks end a step at nearly the same time, and their samples must not bunch
    # up there.
    rates = [
        flow(np.append(0.0, own["t_s"]), np.append(0.0, own["samples"].cumsum()), edges_s)
        for _, own in known.groupby("rank")
    ]
    return pd.DataFrame(
        {"t_s": (edges_s[1:] + edges_s[:-1]) / 2, "samples_per_s": np.sum(rates, axis=0)}
    )


def by_step(steps: pd.DataFrame) -> pd.DataFrame:
    """Steps of one cell, one row a step: means over ranks, at most ``POINTS`` rows (means of equal
    groups of steps).

    Columns t_s, loss, ratio, payload_bytes, bandwidth_bps, and sent_bytes: what all ranks together
    had sent by then.
    """
    columns = ["t_s", "loss", "ratio", "payload_bytes", "bandwidth_bps"]
    per_step = steps.groupby("step")[columns].mean()
    per_step["sent_bytes"] = steps.groupby("step")["payload_bytes"].sum().cumsum()
    return thin(per_step)


def thin(frame: pd.DataFrame, points: int = POINTS) -> pd.DataFrame:
    """At most ``points`` rows: means of equal groups of neighbours."""
    if len(frame) <= points:
        return frame.reset_index(drop=True)
    return frame.groupby(np.arange(len(frame)) * points // len(frame)).mean().reset_index(drop=True)


def limits(links: pd.DataFrame) -> pd.DataFrame:
    """The tightest limit of all links of one cell over time: columns t_s, rate_bps; one row where
    it changes.

    No row if no link was ever limited; NaN while none is.
    """
    known = links.assign(rate_bps=links["rate_bps"].fillna(np.inf))
    # Links are not sampled at the very same instant: each keeps its limit until its next sample.
    tightest = (
        known.pivot_table(index="t_s", columns=["link", "direction"], values="rate_bps")
        .ffill()
        .min(axis=1)
    )
    if not np.isfinite(tightest).any():
        return pd.DataFrame({"t_s": [], "rate_bps": []}, dtype="float64")
    kept = tightest.ne(tightest.shift())
    kept.iloc[-1] = True
    return tightest[kept].replace(np.inf, np.nan).rename("rate_bps").reset_index()


def carried(links: pd.DataFrame) -> pd.DataFrame:
    """What the links of one cell carried: columns t_s (middle of the bin); mean_bps, min_bps,
    max_bps over them."""
    during = links[links["t_s"] >= 0]
    if during.empty:
        return pd.DataFrame(
            {"t_s": [], "mean_bps": [], "min_bps": [], "max_bps": []}, dtype="float64"
        )
    edges_s = bin_edges(during["t_s"].max())
    rates_bps = np.stack(
        [
            flow(samples["t_s"].to_numpy(), 8 * samples["bytes"].to_numpy(), edges_s)
            for _, samples in during.groupby(["link", "direction"])
        ]
    )
    statistics = {
        "mean_bps": rates_bps.mean(0),
        "min_bps": rates_bps.min(0),
        "max_bps": rates_bps.max(0),
    }
    return pd.DataFrame({"t_s": (edges_s[1:] + edges_s[:-1]) / 2, **statistics})
