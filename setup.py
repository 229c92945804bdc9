"""Which folders become which packages; all else is in pyproject.toml, which cannot add to what it finds."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["reslora*"]), "reslora.assets", "reslora_app", "reslora_app.tabs"],
    package_dir={"reslora.assets": "assets", "reslora_app": "app"},  # `app` would be anyone's name in site-packages
)
