"""The peak memory of an arm."""

import mmap

import torch

from reslora.runtime.peak_memory import forget_peak, peak_memory


def test_peak_memory_counts_from_where_it_was_forgotten():
    """Measured with new pages of the system: malloc would reuse memory of earlier tests."""
    device, size = torch.device("cpu"), 2**26
    with mmap.mmap(-1, 2 * size) as pages:
        pages.write(b"1" * 2 * size)
    forget_peak(device)
    before = peak_memory(device)
    with mmap.mmap(-1, size) as pages:
        pages.write(b"1" * size)
        assert 0.9 * size <= peak_memory(device) - before <= 2.5 * size
