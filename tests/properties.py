"""Hypothesis. A test file that imports this one is skipped where hypothesis is not installed."""

import pytest

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies
few = settings(max_examples=50, deadline=None, derandomize=True)
