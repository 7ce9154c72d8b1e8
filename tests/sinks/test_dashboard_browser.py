"""What a reader sees: a real TensorBoard, in a real browser, on files a sink has written."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from feature_probe.reports.report import Report
from feature_probe.sinks import TensorBoardSink

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 60

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not os.path.exists(CHROMIUM), reason=f"no browser at {CHROMIUM}"),
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None, reason="playwright is not installed"
    ),
]


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_runs(address: str, log: Path) -> None:
    """Until TensorBoard has found a run."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{address}/data/runs") as answer:
                if answer.read() != b"[]":
                    return
        except OSError:
            pass
        time.sleep(0.25)
    pytest.fail(f"TensorBoard found no run in {PATIENCE} s:\n{log.read_text()}")


@pytest.fixture(params=["auto", pytest.param("false", marks=pytest.mark.slow)])
def address(
    request: pytest.FixtureRequest, tmp_path: Path, make_report: Callable[..., Report]
) -> Iterator[str]:
    """A TensorBoard, with either of its data loaders, on a run of four reports."""
    sink = TensorBoardSink(tmp_path / "runs" / "mlp")
    for step in (0, 100, 200, 300):
        sink.write(make_report(step))
    sink.close()
    port, log = free_port(), tmp_path / "tensorboard.log"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path / "runs")]
    command += ["--host", "127.0.0.1", "--port", str(port), f"--load_fast={request.param}"]
    with (
        log.open("wb") as stream,
        subprocess.Popen(command, stdout=stream, stderr=stream) as server,
    ):
        try:
            wait_for_runs(f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


@pytest.fixture
def page() -> Iterator[Page]:
    """An empty page of a headless browser."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - may be missing

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            opened = browser.new_page(viewport={"width": 1400, "height": 1000})
            opened.set_default_timeout(PATIENCE * 1000)
            yield opened
        finally:
            browser.close()


def test_the_stock_tabs_show_the_report(address: str, page: Page) -> None:
    """Every tab shows ours: charts by name, drawn curves, the picture, the fan, the table."""
    page.goto(f"{address}/#custom_scalars")
    page.get_by_text("which account agrees best?").wait_for()
    page.get_by_text("accounts of W^T W").wait_for()
    page.locator("vz-line-chart2 path.line, vz-line-chart2 svg path").first.wait_for(
        state="attached"
    )

    page.goto(f"{address}/?tagFilter=feature_probe.heatmaps#timeseries")
    page.get_by_text("feature_probe.heatmaps/cosine/fact").first.wait_for()
    picture = page.locator("image-card img").first
    picture.wait_for()
    page.wait_for_function("document.querySelector('image-card img').naturalWidth === 880")

    page.goto(f"{address}/?tagFilter=feature_probe.heatmaps/verdict#timeseries")
    page.get_by_text("feature_probe.heatmaps/verdict/fact").first.wait_for()
    page.wait_for_function("document.querySelector('image-card img').naturalWidth === 880")

    page.goto(f"{address}/#images")
    page.get_by_text("feature_probe.heatmaps/cosine/nfa^0.5").first.wait_for()
    page.goto(f"{address}/#distributions")
    page.get_by_text("feature_probe.distributions/cosine/fact").first.wait_for()

    page.goto(f"{address}/#text")
    page.get_by_role("heading", name="Step 300: do the layers learn features").wait_for()
    # TensorBoard puts every text into a table of one row: ours is the innermost.
    rows = page.get_by_role("row").filter(has_text="blocks.0.fc_1")
    shown = rows.filter(has_text="(0.30)").last.get_by_role("cell").all_inner_texts()
    assert shown[:3] == ["blocks.0.fc_1", "0.000 (0.30) approaching", "0.010 (0.30) approaching"]
    layer = rows.last.get_by_role("cell").all_inner_texts()
    assert layer[:2] == ["blocks.0.fc_1", "2.5"]
    assert layer[-1] == "approaching"
