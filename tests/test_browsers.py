"""The browser of the page's tests, on machines that have one, can install one, or cannot."""

import time
from pathlib import Path

import browsers
import pytest
from browsers import NoBrowser, find_browser
from waiting import join, start_thread

DOWNLOAD = "playwright install chromium"
APT = ["apt-get update", "apt-get install"]


class Machine:
    """A stand-in for a machine: its programs, which of them start, and what an installation adds."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.playwrights, self.lock = folder / "chrome", folder / "lock"
        self.programs, self.broken, self.installs, self.ran, self.root = set(), set(), set(), [], True
        monkeypatch.setattr(browsers.shutil, "which", lambda name: name if name in self.programs else None)
        monkeypatch.setattr(browsers.os, "geteuid", lambda: 0 if self.root else 1000)
        monkeypatch.setattr(browsers, "succeeds", self.succeeds)

    def succeeds(self, *command: str) -> bool:
        if command[1:] == ("--version",):
            return command[0] not in self.broken
        self.ran.append(" ".join(command))
        if self.ran[-1].endswith(DOWNLOAD) and "playwright" in self.installs:
            time.sleep(0.05)
            self.playwrights.touch()
            return True
        if "apt" in self.installs and "install --yes" in self.ran[-1]:
            self.programs.add(browsers.DEBIANS)
        return "apt" in self.installs and command[0] == "apt-get"

    def find(self) -> str:
        return str(find_browser(self.playwrights, self.lock))


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["chromium", "google-chrome", "google-chrome-stable", "chromium-browser"])
def test_an_installed_browser_is_taken_and_nothing_installed(machine, name):
    machine.programs, machine.installs = {name, "apt-get"}, {"playwright", "apt"}
    assert machine.find() == name and not machine.ran


def test_without_one_playwrights_own_is_downloaded_once(machine):
    machine.programs, machine.installs = {"apt-get"}, {"playwright", "apt"}
    assert machine.find() == str(machine.playwrights) == machine.find()
    assert len(machine.ran) == 1 and machine.ran[0].endswith(DOWNLOAD)


@pytest.mark.parametrize("lacking", ["network", "libraries"])
def test_where_playwrights_own_cannot_be_had_or_does_not_start_debians_is_installed(machine, lacking):
    machine.programs = {"apt-get"}
    machine.installs = {"apt"} if lacking == "network" else {"apt", "playwright"}
    machine.broken = {str(machine.playwrights)}
    assert machine.find() == browsers.DEBIANS
    assert [" ".join(line.split()[:2]) for line in machine.ran[1:]] == APT


@pytest.mark.parametrize("case", ["nothing helps", "not root", "no apt", "apt's does not start"])
def test_where_nothing_helps_one_line_says_what_to_install(machine, case):
    machine.programs = set() if case == "no apt" else {"apt-get"}
    machine.installs = set() if case == "nothing helps" else {"apt"}
    machine.root, machine.broken = case != "not root", {browsers.DEBIANS} if case == "apt's does not start" else set()
    with pytest.raises(NoBrowser, match="install Chromium or Chrome") as error:
        machine.find()
    assert "\n" not in str(error.value)
    assert case not in ("not root", "no apt") or not [line for line in machine.ran if line.startswith("apt-get")]


def test_an_installed_browser_that_does_not_start_is_passed_over(machine):
    machine.programs, machine.broken, machine.installs = {"chromium-browser"}, {"chromium-browser"}, {"playwright"}
    assert machine.find() == str(machine.playwrights)


def test_two_at_a_time_install_once(machine):
    machine.installs = {"playwright"}
    found = []
    join(*[start_thread(lambda: found.append(machine.find())) for _ in range(2)])
    assert found == [str(machine.playwrights)] * 2 and len(machine.ran) == 1


def test_a_command_that_fails_hangs_or_is_missing_is_no_success(monkeypatch):
    assert browsers.succeeds("true") and not browsers.succeeds("false") and not browsers.succeeds("no-such-program")
    monkeypatch.setattr(browsers, "LIMIT", 0.05)
    assert not browsers.succeeds("sleep", "1000")
