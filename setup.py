"""Finds the packages: each top-level folder is a portion of the `prfaas` namespace."""

from setuptools import find_packages, setup

FOLDERS = ("common", "transport", "services", "loadgen")
NAMES = [name for folder in FOLDERS for name in (folder, *(f"{folder}.{sub}" for sub in find_packages(folder)))]
setup(packages=[f"prfaas.{n}" for n in NAMES], package_dir={f"prfaas.{n}": n.replace(".", "/") for n in NAMES})
