"""The tabs of the page, one per file: components, events and handlers. `views` renders what they show."""

from .base import Tab
from .chains import ChainsTab
from .compare import CompareTab
from .dataset import DatasetTab
from .experiment import ExperimentTab
from .generate import GenerateTab
from .queue import QueueTab
from .runs import RunsTab
from .train import TrainTab

TABS: tuple[type[Tab], ...] = (
    CompareTab, GenerateTab, DatasetTab, TrainTab, ExperimentTab, QueueTab, RunsTab, ChainsTab,
)  # fmt: skip
"""The tabs in the order of the page. To add a tab, add a file with its class, and add the class here."""
