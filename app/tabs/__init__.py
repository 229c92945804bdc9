"""The tabs of the page and their parts, one class per file: components, events and handlers. `views` renders HTML."""

from .base import Tab
from .chains import ChainsTab
from .compare import CompareTab
from .dataset import DatasetTab
from .generate import GenerateTab
from .queue import QueueTab
from .report import ReportTab
from .runs import RunsTab
from .train import TrainTab
from .votes import VotesTab

TABS: dict[str, dict[str, tuple[type[Tab], ...]]] = {
    "Images": {"": (DatasetTab,)},
    "Train": {"": (TrainTab,)},
    "Compare": {"Run": (CompareTab, ChainsTab), "Experiment": (ReportTab, VotesTab)},
    "Generate": {"": (GenerateTab,)},
    "Runs": {"": (QueueTab, RunsTab)},
}
"""The tabs in the order of the page; the tabs inside each, if there are several; and the parts of each of these."""
