"""Tests of reslora/runtime; `__init__.py` keeps the names apart from those of other folders."""
