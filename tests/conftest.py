"""Settings that hold for every test: one torch thread, and property tests that take as long as they need."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

# Several workers share the cores, and one thread adds numbers in one order.
torch.set_num_threads(1)

# "local" looks for new counterexamples each time; "ci" draws the same cases on every run.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
