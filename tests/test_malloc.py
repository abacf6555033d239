"""The command line starts itself again with large memory pages, where that helps and nobody has chosen otherwise."""
import os
import subprocess
import sys

import pytest

from jaxslim import malloc

LINUX = malloc.sys.platform == "linux" and malloc.platform.libc_ver()[0] == "glibc"


@pytest.mark.parametrize("changes,gains", [
    ({}, LINUX), ({"JAX_PLATFORMS": "tpu"}, False), ({"JAXSLIM_MALLOC": "system"}, False),
    ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}, False)])
def test_who_gains(monkeypatch, changes, gains):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    assert malloc.wanted() == gains


@pytest.mark.skipif(not LINUX, reason="glibc only")
def test_the_command_runs_once_and_with_its_own_words(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jaxslim.cli", "info"]
    done = subprocess.run([*command, str(tmp_path / "no such model")], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("no such model") == 1
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert malloc.TUNABLES in done.stdout
