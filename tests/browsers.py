"""A browser for the tests of the page: an installed one, or else one that is installed now."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock
from playwright.sync_api import Browser, sync_playwright
from waiting import LIMIT

NAMES = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser")
DEBIANS = "/usr/bin/chromium"
APPLICATION = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"  # macOS
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
ADVICE = "the page's tests drive a real browser, which could not be installed here: install Chromium or Chrome"


class NoBrowser(Exception):
    """No browser is installed, and none can be installed; the message says what to do."""


@contextmanager
def opened(folder: Path) -> Iterator[Browser]:
    """Yield a running browser; `folder` is shared by all processes of `pytest -n`."""
    with sync_playwright() as playwright:
        found = problem = None
        try:
            found = find_browser(Path(playwright.chromium.executable_path), folder / "browser.lock")
        except NoBrowser as error:
            problem = str(error)
        if problem:  # out of the clause above, which pytest would tell too
            pytest.skip(problem)
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS, timeout=LIMIT * 1000)
        yield browser
        browser.close()


def find_browser(playwrights: Path, lock: Path) -> Path:
    """Return a Chromium or Chrome that starts: an installed one, Playwright's own (at `playwrights`), or Debian's.

    One process at a time downloads a missing browser, and writes the path next to `lock` for the others. Raise
    `NoBrowser` if there is none.
    """
    record = lock.with_suffix(".txt")
    with FileLock(lock, timeout=4 * LIMIT):
        if not record.exists():
            record.write_text(str(_install(playwrights) or ""), encoding="utf-8")
        found = record.read_text(encoding="utf-8")
    if not found:
        raise NoBrowser(ADVICE)
    return Path(found)


def _install(playwrights: Path) -> Path | None:
    for name in (*NAMES, APPLICATION):
        if (path := shutil.which(name)) and succeeds(path, "--version"):
            return Path(path)
    for install in (None, download_playwrights):
        if (install is None or install()) and playwrights.is_file() and succeeds(str(playwrights), "--version"):
            return playwrights
    return Path(DEBIANS) if install_debians() and succeeds(DEBIANS, "--version") else None


def download_playwrights() -> bool:
    """Return whether Playwright could download its browser; a minimal system may lack libraries that it needs."""
    return succeeds(sys.executable, "-m", "playwright", "install", "chromium")


def install_debians() -> bool:
    """Return whether apt has installed a browser."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return False
    words = ["install", "--yes", "--quiet", "--no-install-recommends", "chromium", "fonts-dejavu-core"]
    return succeeds("apt-get", "update", "--quiet") and succeeds("apt-get", *words)


def succeeds(*command: str) -> bool:
    """Return whether a command succeeds; a command that hangs does not."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        return subprocess.run(command, env=environment, capture_output=True, timeout=LIMIT).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
