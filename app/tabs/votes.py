"""Part of Compare: blind votes on pairs of an experiment's samples."""

import random
from functools import partial

import gradio as gr

from .. import views, votes
from ..handlers import QUIET
from ..runs import RunError
from .base import Parts, Tab, TabHost, answer_line
from .report import ReportTab

KEYS = """
document.addEventListener('keydown', event => {
    const button = {ArrowLeft: '#vote-left', ArrowDown: '#vote-equal', ArrowRight: '#vote-right'}[event.key];
    const is_open = button && element.offsetParent && element.querySelector('img');
    const with_other = event.altKey || event.ctrlKey || event.metaKey;  // Alt and the left arrow go back
    if (!is_open || with_other || event.target.closest('input, textarea, select, [role=tab], [role=slider]')) return;
    event.preventDefault();
    if (!event.repeat) document.querySelector(button).click();
});
"""
"""Script by which the arrow keys vote while a pair is shown."""


class VotesTab(Tab):
    """The part for blind votes: it shows two samples of the same prompt and seed without the names of their methods.

    The sides are random. Each possible vote has a keyboard key.
    """

    fold = "Blind votes"

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        gr.Markdown(
            "Which image is better? Both have the same prompt and seed; which method made which image is hidden. The "
            "keys ←, ↓ and → also vote.",
            elem_classes="hint",
        )
        self.images = gr.HTML(elem_id="vote-images", js_on_load=KEYS)
        with gr.Row():
            self.begin = gr.Button("Show a pair", elem_id="vote-begin", min_width=100)
            labels = {"left": "← Left", "equal": "↓ Equal", "right": "Right →"}
            self.sides = {
                side: gr.Button(label, elem_id=f"vote-{side}", min_width=80) for side, label in labels.items()
            }
        self.answer = answer_line(elem_id="vote-answer")
        self.show = gr.Button("Show the result", elem_id="vote-show", size="sm")
        self.result = gr.HTML(elem_id="vote-result")
        self.asked = gr.State(None)  # stays on the server, so that the page does not tell the methods

    def events(self, page: TabHost) -> None:
        """Connect the components."""
        which = page.tab(ReportTab).which
        shown = [self.images, self.asked, self.answer]
        self.begin.click(self.next, which, shown, **QUIET)
        for side, button in self.sides.items():
            vote = partial(self.vote, side)
            button.click(vote, [which, self.asked], shown, trigger_mode="once", **QUIET)
        self.show.click(self.outcome, which, self.result, **QUIET)
        which.change(lambda: ("", None, "", ""), None, [*shown, self.result], **QUIET)

    def next(self, name: str, before: votes.Pair | None = None) -> tuple:
        """Return the next pair of samples as HTML, the argument `asked` of `vote`, and how many pairs have a vote.

        `before`: the previous pair, which is shown again only if there is no other pair. Raises `RunError` if there are
        no pairs.
        """
        experiment = self.library.find_experiment(name)
        known = votes.pairs(experiment)
        given = votes.votes(experiment, known)
        if not known:
            raise RunError("This experiment has no samples of two compared methods with the same prompt and seed.")
        pair = votes.next_pair(known, given, before)
        swapped = random.random() < 0.5
        sides = known[pair][::-1] if swapped else known[pair]
        done = sum(bool(given.get(one)) for one in known)
        line = views.notice(f"{done} of {len(known)} pairs have a vote.")
        return views.side_by_side(sides), (name, pair, swapped, known[pair]), line

    def vote(self, side: str, name: str, asked: tuple | None) -> tuple:
        """Store a vote on the shown pair, and return what `next` returns for the next pair.

        `asked`: name of the experiment, pair, whether the reference method is on the left side, and the images. `side`:
        `left`, `right` or `equal`.
        """
        if not asked or asked[0] != name:
            return self.next(name)
        _, pair, swapped, images = asked
        preferred = "equal" if side == "equal" else "label" if (side == "left") != swapped else "reference"
        votes.add(self.library.find_experiment(name), pair, preferred, images)
        return self.next(name, pair)

    def outcome(self, name: str) -> str:
        """Return an experiment's preferences by votes and its loss verdicts, as HTML."""
        return votes.result(self.library.find_experiment(name))
