"""The committed pages in a real browser: Debian's package `chromium`, driven by Playwright."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from phasegate.report.figures import FIGURES

REPORTS = Path(__file__).parent.parent / "reports"
PAGES = [REPORTS / "report.html", *sorted(REPORTS.glob("*/report.html"))]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LOWEST_CONTRAST = """() => {
    const parse = text => text.match(/[\\d.]+/g).map(Number);
    const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const background = element => {
        for (; element; element = element.parentElement) {
            const colour = parse(getComputedStyle(element).backgroundColor);
            if (colour.length < 4 || colour[3] > 0) return colour;
        }
        return [255, 255, 255];
    };
    const texts = [...document.querySelectorAll("h1, h2, h3, p, li, td, th, figcaption, span")]
        .filter(element => element.textContent.trim() && element.getClientRects().length);
    return Math.min(...texts.map(element => {
        const [a, b] = [parse(getComputedStyle(element).color), background(element)].map(luminance);
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    }));
}"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


def opened(browser: Browser, path: Path, **how: Any) -> tuple[Page, list[str]]:
    """A page after loading, with its complaints and requests."""
    page = browser.new_page(viewport={"width": 1200, "height": 900}, **how)
    noted: list[str] = []
    page.on("console", lambda message: noted.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: noted.append(str(error)))
    page.on("request", lambda request: noted.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_load_state("networkidle")
    return page, noted


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.parent.name)
def test_the_page_is_one_quiet_file_with_every_figure_in_sight(browser: Browser, path: Path) -> None:
    page, noted = opened(browser, path)
    assert noted == [path.as_uri()]
    assert path.stat().st_size <= 3_300_000
    figures, drawn = page.locator("figure svg").all(), path.parent / "figures"
    assert len(figures) == len(FIGURES) == len(list(drawn.glob("*.svg"))) == len(list(drawn.glob("*.png")))
    for figure in figures:
        box = figure.bounding_box()
        assert box and box["width"] > 300 and box["height"] > 100
    assert all(caption.inner_text() for caption in page.locator("figcaption").all())
    for width in (1200, 390):  # nothing makes it scroll sideways
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_colour_schemes(browser: Browser, scheme: str) -> None:
    page, _ = opened(browser, PAGES[0], color_scheme=scheme)
    assert page.evaluate(LOWEST_CONTRAST) >= 4.5  # WCAG 2.2, level AA
    red = page.evaluate("parseInt(getComputedStyle(document.body).backgroundColor.slice(4))")
    assert (red < 128) == (scheme == "dark")
