"""Tests of the experiment, file by file; `__init__.py` keeps the names apart from those of other folders."""
