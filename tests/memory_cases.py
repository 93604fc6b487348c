"""The memory of two steps on a CPU, for test_plan.py:

    python tests/memory_cases.py fake|real muon|adamw windows|rows|pairs

`fake` prints what a Ledger finds on fake tensors, `real` what torch's allocator was asked for in the same
steps. Each has a process of its own.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import attention
import distributed
from gpt import GPTConfig
from rehearsal import Rehearsal

SHAPE = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
T, B = 256, 8


def rehearse(optimizer: str, unit: str) -> dict[str, int]:
    del attention.VARLEN["cpu"]  # it reads where sequences begin, as fake tensors cannot; rows get a mask
    ranks = distributed.Ranks(0, 1, torch.device("cpu"))
    shape = GPTConfig(**SHAPE, max_position_embeddings=T)
    settings = {"T": T, "unit": unit, "compile": False, "checkpoint_activations": False}
    rehearsal = Rehearsal(shape, ranks, optimizer=optimizer, noisy=unit == "rows", **settings)
    rehearsal.micro_batches = 2
    return rehearsal.step(B).memory


def fake(optimizer: str, unit: str) -> int:
    """Fake tensors do not know how many rows the loss skips on a CPU. Here it skips none."""
    real = torch.Tensor.__getitem__

    def getitem(tensor, index):
        is_mask = isinstance(index, torch.Tensor) and index.dtype == torch.bool
        return tensor if is_mask else real(tensor, index)

    torch.Tensor.__getitem__ = getitem
    torch.Tensor.nonzero = lambda mask: torch.arange(len(mask))[:, None]
    with FakeTensorMode(allow_non_fake_inputs=True):
        return sum(rehearse(optimizer, unit).values())


def real(optimizer: str, unit: str) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        rehearse(optimizer, unit)
    now = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
