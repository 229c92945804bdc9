"""Define the tabs of the page, one class per file, with their components, events and handlers."""

from .base import Tab
from .compare import CompareTab
from .dataset import DatasetTab
from .generate import GenerateTab
from .queue import QueueTab
from .report import ReportTab
from .runs import RunsTab
from .train import TrainTab

TABS: dict[str, dict[str, tuple[type[Tab], ...]]] = {
    "Images": {"": (DatasetTab,)},
    "Train": {"": (TrainTab,)},
    "Compare": {"Run": (CompareTab,), "Experiment": (ReportTab,)},
    "Generate": {"": (GenerateTab,)},
    "Runs": {"": (QueueTab, RunsTab)},
}
"""Classes of the parts of each inner tab, by the titles of tab and inner tab, in the order of the page. The title of a
single inner tab is empty."""
