"""Which folders are packages; all else is in ``pyproject.toml``."""

from pathlib import Path

from setuptools import find_packages, setup

packages = find_packages(include=["saliency_reg", "saliency_reg.*"])
folders = {"": "."}  # an editable install is then a plain path, which editors and type checkers follow
# saliency_reg/integrations is a link to the top-level folder; out of a zip, or on Windows, it may be a file with that text.
if not Path("saliency_reg/integrations").is_dir():
    packages += ["saliency_reg.integrations"]
    packages += [f"saliency_reg.integrations.{name}" for name in find_packages("integrations")]
    folders["saliency_reg.integrations"] = "integrations"

setup(packages=packages, package_dir=folders)
