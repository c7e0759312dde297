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
    run(folder, *shown, "trainer.max_steps=2", "loss.beta=0.25")
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


def test_rewards_and_kl_are_drawn_side_by_side(page: Any, address: str) -> None:
    page.goto(f"{address}#custom_scalars")
    for title in ("KL (val)", "rewards (train)", "rewards (val)", "log-ratios (train)", "log-ratios (val)"):
        page.get_by_text(title, exact=True).wait_for()
    cards = page.locator("tf-custom-scalar-multi-line-chart-card")
    assert cards.count() == 5
    cards.nth(0).locator("path.line").first.wait_for(state="attached")
    for n in range(1, 5):
        lines = cards.nth(n).locator("path.line")
        lines.nth(2).wait_for(state="attached")
        drawn = lines.evaluate_all("lines => lines.filter(line => /^M.*L/.test(line.getAttribute('d'))).length")
        assert drawn >= 3  # chosen, rejected, and margin or mismatched


def test_rewards_of_both_kinds_are_drawn_as_histograms(page: Any, address: str) -> None:
    page.goto(f"{address}#histograms")
    for kind in ("desirable", "undesirable"):
        page.get_by_text(f"val/rewards/{kind}", exact=True).wait_for()
    shown = page.locator("vz-histogram-timeseries")
    for n in range(2):
        outlines = shown.nth(n).locator("path.outline")
        outlines.nth(2).wait_for(state="attached")
        assert outlines.count() == 3  # before the first step and behind each of two


def test_replies_are_shown_as_text(page: Any, address: str) -> None:
    page.goto(f"{address}#text")
    page.get_by_text("step 2").first.wait_for()
    replies = page.locator("strong").all_inner_texts()
    assert len(replies) == 3 * 2  # as the run has two prompts
    assert all(reply.strip() for reply in replies)


def test_parameters_stand_beside_final_metrics(page: Any, address: str) -> None:
    page.goto(f"{address}#hparams")
    for name in ("loss.beta", "seed", "val/final/loss", "val/final/samples/policy_desirable"):
        page.get_by_text(name, exact=True).first.wait_for()
