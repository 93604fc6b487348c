"""The device "cuda" without a GPU: tensors that have a shape, a type and a device, but no values.

    import fake_cuda

    fake_cuda.install()  # before torch is imported
    with fake_cuda.fake_cuda():
        ...

What a step would do on a GPU can so be watched on any machine. Without a GPU torch lacks two things for it: a
guard for the device, and an accelerator for autograd. Both are made with a C++ compiler.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from common import InputError

GUARD = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
namespace {
struct CUDAHooks : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
};
struct FakeGuard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device d) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream getDefaultStream(Device) const override { return getStream(getDevice()); }
  Stream exchangeStream(Stream) const noexcept override { return getStream(getDevice()); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
FakeGuard guard;
}
namespace at {
// A CUDA build's own hooks, which ask the driver, are passed over.
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, REGISTRY_PREFERRED, CUDAHooks)
}
extern "C" void install() { impl::device_guard_impl_registry[1].store(&guard); }
"""


def torch_folder() -> Path:
    """Where torch is installed; it is not imported."""
    return Path(find_spec("torch").origin).parent


DEVICES = Path("/dev")  # nvidia0 and so on


def needs_guard() -> bool:
    """Whether torch was built without CUDA, or there is no GPU here. CUDA builds bring hooks and a guard of
    their own, but autograd's hooks ask for a GPU. A guard without a GPU is one that FakeTensorMode puts there
    (torch._C._ensureCUDADeviceGuardSet)."""
    built_with_cuda = any((torch_folder() / "lib").glob("libtorch_cuda.*"))
    return not built_with_cuda or not any(DEVICES.glob("nvidia[0-9]*"))


def install() -> None:
    """Load the guard where torch needs it, compiled once a torch version.

    It has to be there before torch is imported, as torch looks for an accelerator only then. Raises
    InputError where it cannot be made.
    """
    assert "torch" not in sys.modules, "fake_cuda.install() comes before `import torch`"
    if not needs_guard():
        return
    if sys.platform != "linux":
        raise InputError(f"fake CUDA tensors need Linux, and this is {sys.platform}; use a Linux machine")
    root = torch_folder()
    key = hashlib.sha256((version("torch") + GUARD).encode()).hexdigest()[:12]
    library = Path(tempfile.gettempdir()) / f"fake_cuda_{os.getuid()}_{key}.so"
    if not library.exists():
        compile_guard(root, library)
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(root / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library)).install()


def compile_guard(root: Path, library: Path) -> None:
    """Make the library from GUARD and the headers in torch's folder; InputError without a compiler."""
    if not shutil.which("g++"):
        raise InputError(
            "fake CUDA tensors need a C++ compiler where there is no GPU, and there is no g++; install one "
            "(on Debian and Ubuntu: apt install g++)"
        )
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(GUARD)
        command = f"g++ -std=c++20 -O1 -shared -fPIC -I{root}/include {source} -o {made} -L{root}/lib"
        subprocess.run([*command.split(), "-lc10", "-ltorch_cpu"], check=True)
        partial = library.with_suffix(f".{os.getpid()}")
        partial.write_bytes(made.read_bytes())
        partial.replace(library)


class Event:
    """A mark in the device's work. There is no work, so all is done at once."""

    def __init__(self, enable_timing: bool = False):
        pass

    def record(self):
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end) -> float:
        return 0.0

    def synchronize(self):
        pass


@contextmanager
def fake_cuda():
    """Everything in here happens on fake tensors, as on a GPU with bf16, flash attention and, for a
    mask, memory-efficient attention.

    torch stays changed afterwards: use a process of its own.
    """
    import torch
    import torch.nn.functional as F
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch.cuda.Event = Event
    torch.cuda.set_device = lambda device: None  # there is one
    torch.Tensor.pin_memory = lambda self: self  # no driver pins here
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *a, **k: True
    torch.cuda.get_device_capability = lambda *a: (9, 0)

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if torch.is_autocast_enabled("cuda"):
            q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
        if attn_mask is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
        bias = attn_mask
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, float("-inf"))
        assert {x.dtype for x in (q, k, v, bias)} == {q.dtype} and not bias.stride(-2) % 8, (
            "as a GPU wants it"
        )
        bias = bias.expand(*q.shape[:-1], k.size(-2))
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(q, k, v, bias, torch.is_grad_enabled(), 0.0, is_causal, scale=scale)[0]

    F.scaled_dot_product_attention = attention
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
