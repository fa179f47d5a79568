"""The page and the terminal table: whatever the run looks like, they are complete, honest and
self-contained."""

import html
import io
import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tensorboardX.proto import event_pb2
from typer.testing import CliRunner

from testbed.cli import app
from testbed.plan import make_plan
from testbed.report import series, text
from testbed.report.figures import figures
from testbed.report.html import render, write_report
from testbed.report.palette import palette
from testbed.report.terminal import terminal_table
from testbed.results.load import Run, load_run
from testbed.results.summary import summarize, write_summary
from testbed.run.progress import RunProgress
from testbed.spec.load import load_spec
from tests.testbed.synthetic_run import append, steps_file, write_cell, write_run

ALL_FIGURES = [
    "throughput",
    "compression",
    "loss_over_time",
    "loss_over_bytes",
    "accuracy",
    "accuracy_over_bytes",
    "breakdown",
    "sensing",
    "links",
]
SMOKE = Path(__file__).parents[2] / "experiments" / "smoke.yaml"
MISCHIEF = "</script><img src=x onerror=alert(1)>"


def on_terminal(run: Run, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table(summarize(run)))
    return console.export_text()


def rendered(path: Path) -> str:
    return render(run := load_run(path), summarize(run))


def reported(path: Path) -> None:
    write_report(run := load_run(path), path / "report.html", summarize(run))


def visible(page: str) -> str:
    """The text of a page without its packed data."""
    return html.unescape(
        re.sub(r'<script type="text/plain".*?</script>', "", page, flags=re.DOTALL)
    )


# Series


@given(
    st.lists(st.tuples(st.floats(0.01, 5), st.floats(0, 1e6)), min_size=1, max_size=50),
    st.integers(1, 100),
)
def test_flow_loses_nothing(steps: list[tuple[float, float]], bins: int) -> None:
    durations_s, amounts = map(np.array, zip(*steps, strict=True))
    t_s, cumulative = np.append(0, durations_s.cumsum()), np.append(0, amounts.cumsum())
    edges_s = np.linspace(0, t_s[-1], bins + 1)
    rates = series.flow(t_s, cumulative, edges_s)
    assert (rates * np.diff(edges_s)).sum() == pytest.approx(amounts.sum())
    assert (rates >= 0).all()


def test_a_slow_step_is_spread_over_its_duration() -> None:
    times_s = [1.0, 1.01, 2.0, 2.01, 12.0, 12.01]
    steps = pd.DataFrame(
        {"rank": [0, 1] * 3, "t_s": times_s, "samples": [10, 10, 10, 10, 100, 100]}
    )
    assert series.throughput(steps)["samples_per_s"].to_numpy() == pytest.approx(20, rel=0.03)


def test_the_tightest_limit_has_a_row_where_it_changes() -> None:
    links = pd.DataFrame(
        [
            (0.0, "w0", 50.0),
            (0.01, "w1", 40.0),
            (1.0, "w0", 10.0),
            (1.01, "w1", 40.0),
            (2.0, "w0", None),
            (2.01, "w1", None),
        ],
        columns=["t_s", "link", "rate_bps"],
    ).assign(direction="up")
    limits = series.limits(links)
    assert limits["t_s"].tolist() == [0.0, 0.01, 1.0, 2.0, 2.01]
    assert limits["rate_bps"].tolist()[:4] == [50.0, 40.0, 10.0, 40.0]
    assert np.isnan(limits["rate_bps"].iloc[-1])


@given(st.integers(0, 3000), st.integers(1, 500))
def test_thinning_keeps_the_mean_and_the_number_of_points(rows: int, points: int) -> None:
    frame = pd.DataFrame({"x": np.arange(rows, dtype=float)})
    thin = series.thin(frame, points)
    assert len(thin) == min(rows, points)
    assert thin["x"].is_monotonic_increasing


# Words


def test_numbers_as_people_read_them() -> None:
    space = text.SPACE
    assert [text.si(v, "B") for v in (480_000, 0, 1.5e9, None)] == [
        f"480{space}kB",
        f"0{space}B",
        f"1.5{space}GB",
        "–",
    ]
    assert [text.si(v, "s") for v in (0.0123, 999.9, 1e-12)] == [
        f"12.3{space}ms",
        f"1e+03{space}s",
        f"0.001{space}ns",
    ]
    assert [text.times(v) for v in (0.5, 2.513, 12.34, 123.4, None)] == [
        "0.50×",
        "2.51×",
        "12.3×",
        "123×",
        "–",
    ]
    assert text.interval([2.5, 2.6]) == "2.50–2.60×" and text.interval([None, None], "x") == ""


def summary(valid: bool = True, **ratios: list[float]) -> dict[str, Any]:
    """A summary in which each method has these throughput ratios, one a set of overrides."""
    comparisons = [
        {
            "baseline": "allreduce",
            "method": m,
            "overrides": {"i": i},
            "throughput_ratio": r,
            "ci95": [None, None],
        }
        for m, found in ratios.items()
        for i, r in enumerate(found)
    ]
    return {"valid": valid, "cells": [], "comparisons": comparisons}


def test_headline() -> None:
    assert (
        text.headline(summary(netsense=[4.071], topk=[2.0]))
        == "netsense trained 4.07× as many samples per second as allreduce."
    )
    assert (
        text.headline(summary(netsense=[1.5, 9.0], topk=[2.0, 2.0]))
        == "netsense trained 1.50× to 9.00× as many samples per second as allreduce under 2 sets of"
        " conditions."
    )
    assert text.headline(summary(topk=[0.4])).startswith(
        "No method beat allreduce: the nearest, topk, trained 0.40×"
    )
    assert text.headline(summary(valid=False, topk=[2.0])).startswith("Not a valid run")


def test_headline_without_a_comparison_has_one_span_a_method() -> None:
    def cell(i: int, rate: float | None) -> dict[str, Any]:
        unknown = dict.fromkeys(
            ("step_s_median", "encode_s_median", "payload_bytes_per_step", "lost_energy")
        )
        unknown |= dict.fromkeys(("final_accuracy", "final_loss", "time_to_target_s"))
        return {
            "method": "bf16",
            "overrides": {"i": i},
            "valid": True,
            "throughput_samples_per_s": rate,
            **unknown,
        }

    cells = [cell(0, 52.0), cell(1, 52.01), cell(2, 168.2), cell(3, None)]
    for count, words in (
        (1, "bf16 trained 52 samples/s."),
        (2, "bf16 trained 52 samples/s under 2 sets of conditions."),
        (4, "bf16 trained 52 to 168 samples/s under 3 sets of conditions."),
    ):
        assert text.headline({"valid": True, "cells": cells[:count], "comparisons": []}) == words


def test_progress_in_a_log_is_one_line_a_report() -> None:
    (cell,) = make_plan(load_spec(SMOKE, ["methods=[{name: bf16, label: " + 60 * "x" + "}]"])).cells
    log = io.StringIO()
    console = Console(file=log, width=80)
    with RunProgress(console, 1, 1) as progress:
        progress.begin(cell)
        progress.end("done, 12 steps in 15.0 s")
    assert log.getvalue().splitlines() == [
        f"[1/1] {cell.name}: starting 4 workers",
        f"[1/1] {cell.name}: done, 12 steps in 15.0 s",
    ]


def test_the_baseline_and_each_method_look_different() -> None:
    styles = palette(["topk", "allreduce", *map(str, range(20))])
    looks = {(style["color"], style["dash"]) for style in styles.values()}
    assert len(looks) == len(styles) == 22


# Figures and pages


def test_all_figures_of_a_whole_run(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", seeds=2))
    [(name, drawn)] = figures(run, summarize(run)).items()
    assert name == "" and list(drawn) == ALL_FIGURES
    lines = [trace for trace in drawn["throughput"].data if trace.name == "netsense"]
    assert len(lines) == 2 and sum(trace.showlegend for trace in lines) == 1


def killed_at_once(path: Path) -> None:
    (write_run(path, methods=()) / "cells" / "c").mkdir(parents=True)


def without_anything_optional(path: Path) -> None:
    write_run(path, methods=())
    cell = write_cell(path / "cells" / "c", "mine", evaluated=False, t_end_s=1.0)
    for file in (*cell.glob("hosts/*/steps.jsonl"), cell / "links.jsonl", cell / "events.jsonl"):
        file.unlink()
    append(steps_file(cell, 0), [{"rank": 0, "step": 0, "t_s": 1.0, "step_s": 1.0}])


@pytest.mark.parametrize(
    ("make", "drawn"),
    [
        (lambda path: write_run(path, methods=()), None),
        (killed_at_once, []),
        (without_anything_optional, []),
        (lambda path: write_run(path, methods=("topk",)), ALL_FIGURES),
        (lambda path: write_run(path, methods=("topk",), killed=True), ALL_FIGURES),
        (
            lambda path: write_run(path, evaluated=False),
            [name for name in ALL_FIGURES if not name.startswith("accuracy")],
        ),
    ],
)
def test_a_run_of_any_kind_has_a_page_and_a_table(
    tmp_path: Path, make: Any, drawn: list[str] | None
) -> None:
    make(tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert [list(group) for group in figures(run, summarize(run)).values()] == (
        [] if drawn is None else [drawn]
    )
    assert "drop" in visible(render(run, summarize(run)))
    assert on_terminal(run)


def test_an_invalid_cell_is_marked_in_every_output(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", seeds=3)
    spoilt = path / "cells" / "topk-s1" / "result.json"
    spoilt.write_text(
        json.dumps({**json.loads(spoilt.read_text()), "parameters": {"0": "a", "1": "b"}})
    )
    run = load_run(path)
    write_summary(summarize(run), path)
    reason = "the replicas ended with different parameters"
    written = json.loads((path / "summary.json").read_text())
    assert not written["valid"] and written["problems"] == [f"topk-s1: {reason}"]
    assert [c["valid"] for c in written["comparisons"]] == [True, False]
    assert reason in (path / "summary.csv").read_text()
    terminal = on_terminal(run)
    assert (
        f"topk-s1: {reason}" in terminal and "invalid" in terminal and "Not a valid run" in terminal
    )
    page = visible(render(run, summarize(run)))
    assert f"topk-s1: {reason}" in page and "not valid" in page and "Not a valid run" in page
    # In the table of results and in the table of cells, and nowhere else.
    assert page.count('<tr class="bad">') == 3


def test_terminal_table_fits_80_columns(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", seeds=3, overrides={"network.link.rate": "50mbit"})
    for seed in range(3):
        write_cell(path / "cells" / f"long-{seed}", "topk-0.1-[bold]", seed, killed=True)
    lines = on_terminal(load_run(path)).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("netsense" in line and "×" in line and "valid" in line for line in lines)
    assert "[bold]" in "".join(lines)


def test_what_users_wrote_is_escaped(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", methods=())
    (path / "spec.yaml").write_text(
        json.dumps({"name": MISCHIEF, "workload": {"model": MISCHIEF, "data": MISCHIEF}})
    )
    (path / "environment.json").write_text(json.dumps({MISCHIEF: {MISCHIEF: [MISCHIEF]}}))
    write_cell(
        path / "cells" / "c",
        MISCHIEF,
        overrides={MISCHIEF: MISCHIEF},
        result={"problems": [MISCHIEF]},
    )
    page = rendered(path)
    assert "<img" not in page
    assert page.count("</script>") == 3  # the two packs and the program


def test_page_refers_to_nothing_outside(tmp_path: Path) -> None:
    page = rendered(write_run(tmp_path / "run"))
    assert set(re.findall(r"""(?:src|href|action)\s*=\s*["']?([^"' >]+)""", page)) == {"data:,"}
    assert "@import" not in page and "url(" not in page


def test_page_of_a_long_sweep_stays_small(tmp_path: Path) -> None:
    """7 methods with 8 workers and thousands of steps each: under 5 MB, and drawn without every
    point."""
    path = write_run(tmp_path / "run", methods=())
    for number in range(7):
        write_cell(path / "cells" / f"c{number}", f"method{number}", t_end_s=100.0, workers=8)
    reported(path)
    assert (path / "report.html").stat().st_size < 5e6
    assert not (path / "report.html.tmp").exists()


@pytest.mark.chromium
def test_page_opens_without_network_and_draws_everything(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", seeds=2)
    write_cell(path / "cells" / "odd", MISCHIEF, overrides={"workers": 2})
    reported(path)
    chromium = shutil.which("chromium")
    assert chromium is not None
    command = [
        *(
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
        ),
        *(
            "--proxy-server=127.0.0.1:9",
            "--enable-logging=stderr",
            "--v=0",
            "--virtual-time-budget=30000",
            "--dump-dom",
        ),
        (path / "report.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, [
        line for line in done.stderr.splitlines() if "CONSOLE" in line
    ]
    expected = sum(map(len, figures(run := load_run(path), summarize(run)).values()))
    assert f'data-drawn="{expected}"' in done.stdout
    assert len(re.findall(r'class="plot js-plotly-plot"', done.stdout)) == expected
    assert "<img" not in done.stdout


def test_tensorboard_gets_every_step_and_evaluation(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", methods=("allreduce", "netsense"))
    done = CliRunner().invoke(
        app, ["report", str(directory), "--tensorboard", str(tmp_path / "events")]
    )
    assert done.exit_code in (0, 3), done.output
    run = load_run(directory)
    assert sorted(path.name for path in (tmp_path / "events").iterdir()) == sorted(
        run.cells["cell"]
    )
    [file] = (tmp_path / "events" / "netsense-s0").iterdir()
    steps = run.steps[(run.steps["cell"] == "netsense-s0") & (run.steps["rank"] == 0)].set_index(
        "step"
    )
    scalars = {
        (value.tag, event.step): (value.simple_value, event.wall_time)
        for event in read_events(file)
        for value in event.summary.value
    }
    for step, row in steps.iterrows():
        assert scalars["step/comm_s", step] == pytest.approx((row["comm_s"], row["t_s"]))
    CliRunner().invoke(app, ["report", str(directory), "--tensorboard", str(tmp_path / "events")])
    # or every point would be there twice
    assert len(list((tmp_path / "events" / "netsense-s0").iterdir())) == 1
    (tmp_path / "file").touch()
    refused = CliRunner().invoke(
        app, ["report", str(directory), "--tensorboard", str(tmp_path / "file")]
    )
    assert refused.exit_code == 2 and "Traceback" not in refused.output
    no_run = CliRunner().invoke(
        app, ["report", str(tmp_path / "no run"), "--tensorboard", str(tmp_path / "none")]
    )
    assert no_run.exit_code == 2 and not (tmp_path / "none").exists()  # nothing was touched
    tested = run.evals[run.evals["cell"] == "netsense-s0"]
    assert {step for tag, step in scalars if tag == "test/accuracy"} == set(tested["step"])


def read_events(file: Path) -> Iterator[Any]:
    """TFRecord: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    data = file.read_bytes()
    while data:
        (length,) = struct.unpack_from("<Q", data)
        yield event_pb2.Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_tensorboard_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.delitem(sys.modules, "testbed.report.tensorboard", raising=False)
    directory = write_run(tmp_path / "run", methods=("allreduce",))
    done = CliRunner().invoke(
        app, ["report", str(directory), "--tensorboard", str(tmp_path / "events")]
    )
    assert done.exit_code == 4
    assert "pip install tensorboardX" in done.output
