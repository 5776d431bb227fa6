"""Which folders the package is made of: everything else about it is in pyproject.toml.

`conf` and `scripts` lie at the top of the repository, and inside the package once it is installed, so that the commands and
their configuration go wherever it goes.
"""

from setuptools import find_namespace_packages, setup

INSIDE = ("conf", "scripts")

found = find_namespace_packages(
    include=["sparsefinder", "sparsefinder.*", *INSIDE, *(f"{name}.*" for name in INSIDE)], exclude=["*__pycache__*"]
)
setup(
    packages=[f"sparsefinder.{name}" if name.split(".")[0] in INSIDE else name for name in found],
    package_dir={f"sparsefinder.{name}": name for name in INSIDE},
)
