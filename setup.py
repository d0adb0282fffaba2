"""All about the package is in setup.cfg, except that migrations/ is installed as the package greenjobs.migrations."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["greenjobs", "greenjobs.*"]), "greenjobs.migrations"],
    package_dir={"greenjobs.migrations": "migrations"},
)
