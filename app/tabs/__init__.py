"""Define the tabs of the page, one class per file, with their components, events and handlers."""

from .base import Tab
from .compare import CompareTab
from .dataset import DatasetTab
from .generate import GenerateTab
from .report import ReportTab
from .runs import RunsTab
from .train import TrainTab

TABS: dict[str, type[Tab] | dict[str, type[Tab]]] = {
    "Images": DatasetTab,
    "Train": TrainTab,
    "Compare": {"Run": CompareTab, "Experiment": ReportTab},
    "Generate": GenerateTab,
    "Runs": RunsTab,
}
"""Classes of the tabs by title, in the order of the page. Compare has two inner tabs."""
