"""fake_cuda.py: a device without a GPU, and what is told where it cannot be had."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import fake_cuda_works

import fake_cuda
from common import InputError

STEP = """
import fake_cuda
fake_cuda.install()
import torch
from torch.nn import functional as F
with fake_cuda.fake_cuda():
    w = torch.zeros(64, 64, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        q = F.linear(torch.zeros(2, 4, 8, 64, device="cuda"), w)
        y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    y.float().sum().backward()
print(y.dtype, y.device, tuple(y.shape), w.grad.dtype, w.grad.device)
"""


@pytest.mark.fake_cuda
@fake_cuda_works
@pytest.mark.skipif(not shutil.which("g++"), reason="fake CUDA tensors need a C++ compiler (g++)")
@pytest.mark.skipif(sys.platform != "linux", reason="fake CUDA tensors need Linux")
def test_forward_and_backward_run_on_a_cuda_device_that_is_not_there():
    root = Path(fake_cuda.__file__).parent
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, cwd=root)
    assert done.stdout.split("\n")[0] == "torch.bfloat16 cuda:0 (2, 4, 8, 64) torch.float32 cuda:0", (
        done.stderr
    )


def test_without_a_compiler_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="there is no g\\+\\+; install one"):
        fake_cuda.compile_guard(tmp_path, tmp_path / "guard.so")


def test_only_a_torch_that_was_built_with_cuda_and_has_a_gpu_needs_no_guard(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(fake_cuda, "torch_folder", lambda: tmp_path)
    monkeypatch.setattr(fake_cuda, "DEVICES", tmp_path)
    assert fake_cuda.needs_guard()
    (tmp_path / "lib" / "libtorch_cuda.so").touch()
    assert fake_cuda.needs_guard()
    (tmp_path / "nvidia0").touch()
    assert not fake_cuda.needs_guard()
    (tmp_path / "lib" / "libtorch_cuda.so").unlink()
    assert fake_cuda.needs_guard()
