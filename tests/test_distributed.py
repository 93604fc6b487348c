"""Ranks, devices, signals."""

import pytest
import torch

import distributed
from common import InputError
from distributed import Ranks


def test_a_rank_that_does_not_see_what_rank_0_wrote_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed.time, "sleep", lambda seconds: None)
    Ranks(0, 2, torch.device("cpu")).require_shared(tmp_path / "report.json")
    with pytest.raises(InputError, match=r"rank 1 does not see .*report\.json.*one folder"):
        Ranks(1, 2, torch.device("cpu")).require_shared(tmp_path / "report.json")
