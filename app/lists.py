"""Render the queue and the list of runs as HTML; `rows.js` handles the buttons. All names are escaped."""

import contextlib
import time
from collections.abc import Hashable, Iterator
from pathlib import Path

from reslora.formatting import pluralize
from reslora.methods.registry import METHODS
from reslora.options.values import listed
from reslora.runtime.log import of_split

from . import form, launcher
from .activity import activity_of, why_ended
from .bases import DEFAULT, bundled
from .folders import BUNDLED
from .jobs import RUNNING, WAITING, Entry, Jobs
from .library import Experiment, last_change
from .run_manager import RunManager
from .runs import LONGEST_NOTES, NO_CONFIG, NOTES, Run, RunError, cached_by, stamp_of
from .views import bad, embedded, escape, notice

MOST = 48
"""Maximum number of runs' cards on the page; the search field finds the other runs."""
SAMPLES = 4
"""Maximum number of samples on a card."""
NO_SAMPLES = '<div class="empty">no samples</div>'


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
        return notice("The queue is empty. A training that you start under Train while another one runs waits here.")
    shown = sorted(entries, key=lambda entry: (entry.ends, entry.state == WAITING))
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
    names = ", ".join(METHODS[name].title for name in methods if name in METHODS) if isinstance(methods, list) else ""
    facts = ["resume" if entry.resume else "", entry.kind if entry.kind != "run" else "", names]
    settings = settings_of(entry, run)
    for name, label in SHOWN.items():
        if (value := settings.get(name)) not in (None, ""):
            facts.append(f"{label} {str(value)[:40]}")
    images = entry.folder if entry.folder in (None, BUNDLED) else f"images: {entry.folder}"
    return [*facts, images or "", activity_of(run) if entry.state == RUNNING else entry.line]


def settings_of(entry: Entry, run: Run) -> dict[str, object]:
    """Return an entry's settings; those not given are the values of its run or, before it starts, the defaults."""
    given = {name: value for name, value in entry.settings.items() if value not in launcher.EMPTY}
    named = given.get("model", DEFAULT)
    if entry.resume or run.config:
        return shown_settings(run) | given
    return form.defaults({form.MODEL: named, "optimizer": given.get("optimizer")}) | {"model": named} | given


def shown_settings(run: Run) -> dict[str, object]:
    """Return the settings of a run that its row in the queue shows."""
    base = run.word(form.MODEL) or ""
    return {name: " ".join(map(str, listed(run.config.get(name)))) for name in SHOWN} | {"model": bundled(base) or base}


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
    """Return a run's card as HTML: newest samples, status, time of the last change, steps and losses, and notes."""
    name, status, owned = escape(run.name), manager.jobs.status(run), manager.library.owns(run)
    done, total = run.progress
    kind = isinstance(run, Experiment)
    facts = [
        f"experiment, {done:,} of {pluralize(total, 'run')}" if kind else "",
        NO_CONFIG if run.unreadable else "",
    ]
    why = why_ended(run, status, manager.jobs.last_line(run))
    buttons = button("open", "Open", f"Open {run.name} under Compare")
    if owned:
        buttons += button("rename", "Rename", f"Rename {run.name}")
        buttons += button("trash", "Delete", f"Move {run.name} to the trash")
    notes = (
        f'<textarea rows="2" maxlength="{LONGEST_NOTES}" aria-label="notes on {name}" data-was="{escape(run.notes)}" '
        f'placeholder="no notes">\n{escape(run.notes)}</textarea><p class="told" role="status"></p>'
    )
    methods = "" if kind else "".join(f"<p>{escape(progress(run, method))}</p>" for method in run.methods)
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(last_change(run.folder)))
    return (
        f'<div class="run" role="group" aria-label="{name}" data-name="{name}">{pictures(run)}'
        f'<p class="name" title="{name}">{name}</p><p>{badge(status)} <span class="when">{since}</span></p>'
        f"<p>{escape(' · '.join(filter(None, facts)))}</p>{methods}{bad(why)}{notes if owned else ''}"
        f'<div class="buttons">{buttons}</div></div>'
    )


def progress(run: Run, method: str) -> str:
    """Return a method's name, steps and last loss, such as `LoRA: 60 of 200 steps, loss 0.0312`."""
    last, total = next(reversed(of_split(run.log(method), "train")), {}), run.steps_of(method)
    parts = [f"{last.get('step', 0):,} of {pluralize(total, 'step')}"] if total else []
    parts += [f"loss {last['loss']:.4f}"] if last else []
    return f"{METHODS[method].title}: {', '.join(parts)}" if parts else METHODS[method].title


def pictures(run: Run) -> str:
    """Return as HTML up to `SAMPLES` different samples of a run."""
    found: dict[str, None] = {}
    for path in newest_samples(run):
        with contextlib.suppress(Exception):  # such as a damaged image
            found[embedded(path)] = None
        if len(found) == SAMPLES:
            break
    images = "".join(f'<img {image} alt="sample of {escape(run.name)}">' for image in found)
    return f'<div class="samples{" one" if len(found) < 2 else ""}">{images or NO_SAMPLES}</div>'


def newest_samples(run: Run) -> Iterator[Path]:
    """Yield the samples of each method's newest step, from the last method to the first.

    For an experiment, yield a sample of each chosen run at its chosen step.
    """
    if isinstance(run, Experiment):
        yield from run.chosen_samples()
    steps = list(reversed(run.steps()))
    for method in reversed(run.methods):
        yield from next((images for step in steps if (images := run.samples(method, step))), {}).values()


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
