"""Pictures of the application for README and docs, a file for each tab, as a visitor of a folder of runs sees them.

    python -m app --runs runs --port 7861                      # in another terminal, with something queued
    python assets/make/app_pictures.py http://127.0.0.1:7861   # Playwright's Chromium, or --browser
    python assets/make/app_pictures.py runs/experiment/report.html    # the numbered picture of a report

A picture shows the run that the page opens with: the one that trains, else the newest.
"""

import argparse
import io
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

SIZE = {"width": 1280, "height": 860}
TABS = ("Images", "Train", "Compare", "Generate", "Runs", "Experiment")
"""The tabs of the page; the last one is inside Compare."""
PARTS = ("h1", "header h1 ~ *", ".chart svg .bar >> nth=2", ".chart svg g:last-of-type .name", "#comparing .pair")
"""Elements of a report that docs/experiments.md explains, in the order of their numbers."""
NUMBER = """(element, number) => {
    const at = element.getBoundingClientRect(), badge = document.createElement("b")
    badge.textContent = number
    badge.style = `position: absolute; left: ${Math.max(2, at.left - 30)}px; width: 26px; line-height: 26px;
        top: ${at.top + Math.min(at.height, 30) / 2 - 13}px; background: #111; color: #fff; text-align: center;
        border-radius: 50%; font-size: 15px`
    document.body.append(badge)
}"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="of the application, or the file of a report")
    parser.add_argument("--browser", help="a Chromium or Chrome that is installed")
    parser.add_argument("--output", type=Path, default=Path("assets/app"))
    return parser.parse_args()


def show(page: Page, tab: str) -> None:
    """Opens a tab, and does what makes it worth a picture."""
    if tab == "Experiment":
        page.get_by_role("tab", name="Compare", exact=True).click()
    page.get_by_role("tab", name=tab, exact=True).click()
    if tab == "Generate":
        page.locator("#generate").click()
        page.locator("#status").get_by_text("images done").wait_for(timeout=120_000)
    if tab == "Train":
        page.locator("#facts dd").first.wait_for(timeout=120_000)
    page.wait_for_timeout(4000)


def take_report(page: Page, report: Path) -> None:
    """Writes assets/report.png: the first screen of a report, with a number at each of PARTS."""
    page.set_viewport_size({"width": 1000, "height": 1060})
    page.goto(report.resolve().as_uri())
    page.evaluate("document.body.style.paddingLeft = '44px'")
    for number, part in enumerate(PARTS, 1):
        page.locator(part).first.evaluate(NUMBER, number)
    save(page, Path("assets/report.png"))


def save(page: Page, path: Path) -> None:
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(path, optimize=True)
    print(path)


def main() -> None:
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.browser, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)
        if args.address.endswith(".html"):
            take_report(page, Path(args.address))
            return
        page.goto(args.address, wait_until="domcontentloaded")
        page.locator("#grid img").first.wait_for()
        for tab in TABS:
            show(page, tab)
            save(page, args.output / f"{tab.lower()}.png")
        browser.close()


if __name__ == "__main__":
    main()
