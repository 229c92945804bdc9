"""Render the queue and the list of runs as HTML; `rows.js` handles the buttons. All names are escaped."""

import contextlib
import time
from collections.abc import Hashable, Iterator
from pathlib import Path

from reslora.formatting import pluralize
from reslora.options.values import listed

from . import form, launcher
from .activity import activity_of, why_ended
from .bases import DEFAULT, bundled
from .folders import BUNDLED
from .jobs import GONE, RUNNING, WAITING, Entry, Jobs
from .library import Experiment, LanguageRun, language_script, last_change
from .run_manager import RunManager
from .runs import LONGEST_NOTES, NO_CONFIG, NOTES, Run, RunError, cached_by, stamp_of
from .views import NAMES, bad, embedded, escape, notice

MOST = 48
"""Maximum number of runs' cards on the page; the search field finds the other runs."""
NOTHING_QUEUED = (
    "Nothing is running or waiting. A training that you start under Train while another one runs waits here."
)


SHOWN = {"model": "model", "rank": "rank", "learning_rate": "learning rate", "seed": "seed", "max_train_steps": "steps"}
"""Labels of the settings that each row of the queue shows."""


def button(what: str, label: str, name: str) -> str:
    """Return a button of a row as HTML.

    `what`: the action that `rows.js` sends. `label`: the visible text. `name`: the accessible label."""
    return f'<button type="button" data-do="{what}" aria-label="{escape(name)}">{label}</button>'


def badge(status: str) -> str:
    """Return a status, such as `running`, as a badge in HTML."""
    return f'<b class="status {status}">{status}</b>'


# -- the queue ---------------------------------------------------------------------------------------------------------


def queue(jobs: Jobs) -> str:
    """Return the running, waiting and failed entries, each with a button that stops or removes it, as HTML."""
    try:
        entries = jobs.entries()
    except RunError as error:
        return bad(str(error))
    if not entries:
        return notice(NOTHING_QUEUED)
    order = [RUNNING, WAITING]
    shown = sorted(entries, key=lambda entry: order.index(entry.state) if entry.state in order else len(order))
    return f'<ol class="queue" aria-label="Queue">{"".join(row(jobs, entry) for entry in shown)}</ol>'


def row(jobs: Jobs, entry: Entry) -> str:
    """Return an entry of the queue as HTML."""
    name, run, runs = entry.name, jobs.run_of(entry), entry.state == RUNNING
    action = button("stop", "Stop", f"Stop {name} and save") if runs else button("remove", "Remove", f"Remove {name}")
    facts = " &middot; ".join(escape(fact) for fact in facts_of(entry, run) if fact)
    return (
        f'<li data-name="{escape(name)}"><div class="what-runs"><b class="name">{escape(name)}</b> '
        f"{badge(jobs.status(run) if runs else entry.state)}<p>{facts}</p></div>"
        f'<div class="buttons">{action}</div></li>'
    )


def facts_of(entry: Entry, run: Run) -> list[str]:
    """Return the settings and the state of an entry of the queue as short texts, some of which may be empty."""
    methods = entry.settings.get("method")
    names = ", ".join(NAMES[name] for name in methods if name in NAMES) if isinstance(methods, list) else ""
    facts = ["resume" if entry.resume else "", entry.kind if entry.kind != "run" else "", names]
    settings = settings_of(entry, run)
    given = {label: settings.get(name) for name, label in SHOWN.items()}
    facts += [f"{label} {str(value)[:40]}" for label, value in given.items() if value not in (None, "")]
    images = entry.folder if entry.folder in (None, BUNDLED) else f"images: {entry.folder}"
    facts += [images or ""]
    if entry.state != RUNNING:
        return [*facts, entry.line]
    return [*facts, activity_of(run) if run.folder.is_dir() else GONE]


def settings_of(entry: Entry, run: Run) -> dict[str, object]:
    """Return an entry's settings; those not given are the values of its run or, before it starts, the defaults."""
    given = {name: value for name, value in entry.settings.items() if value not in launcher.EMPTY}
    named = given.get("model", DEFAULT)
    if run.config:
        config: dict[str, object] = {name: " ".join(map(str, listed(run.config.get(name)))) for name in SHOWN}
        base = run.word(form.MODEL) or ""
        return config | {"model": bundled(base) or base} | given
    if entry.resume:  # its run was removed, and so are its settings
        return given
    return form.defaults({form.MODEL: named, "optimizer": given.get("optimizer")}) | {"model": named} | given


# -- the runs ----------------------------------------------------------------------------------------------------------


def runs(manager: RunManager, words: str) -> str:
    """Return as HTML the newest runs and experiments whose name or notes contain `words`, and the trash."""
    words = words.casefold()
    everything = [
        run for run in manager.library.everything() if words in run.name.casefold() or words in run.notes.casefold()
    ]
    cards = "".join(card(manager, run) for run in everything[:MOST])
    found = f'<div class="runs">{cards}</div>' if cards else notice("No name and no notes of a run contain this.")
    if (more := len(everything) - MOST) > 0:
        found += notice(f"{more:,} older runs are not shown: find them by the search field above.")
    return found + trash(manager)


def state_of(manager: RunManager, run: Run) -> Hashable:
    """Return a value that changes if the run's card has to be rendered again."""
    jobs = manager.jobs
    status = jobs.status(run) if jobs.is_active(run) else ""
    stamps = (stamp_of(run.folder / name) for name in (".", NOTES, *run.methods))
    return manager, run, status, last_change(run.folder), *stamps


@cached_by(state_of, 4 * MOST)
def card(manager: RunManager, run: Run) -> str:
    """Return a run's card as HTML: newest sample, status, time of the last change, and notes."""
    name, status, owned = escape(run.name), manager.jobs.status(run), manager.library.owns(run)
    done, total = run.progress
    kind, script = isinstance(run, Experiment), language_script(run)
    facts = [
        "experiment" if kind else ", ".join(NAMES[method] for method in run.methods),
        f"a language model, by {script}" if script else "",
        f"{done:,} of {pluralize(total, 'run' if kind else 'step')}" if total else "",
        NO_CONFIG if run.unreadable else "",
    ]
    why = why_ended(run, status, manager.jobs.last_line(run))
    opens = f"Open {run.name} under Compare"
    buttons = "" if isinstance(run, LanguageRun) else button("open", "Open", opens)
    buttons += button("trash", "Delete", f"Move {run.name} to the trash") if owned else ""
    notes = (
        f'<textarea rows="2" maxlength="{LONGEST_NOTES}" aria-label="notes on {name}" data-was="{escape(run.notes)}" '
        f'placeholder="no notes">\n{escape(run.notes)}</textarea><p class="told" role="status"></p>'
    )
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(last_change(run.folder)))
    return (
        f'<div class="run" role="group" aria-label="{name}" data-name="{name}">{picture(run)}'
        f'<p class="name" title="{name}">{name}</p><p>{badge(status)} <span class="when">{since}</span></p>'
        f"<p>{escape(' · '.join(filter(None, facts)))}</p>{bad(why)}{notes if owned else ''}"
        f'<div class="buttons">{buttons}</div></div>'
    )


def picture(run: Run) -> str:
    """Return as HTML the newest sample of the last method that has a readable sample."""
    for path in newest_samples(run):
        with contextlib.suppress(Exception):  # such as a damaged image
            return f'<img {embedded(path)} alt="newest sample of {escape(run.name)}">'
    return '<div class="empty">no samples</div>'


def newest_samples(run: Run) -> Iterator[Path]:
    """Yield one sample per method, from the last method to the first: the first image of the method's newest step.

    For an experiment, yield a sample of each chosen run at its chosen step.
    """
    if isinstance(run, Experiment):
        yield from run.chosen_samples()
    steps = list(reversed(run.steps()))
    for method in reversed(run.methods):
        samples = next((images for step in steps if (images := run.samples(method, step))), {})
        yield from list(samples.values())[:1]


def trash(manager: RunManager) -> str:
    """Return as HTML the runs in the trash, each with a button that restores it."""
    found = manager.trashed()
    if not found:
        return ""
    rows = "".join(
        f'<li data-name="{escape(place)}"><span>{escape(folder.name)}</span> {thrown(place)} '
        f"{button('restore', 'Restore', f'Restore {folder.name}')}</li>"
        for place, folder in found.items()
    )
    return (
        f'<h4>Trash</h4><ul class="trash" aria-label="Trash">{rows}</ul>'
        "<p>Deleted runs use disk space until you remove <code>.trash</code> from the folder of runs.</p>"
    )


def thrown(place: str) -> str:
    """Return the time when a run was moved to the trash; `place` is the name of the run's folder in the trash."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.strptime(place[:15], "%Y%m%d-%H%M%S"))
    except ValueError:
        return ""
