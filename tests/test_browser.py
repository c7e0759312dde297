"""TensorBoard as a person sees it: a headless Chromium opens a real run.

Skipped where there is no browser, unless HALOS_BROWSER=1 asks for it.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard import program

from halos.reporting.board_report import LAYOUT
from tests.train_runs import run

pytestmark = [pytest.mark.browser, pytest.mark.runs]

DEMANDED = os.environ.get("HALOS_BROWSER") == "1"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SHOWN_IN = 20_000
"""Milliseconds that a chart may take."""

if not DEMANDED:
    pytest.importorskip("playwright", reason="pip install 'halos[browser]'")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where TensorBoard serves a run of two steps."""
    folder = tmp_path_factory.mktemp("browser") / "run"
    shown = ["logger=tensorboard", "sampling.prompts=2", "sampling.size=4", "trainer.val_check_interval=1"]
    shown += ["sampling.kl=true", "sampling.validations=9"]
    # Stratified, so that each step has rewards of both kinds.
    run(folder, *shown, "trainer.max_steps=2", "loss.beta=0.25", "data.stratified=true")
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # its thread goes on when pytest's streams are closed
    server = program.TensorBoard()
    server.configure(argv=[None, "--logdir", str(folder), "--port", "0", "--load_fast", "false"])
    return server.launch()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import Error, sync_playwright

    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        try:
            made = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            if DEMANDED:
                raise
            pytest.skip(f"no browser: {error}")
        yield made
        made.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    made = browser.new_page(viewport={"width": 1500, "height": 900})
    made.set_default_timeout(SHOWN_IN)
    yield made
    if folder := os.environ.get("HALOS_SCREENSHOTS"):
        made.screenshot(path=Path(folder) / f"{made.url.rpartition('#')[2].partition('&')[0]}.png")
    made.close()


def test_the_page_that_opens_shows_kl_and_rewards_first(page: Any, address: str) -> None:
    page.goto(address)
    sections = page.locator("metrics-card-group-toolbar .group-title")
    sections.nth(2).wait_for()
    assert sections.all_inner_texts() == ["alignment", "train", "val"]
    cards = page.locator("metrics-card-groups tb-truncated-path")
    page.locator("metrics-card-groups line-chart").nth(3).wait_for()
    titles = ["".join(title.split()) for title in cards.all_inner_texts()]
    rewards = [f"alignment/rewards/{name}" for name in ("auc", "chosen", "margins", "rejected")]
    assert titles[:6] == ["alignment/kl", *rewards, "alignment/samples/length"]


def test_rewards_and_kl_are_drawn_side_by_side(page: Any, address: str) -> None:
    page.goto(f"{address}#custom_scalars")
    for group in LAYOUT:
        page.get_by_text(group, exact=True).wait_for()
    charts = [chart for charts in LAYOUT.values() for chart in charts.items()]
    cards = page.locator("tf-custom-scalar-multi-line-chart-card")
    cards.nth(len(charts) - 1).wait_for()
    for card, (title, names) in zip(cards.all(), charts, strict=True):
        card.get_by_text(title, exact=True).wait_for()
        card.get_by_text(f"Matches ({len(names)})").wait_for()
        lines = card.locator("path.line")
        lines.nth(len(names) - 1).wait_for(state="attached")
        drawn = lines.evaluate_all("lines => lines.filter(line => /^M.*L/.test(line.getAttribute('d'))).length")
        assert drawn >= len(names)
        marks = card.locator("path.symbol").evaluate_all("marks => new Set(marks.map(m => m.getAttribute('d'))).size")
        assert marks >= len(names)  # curves of one run have one colour, and are told apart by their marks


def test_rewards_of_both_kinds_are_drawn_as_histograms(page: Any, address: str) -> None:
    page.goto(f"{address}#histograms")
    shown = page.locator("vz-histogram-timeseries")
    # Two steps, and for val/ also what was before the first.
    for n, (split, count) in enumerate((("train", 2), ("train", 2), ("val", 3), ("val", 3))):
        page.get_by_text(f"{split}/rewards/{('desirable', 'undesirable')[n % 2]}", exact=True).wait_for()
        outlines = shown.nth(n).locator("path.outline")
        outlines.nth(count - 1).wait_for(state="attached")
        assert outlines.count() == count


def test_replies_before_and_after_are_shown_as_tables(page: Any, address: str) -> None:
    page.goto(f"{address}#text")
    page.get_by_text("step 2").first.wait_for()
    tables = page.locator("table table")  # TensorBoard has a table of steps
    assert tables.count() == 3
    for table in tables.all():
        words = [row.split("\t") for row in table.inner_text().splitlines() if row.strip()]
        assert words[0] == ["prompt", "before: the reference's reply", "after: the policy's reply"]
        assert [len(row) for row in words] == [3, 3, 3]  # the run has two prompts
        assert all("<|user|>" in row[0] and row[1].strip() and row[2].strip() for row in words[1:])


def test_parameters_stand_beside_final_metrics(page: Any, address: str) -> None:
    page.goto(f"{address}#hparams")
    for name in ("loss.beta", "loss.name", "model.path", "optim.lr", "seed", "val/kl"):
        page.locator("tf-hparams-table-view").get_by_text(name, exact=True).first.wait_for()
    page.get_by_text("val/final/samples/policy_desirable", exact=True).first.wait_for(state="attached")
