"""What products are computed in: how it is chosen, and that a run keeps it. How fast a device is at best."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ALONE, assert_recovered, losses, pretrain_config, refused

import precision
import pretrain_gpt
from checkpoint import newest_checkpoint
from common import file_sha256, read_json, read_records, write_json
from distributed import Ranks
from precision import (
    ONEDNN,
    choose_precision,
    known_peak,
    measured_peak,
    peak_flops,
    product_error,
    settle_precision,
)

CPU, WIDE = torch.device("cpu"), precision.has_wide_avx512
KEPT = torch.get_float32_matmul_precision()


@pytest.fixture
def cpu(monkeypatch):
    """A CPU with these instructions, on which products take these times; and what it multiplies exactly."""

    def make(has_bf16: bool, exact: bool = True, *, wide: bool = True, **milliseconds: float) -> None:
        names = {"mkl": "float32", "onednn": ONEDNN, "bf16": "bfloat16"}
        seconds = {names[key]: value / 1000 for key, value in milliseconds.items()}
        monkeypatch.setattr(precision, "has_bf16", lambda: has_bf16)
        monkeypatch.setattr(precision, "has_wide_avx512", lambda: wide)
        monkeypatch.setattr(precision, "product_error", lambda kind: 3e-7 if exact else 3e-3)
        monkeypatch.setattr(
            precision,
            "product_seconds",
            lambda *, bf16: {k: v for k, v in seconds.items() if bf16 or k != "bfloat16"},
        )
        choose_precision.cache_clear()

    yield make
    choose_precision.cache_clear()
    torch.set_float32_matmul_precision(KEPT)


@pytest.mark.parametrize(
    ("bf16", "exact", "times", "auto", "float32"),
    [
        (True, True, (4.2, 2.0, 0.9), "bfloat16", ONEDNN),  # AMD, Zen 5
        (True, True, (4.1, 3.6, 1.9), "bfloat16", "float32"),  # AMD, Zen 4
        (False, True, (4.0, 4.2, 400), "float32", "float32"),  # without bf16 instructions
        (False, True, (4.0, 2.0, 1.0), ONEDNN, ONEDNN),  # what a CPU has no instructions for is not tried
        (True, False, (4.0, 0.5, 0.5), "bfloat16", "float32"),  # AMX: oneDNN rounds the factors to bf16
        (True, True, (4.0, 3.9, 3.5), "float32", "float32"),  # no clear margin
    ],
)
def test_a_cpus_precision_follows_from_its_instructions_and_clearly_faster_products(
    bf16, exact, times, auto, float32, cpu
):
    cpu(bf16, exact, **dict(zip(("mkl", "onednn", "bf16"), times)))
    assert choose_precision("auto", CPU) == auto
    assert choose_precision("float32", CPU) == float32
    assert choose_precision("bfloat16", CPU) == "bfloat16"


def test_onednn_is_tried_only_where_it_can_be_much_faster(cpu, tmp_path):
    cpu(False, wide=False, mkl=4.0, onednn=2.0)
    assert choose_precision("float32", CPU) == "float32"
    for vendor, family, wide in (
        ("AuthenticAMD", 26, True),
        ("AuthenticAMD", 25, False),
        ("GenuineIntel", 26, False),
    ):
        (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 2\n")
        assert WIDE(str(tmp_path / "cpuinfo")) == wide
    assert not WIDE(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("capability", "auto"), [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float32")]
)
def test_on_cuda_auto_is_bfloat16_from_ampere_on_and_elsewhere_float32(capability, auto, cpu, monkeypatch):
    choose_precision.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    chosen = [choose_precision(wanted, torch.device("cuda", 0)) for wanted in precision.DTYPES]
    assert chosen == [auto, "float32", "bfloat16"]
    assert choose_precision("auto", torch.device("mps")) == "float32"


def test_whatever_this_cpu_is_fp32_is_exact_and_the_choice_takes_a_moment(cpu):
    for wanted in ("float32", "auto"):
        ranks = dataclasses.replace(ALONE)
        settle_precision(ranks, wanted)
        if ranks.dtype == torch.float32:
            assert product_error(torch.get_float32_matmul_precision()) < precision.EXACT
    assert product_error("highest") < precision.EXACT


def test_a_run_keeps_what_it_recorded_whatever_is_faster_today(cpu):
    ranks = dataclasses.replace(ALONE)
    cpu(True, mkl=4, onednn=2, bf16=1)
    for recorded in ("float32", ONEDNN, "bfloat16"):
        for wanted in ("auto", recorded.split()[0]):
            settle_precision(ranks, wanted, recorded)
            assert ranks.precision == recorded
            assert torch.get_float32_matmul_precision() == ("medium" if recorded == ONEDNN else "highest")
    cpu(True, exact=False, mkl=4, onednn=2, bf16=1)
    settle_precision(ranks, "auto", ONEDNN)  # it went on where oneDNN rounds
    assert ranks.precision == ONEDNN and torch.get_float32_matmul_precision() == "highest"


def test_bf16_on_a_cpu_without_its_instructions_is_done_with_a_warning(cpu, capsys):
    cpu(False, mkl=4, onednn=4, bf16=400)
    settle_precision(dataclasses.replace(ALONE), "bfloat16")
    assert "--dtype=float32" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_in_bf16_is_killed_and_resumed_bit_for_bit_and_trains_as_one_in_fp32(data_dir, tmp_path, cpu):
    """The first choice is bf16; when it goes on, this CPU would choose fp32."""
    cpu(True, mkl=4, onednn=4, bf16=1)
    config = pretrain_config(data_dir, tmp_path / "straight", dtype="auto")
    pretrain_gpt.main(config)
    pretrain_gpt.main(dataclasses.replace(config, out_dir=str(tmp_path / "twice")))
    for step in (4, 6):
        path = tmp_path / "twice" / f"step_{step:07d}"
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    cpu(False, mkl=4, onednn=4, bf16=400)
    pretrain_gpt.main(dataclasses.replace(config, out_dir=str(tmp_path / "twice")))
    assert_recovered(tmp_path / "twice", tmp_path / "straight", faults=1)
    state = torch.load(newest_checkpoint(tmp_path / "twice") / "training_state.pt", weights_only=True)
    assert state["content"]["precision"] == "bfloat16"
    assert {x.dtype for entries in state["optimizer"].values() for x in entries.values()} == {torch.float32}

    pretrain_gpt.main(pretrain_config(data_dir, tmp_path / "fp32"))
    pairs = [(a[1], b[1]) for a, b in zip(losses(tmp_path / "straight"), losses(tmp_path / "fp32")) if a[1]]
    assert len(pairs) == 6 and all(abs(a - b) < 0.01 for a, b in pairs)
    assert any(a != b for a, b in pairs)


def test_another_precision_than_the_run_has_is_refused_without_force(data_dir, tmp_path, cpu):
    config = pretrain_config(data_dir, tmp_path / "run", max_steps=2)
    pretrain_gpt.main(config)
    other = dataclasses.replace(config, dtype="bfloat16", max_steps=4)
    refused("precision 'float32.*' → 'bfloat16'.*--force", pretrain_gpt.main, other)  # perhaps by oneDNN
    pretrain_gpt.main(dataclasses.replace(other, force=True))
    assert read_records(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 4


def test_a_checkpoint_that_says_nothing_of_precision_goes_on_in_fp32_on_a_cpu(data_dir, tmp_path, cpu):
    config = pretrain_config(data_dir, tmp_path, max_steps=2)
    pretrain_gpt.main(config)
    path = newest_checkpoint(tmp_path)
    state, told = (
        torch.load(path / "training_state.pt", weights_only=True),
        read_json(path / "checkpoint.json"),
    )
    del state["content"]["precision"], state["config"]["dtype"]
    torch.save(state, path / "training_state.pt")
    file = path / "training_state.pt"
    told["files"][file.name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    write_json(path / "checkpoint.json", told)
    cpu(True, mkl=4, onednn=4, bf16=1)
    pretrain_gpt.main(dataclasses.replace(config, max_steps=4, dtype="auto", force=True))
    state = torch.load(newest_checkpoint(tmp_path) / "training_state.pt", weights_only=True)
    assert (state["step"], state["content"]["precision"]) == (4, "float32")


# -- the peak of a device ------------------------------------------------------------------------------------

NAMES = {
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA L4": 121,
    "NVIDIA L40": 181,
    "NVIDIA L40S": 362,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA GeForce RTX 4090": 165.2,
}
STRANGERS = [
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA A100-SXM-64GB",  # a supercomputer's own, with more multiprocessors
    "NVIDIA H20",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 3090 Ti",
    "Quadro RTX 6000",
    "AMD Instinct MI300X",
    "",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_gpus_name_fits_one_entry_of_the_peaks_wherever_that_stands(name):
    fitting = [p for p in precision.PEAKS if re.fullmatch(p, name.removeprefix("NVIDIA "))]
    assert len(fitting) == 1 and known_peak(name) == NAMES[name] * 1e12


@pytest.mark.parametrize("name", STRANGERS)
def test_a_gpu_that_is_like_a_known_one_has_no_peak(name):
    assert known_peak(name) is None


@pytest.mark.parametrize("name", precision.GPUS)
def test_each_gpu_that_can_be_planned_for_has_a_known_peak(name):
    gpu = precision.GPUS[name]
    assert gpu.flops == NAMES[f"NVIDIA {gpu.name}"] * 1e12


def test_an_unknown_peak_is_told_by_rank_0_and_gives_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H20")
    for rank, told in ((0, 1), (1, 0)):
        assert peak_flops(Ranks(rank, 2, torch.device("cuda:0")), torch.bfloat16) is None
        assert capsys.readouterr().out.count("the bfloat16 peak of NVIDIA H20 is not known") == told
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    h200 = Ranks(0, 1, torch.device("cuda:0"))
    assert peak_flops(h200, torch.bfloat16) == 989.4e12 and capsys.readouterr().out == ""
    assert peak_flops(h200, torch.float32) is None  # the table is of bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpus_peak_is_that_of_its_fastest_product(dtype, monkeypatch):
    """By a clock that stands still but in products, at 100 GFLOP/s for small matrices and 200 for large."""
    clock, product = SimpleNamespace(now=0.0), torch.Tensor.__matmul__

    def timed_product(x, y):
        assert x.dtype == y.dtype == dtype
        clock.now += 2 * len(x) ** 3 / (1e11 if len(x) < 512 else 2e11)
        return product(x[:1], y)

    monkeypatch.setattr(torch.Tensor, "__matmul__", timed_product)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: clock.now)
    assert measured_peak(dtype) == pytest.approx(2e11) and 0.1 < clock.now < 0.2


def test_on_a_cpu_the_peak_is_measured():
    assert 1e8 < peak_flops(ALONE, torch.float32) < 1e15
