"""What holds for every test: one torch thread, property tests without a deadline, and marks that are kept to."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
import torch
from hypothesis import settings

from tests.provoking import codes_of, watching

# Several workers share the cores, and one thread adds numbers in one order.
torch.set_num_threads(1)

# "local" looks for new counterexamples each time; "ci" draws the same cases on every run.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "provokes(*codes, by=None): see tests/provoking.py")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Hold a test to the error codes that it claims to provoke."""
    codes = codes_of(item)
    if not codes:
        return (yield)
    with watching() as watch:
        result = yield
    complaints = watch.complaints(codes)
    if complaints:
        pytest.fail("; ".join(complaints), pytrace=False)
    return result
