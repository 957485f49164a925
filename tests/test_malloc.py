"""Memory that is freed and taken again costs no page faults once it is asked for; the command line asks."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from analyses import cli
from hooked_qwen2vl.malloc import keep_freed_memory

CHILD = """
import resource, sys
import numpy as np
from hooked_qwen2vl.malloc import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(1 << 23)
before = faults()
for _ in range(8):
    np.ones(1 << 23)  # 64 MB: 16,384 pages of 4 kB
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_pages_are_cleared_once():
    faults = {}
    for how in ("keep", "plain"):
        done = subprocess.run([sys.executable, "-c", CHILD, how], capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert faults["keep"] < 50 < faults["plain"]


def test_the_command_line_asks_for_it_and_elsewhere_nothing_happens(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: asked.append(1))
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert asked == [1]
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
