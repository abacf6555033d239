"""The package as it is installed: version pairs, extras, and what travels in the wheel."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins(python):
    lines = (ROOT / f"scripts/constraints/py{python.replace('.', '')}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_constraints_pin_every_dependency(python):
    pinned = pins(python)
    for text in [*PROJECT["dependencies"], *EXTRAS["audio"], *EXTRAS["test"], *EXTRAS["dev"]]:
        req = Requirement(text)
        name = req.name.lower().replace("_", "-")
        if name == "jaxslim" or (name == "torch" and python != "3.11"):
            continue
        if req.marker is None or req.marker.evaluate({"python_version": python}):
            assert req.specifier.contains(pinned[name]), f"{text} is not met by {name}=={pinned[name]}"


def test_extras_and_bounds():
    assert set(EXTRAS) == {"audio", "test", "vad", "dev", "export", "tpu", "cuda12", "cuda13"}
    for text in [*PROJECT["dependencies"], *(t for extra in EXTRAS.values() for t in extra)]:
        req = Requirement(text)
        operators = {s.operator for s in req.specifier}
        if req.name == "torch":  # a bare torch takes gigabytes of CUDA packages
            assert str(req.specifier) == "==2.13.0"
        else:
            assert operators <= {">="}, f"{text}: lower bounds only, tested pairs are in scripts/constraints"


@pytest.mark.slow
def test_wheel_holds_the_assets(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    tracked = subprocess.run(["git", "ls-files", "jaxslim", "checkpoints"], cwd=ROOT, check=True, capture_output=True)
    files = [f for f in tracked.stdout.decode().split() if f != "checkpoints/README.md"]
    assert {re.sub("^checkpoints/", "jaxslim/assets/", f) for f in files} <= names
    assert not [n for n in names if n.startswith(("tests/", "checkpoints/"))]
