"""Tests of reslora/images, file by file; `__init__.py` keeps the names apart from those of other folders."""
