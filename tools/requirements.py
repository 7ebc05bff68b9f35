"""Prints the requirements of pyproject.toml, all extras included, that hold on this platform; for pip."""

import tomllib
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for text in chain(project["dependencies"], *project["optional-dependencies"].values()):
    requirement = Requirement(text)
    if requirement.marker is None or requirement.marker.evaluate():
        print(f"{requirement.name}{requirement.specifier}")
