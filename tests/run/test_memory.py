"""Freed memory is kept where there is glibc, and nothing happens elsewhere."""

from __future__ import annotations

import ctypes
import platform
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cutlayer.run.memory import keep_freed_memory

GLIBC = platform.libc_ver()[0] == "glibc"
FAULTS = """
import resource, sys
import numpy as np
from cutlayer.run.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        blocks = [np.ones(2**18) for _ in range(4)]  # 2 MB each
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(not GLIBC, reason="glibc's malloc alone has these settings")
def test_large_blocks_are_used_again():
    def faults(how: str) -> int:
        words = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout)

    assert resource.getpagesize() == 4096
    assert faults("kept") * 10 < faults("given back")


def test_says_whether_it_could():
    assert keep_freed_memory() == GLIBC


@pytest.mark.parametrize("library", [SimpleNamespace(), SimpleNamespace(mallopt=lambda what, value: 0)])
def test_without_such_a_setting_nothing_happens(library, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert not keep_freed_memory()
