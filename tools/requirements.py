"""Prints the requirements of pyproject.toml, those for developing included, that hold on this platform; for pip."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
    requirement = Requirement(text)
    if requirement.marker is None or requirement.marker.evaluate():
        print(f"{requirement.name}{requirement.specifier}")
