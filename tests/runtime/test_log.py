"""A run's log on a full disk."""

import errno
from pathlib import Path

import pytest

from reslora.runtime.log import LogWriter

FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="Linux has a device that is always full")
def test_a_row_that_the_disk_has_no_room_for_names_the_log(tmp_path):
    """When the row is written, and at the end as well: the last exception is the one that is printed."""
    writer = LogWriter(tmp_path / "log.jsonl")
    writer.close()
    writer.file = FULL.open("a", encoding="utf-8")
    for fail in (lambda: writer.write({"step": 1}), writer.close):
        with pytest.raises(OSError, match="No space left") as raised:
            fail()
        assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(FULL)
