"""``testbed run --live``: a link that is moved on its page is moved in the kernel, and the page
becomes the report."""

import http.client
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import yaml

import testbed

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.netns
SPEC = {
    "name": "live",
    "workers": 2,
    "network": {"link": {"rate": "20mbit"}},
    "workload": {"batch": 32, "stop": {"seconds": 14}, "compute": {"pace": "10ms"}},
    "methods": ["allreduce"],
}
FAST_BPS, SLOW_BPS = 20_000_000, 4_000_000


class Page:
    """The address that the run printed."""

    def __init__(self, url):
        self.address = urlsplit(url)
        self.origin = f"http://{self.address.netloc}"

    def ask(self, name, method="GET", body=None, **headers):
        connection = http.client.HTTPConnection(
            self.address.hostname, self.address.port, timeout=30
        )
        headers = {"Content-Type": "application/json", "Origin": self.origin, **headers}
        connection.request(method, self.address.path + name, body and json.dumps(body), headers)
        return connection.getresponse()

    def events(self):
        answer = self.ask("events")
        while line := answer.readline():
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))


def test_a_slider_moves_the_kernels_limit_and_the_page_becomes_the_report(tmp_path):
    path = tmp_path / "live.yaml"
    path.write_text(yaml.safe_dump(SPEC))
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "testbed.cli",
            "run",
            str(path),
            "--live",
            "--out",
            str(tmp_path / "runs"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    began_s = time.monotonic()
    page = Page(process.stdout.readline().split()[-1])
    (server,) = [
        child
        for child in psutil.Process(process.pid).children()
        if "testbed.live" in child.cmdline()
    ]
    assert server.nice() == 19
    assert page.ask("link", "POST", {}, Origin="http://evil.example").status == 403

    answer, cell, used_s, before_s = None, None, 0.0, 0.0
    for told in page.events():
        if told.get("ended"):
            break
        for name, row in told.get("rows", {}).items():
            if row["state"] == "running" and row["t_s"] > 5 and answer is None:
                cell, before_s = name, row["t_s"]
                response = page.ask(
                    "link", "POST", {"cell": name, "links": [], "set": {"rate": "4mbit"}}
                )
                answer = json.loads(response.read())
        used_s = sum(server.cpu_times()[:2]) if server.is_running() else used_s
    took_s = time.monotonic() - began_s
    report = page.ask("report.html").read().decode()
    out, _ = process.communicate(timeout=60)

    assert process.returncode == 3, out  # what was changed by hand is no evidence for the spec
    assert set(answer["links"]) == {"w0", "w1"}
    assert {
        link["state"][side]["rate_bps"]
        for link in answer["links"].values()
        for side in ("up", "down")
    } == {SLOW_BPS}
    assert "changed by hand" in report and "testbed report" in report
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE, "nothing is left"
    assert used_s < 0.4 + 0.02 * took_s, "to begin takes a little, and then less than 2 % of a core"

    (run,) = (tmp_path / "runs").iterdir()
    loaded = testbed.load_run(run)
    manual = loaded.events[loaded.events["kind"] == "manual"]
    assert set(manual["link"]) == {"w0", "w1"} and manual["verified"].all(), (
        "the kernel was asked, and said so"
    )
    moved_s = manual["applied_s"].max()
    assert moved_s >= before_s - 1
    assert set(loaded.links[loaded.links["t_s"] > moved_s + 0.5]["rate_bps"]) == {SLOW_BPS}
    assert set(loaded.links[loaded.links["t_s"] < moved_s - 0.5]["rate_bps"]) == {FAST_BPS}
    steps = loaded.steps[loaded.steps["cell"] == cell]
    fast = steps[steps["t_s"].between(1, moved_s - 0.5)]["step_s"].median()
    slow = steps[steps["t_s"] > moved_s + 1]["step_s"].median()
    assert slow > 2 * fast, "the throughput follows"
    problems = loaded.summary["cells"][0]["problems"]
    assert len(problems) == 1 and "changed by hand" in problems[0], (
        "the page itself is no reason against a cell"
    )
