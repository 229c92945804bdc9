"""One file a tab: its components, its events, and what answers them. What is shown comes from `views`."""

from .base import Parts, Tab
from .chains import ChainsTab
from .compare import CompareTab
from .dataset import DatasetTab
from .experiment import ExperimentTab
from .generate import GenerateTab
from .queue import QueueTab
from .runs import RunsTab
from .train import TrainTab

__all__ = ["TABS", "Parts", "Tab"]

TABS: tuple[type[Tab], ...] = (
    CompareTab, GenerateTab, DatasetTab, TrainTab, ExperimentTab, QueueTab, RunsTab, ChainsTab,
)  # fmt: skip
"""In the order of the page: a new tab is a file and its class here."""
