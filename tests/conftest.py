"""Small things that many tests need; everything is made here, nothing is downloaded."""

import gc
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

# What a job on a cluster or a developer has set is not meant for these tests.
FOREIGN = "OUT DATA MODEL NPROC PRESET PREFLIGHT PREFLIGHT_FLAGS DRY_RUN NNODES NODE_RANK MASTER_ADDR".split()
FOREIGN += "MASTER_PORT RDZV_ID RESUMABLE_FILE RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE".split()
for name in [*os.environ]:
    if name in FOREIGN or name.startswith(("SLURM_", "SBATCH_", "TORCHELASTIC_")):
        del os.environ[name]
# One thread: these models are so small that threads cost more than they give.
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", OMP_NUM_THREADS="1")
torch.set_num_threads(1)
# A script's background job ignores Ctrl-C, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
if os.environ.get("TYPES"):  # each call in this process is checked against the annotations
    import typeguard

    typeguard.install_import_hook([path.stem for path in ROOT.glob("*.py")])

import planted  # noqa: E402
from planted import flags  # noqa: E402

import dpo_gpt  # noqa: E402 - the environment comes first
import prepare_data  # noqa: E402
import pretrain_gpt  # noqa: E402
import sft_gpt  # noqa: E402
import shards  # noqa: E402
from checkpoint import newest_checkpoint  # noqa: E402
from common import InputError, read_records  # noqa: E402
from distributed import Ranks  # noqa: E402
from gpt import GPTConfig, GPTModel  # noqa: E402
from tokenization import END, train_tokenizer  # noqa: E402

PROVOKED: set[tuple[str, int]] = set()  # file and line of each InputError made so far in this process


def note_error(error: InputError, *message) -> None:
    ValueError.__init__(error, *message)
    caller = sys._getframe(1)
    PROVOKED.add((caller.f_code.co_filename, caller.f_lineno))


InputError.__init__ = note_error  # test_errors.py asks at the end which were made
fake_cuda_works = pytest.mark.skipif(
    torch.__version__ < (2, 13) and torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="before torch 2.13 a CUDA build without a GPU has no backward pass on fake CUDA tensors",
)
ALONE = Ranks(0, 1, torch.device("cpu"))
WORDS = "the a river stone old runs under small bridge and green hill sees bright water in light".split()


def sentence(i: int) -> str:
    """A made-up sentence, another one for each i."""
    picks = [WORDS[(i * 7 + k * (k + i % 5)) % len(WORDS)] for k in range(5 + i % 9)]
    return " ".join(picks).capitalize() + f" {i}."


def text(i: int) -> str:
    return " ".join(sentence(i * 31 + k) for k in range(3 + i % 4))


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def conversation(i: int, turns: int = 1) -> dict:
    messages = []
    for k in range(turns):
        messages += [
            {"role": "user", "content": f"What is {sentence(i + k)}?"},
            {"role": "assistant", "content": sentence(2 * i + k)},
        ]
    return {"messages": messages}


@pytest.fixture(autouse=True)
def garbage():
    """A run in this process turns Python's collector off, and may choose oneDNN for fp32."""
    yield
    torch.set_float32_matmul_precision("highest")
    gc.enable()
    gc.unfreeze()


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer((text(i) for i in range(300)), 320)


@pytest.fixture(scope="session")
def tokenizer_dir(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_dir(tokenizer_dir, tmp_path_factory):
    """Prepared shards: about 20,000 training tokens."""
    folder = tmp_path_factory.mktemp("data")
    source = write_jsonl(folder / "texts.jsonl", ({"text": text(i)} for i in range(400)))
    prepare_data.main(
        prepare_data.Config(
            source=str(source), tokenizer=str(tokenizer_dir), out_dir=str(folder / "shards"), val_fraction=0.1
        )
    )
    return folder / "shards"


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """A .jsonl of 120 conversations."""
    rows = (conversation(i, turns=1 + i % 3) for i in range(120))
    return write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", rows)


def preference(i: int) -> dict:
    """A row as ultrafeedback_binarized has them: the chosen answer is a sentence, the rejected a word."""
    question = {"role": "user", "content": f"Say {sentence(i)[:20]}"}
    answers = [{"role": "assistant", "content": text} for text in (sentence(i), "No" + "o" * (i % 5))]
    sides = {name: [question, answer] for name, answer in zip(("chosen", "rejected"), answers)}
    return {"prompt": question["content"], **sides}


@pytest.fixture(scope="session")
def preferences(tmp_path_factory):
    """A .jsonl of 60 pairs."""
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", map(preference, range(60)))


def small_model(**changes) -> GPTModel:
    """A model with random weights everywhere, zero-initialized projections too, so that all of it matters."""
    fields = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(**{**fields, "max_position_embeddings": 64, **changes}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3_WIDE = {"head_dim": 16, "rope_theta": 5e5, "rope_scaling": LLAMA3}
SWITCHES = [
    {"tie_word_embeddings": tied, "num_key_value_heads": groups, "qk_norm": qk_norm, **rest}
    for tied, groups, qk_norm, rest in itertools.product(
        (False, True),
        (4, 2, 1),
        (False, True),
        ({}, {"head_dim": 16, "rope_theta": 5e5}, {"rope_scaling": LLAMA3}, LLAMA3_WIDE),
    )
]


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 320, shape, generator=torch.Generator().manual_seed(seed))


def exact(changes: dict) -> dict:
    """On a CPU in fp32, unless the changes name a device: digits are compared, on any CPU."""
    return {} if "cuda" in changes.get("device", "cpu") else {"device": "cpu", "dtype": "float32"}


def pretrain_config(data_dir, out_dir, **changes) -> pretrain_gpt.Config:
    """A run of seconds."""
    model = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "context_length": 32}
    length = {"max_steps": 6, "batch_tokens": 256, "micro_batch_size": 4, "warmup_steps": 2}
    report = {"log_every": 1, "eval_every": 3, "eval_tokens": 512, "samples": False, "save_every": 2}
    fields = {**model, **length, **report, "keep_last": 0, "wandb": "off", **exact(changes), **changes}
    return pretrain_gpt.Config(data_dir=str(data_dir), out_dir=str(out_dir), **fields)


def sft_config(model, data, out_dir, **changes) -> sft_gpt.Config:
    """A run of seconds."""
    length = {"max_steps": 4, "batch_tokens": 512, "micro_batch_size": 4, "max_length": 64}
    report = {"log_every": 1, "eval_every": 2, "eval_questions": 4, "max_new_tokens": 8, "save_every": 2}
    fields = {
        **length,
        **report,
        "val_fraction": 0.1,
        "keep_last": 0,
        "wandb": "off",
        **exact(changes),
        **changes,
    }
    paths = {"model": str(model), "data": str(data), "out_dir": str(out_dir), "cache_dir": str(out_dir)}
    return sft_gpt.Config(**{**paths, **fields})


def dpo_config(model, data, out_dir, **changes) -> dpo_gpt.Config:
    """A run of seconds, at a learning rate that shows."""
    length = {"max_steps": 4, "batch_pairs": 8, "micro_batch_size": 2, "max_length": 64, "lr": 1e-3}
    report = {"log_every": 1, "eval_every": 2, "eval_questions": 2, "max_new_tokens": 8, "save_every": 2}
    fields = {**length, **report, "val_fraction": 0.1, "keep_last": 0, "wandb": "off", **exact(changes)}
    paths = {"model": str(model), "data": str(data), "out_dir": str(out_dir), "cache_dir": str(out_dir)}
    return dpo_gpt.Config(**{**fields, **paths, **changes})


@pytest.fixture(scope="session")
def base_run(data_dir, tmp_path_factory):
    """A finished pretraining run, with a context long enough for conversations."""
    out_dir = tmp_path_factory.mktemp("runs") / "base"
    pretrain_gpt.main(pretrain_config(data_dir, out_dir, context_length=64))
    return out_dir


def weights(out_dir: Path, step: int) -> bytes:
    return (out_dir / f"step_{step:07d}" / "model.safetensors").read_bytes()


def losses(out_dir: Path) -> list[tuple]:
    """All that was recorded but speeds."""
    names = ("step", "loss", "val_loss", "grad_norm")
    return [tuple(row.get(name) for name in names) for row in read_records(out_dir / "metrics.jsonl")]


def run(script: str, *arguments: str, ranks: int = 1, **options) -> subprocess.CompletedProcess:
    """Run a script as a user does, under torchrun for more than one rank."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    )
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


def descendants(pid: int) -> list[int]:
    """A process's children and theirs, those with sessions of their own included."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return []
    return children + [below for child in children for below in descendants(child)]


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_tree(process: subprocess.Popen) -> None:
    """Kill a launcher and its ranks, and return when all of them are gone. Killing the launcher's process
    group would leave its ranks running: torchrun gives each of them a session of its own."""
    os.kill(process.pid, signal.SIGSTOP)  # it starts no more of them
    ranks = descendants(process.pid)
    for pid in [process.pid, *ranks]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(map(is_alive, ranks)):
        time.sleep(0.01)


# -- faults --------------------------------------------------------------------------------------------------

SMALL = {"max_steps": 6, "micro_batch_size": 2}  # two micro-batches in a step on each of two ranks
COUNTS = Counter()  # of faults injected, runs compared, runs recovered and bytes lost


def differing(a: bytes, b: bytes) -> int:
    """How many bytes of two strings differ or are in one alone."""
    n = min(len(a), len(b))
    same = np.frombuffer(a[:n], np.uint8) == np.frombuffer(b[:n], np.uint8)
    return max(len(a), len(b)) - int(same.sum())


SPEEDS = ("tokens_per_second", "mfu", "memory_gb", "save_seconds", "seconds")


def result_of(out_dir: Path) -> dict[str, bytes]:
    """All that a run leaves, but for speeds and paths: weights, resume state and metrics."""
    path = newest_checkpoint(out_dir)
    state = torch.load(path / "training_state.pt", weights_only=True)
    moments = {
        f"{name} {key}": value.numpy().tobytes()
        for name, entries in state.pop("optimizer").items()
        for key, value in entries.items()
    }
    paths = ("out_dir", "cache_dir", "resume")
    state["config"] = {k: v for k, v in state["config"].items() if k not in paths}
    rows = [
        {k: v for k, v in row.items() if k not in SPEEDS} for row in read_records(out_dir / "metrics.jsonl")
    ]
    texts = {"state": state, "metrics": [row for row in rows if len(row) > 1]}
    return {
        "weights": (path / "model.safetensors").read_bytes(),
        **moments,
        **{name: json.dumps(value, sort_keys=True).encode() for name, value in texts.items()},
    }


def assert_recovered(out_dir: Path, undisturbed: Path, faults: int) -> None:
    """A run that so many faults met ends in the same bytes as one that none met; both are counted."""
    ours, theirs = result_of(out_dir), result_of(undisturbed)
    lost = {
        name: differing(ours.get(name, b""), theirs.get(name, b"")) for name in ours.keys() | theirs.keys()
    }
    COUNTS.update(faults=faults, runs=1, recovered=int(not any(lost.values())), lost=sum(lost.values()))
    assert not any(lost.values()), {name: count for name, count in lost.items() if count}


TABLE = []  # of test_cuda.py: what was compared where, tolerance, difference, seconds since the test began


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session):
    """Note whether all quick tests are to run, so that test_errors.py can tell what no test provokes."""
    asked = session.config.option
    last_failed = getattr(asked, "lf", False)  # there is none without pytest's cache
    chosen = asked.keyword or asked.deselect or asked.ignore or asked.collectonly or last_failed
    everywhere = session.config.args == session.config.getini("testpaths")
    session.config.whole_run = everywhere and not chosen and "not slow" in asked.markexpr
    session.items.sort(key=lambda item: item.name == "test_every_error_of_a_user_is_provoked_by_a_test")


def pytest_terminal_summary(terminalreporter):
    if TABLE:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        terminalreporter.write_line(f"\ntorch {torch.__version__}, {name}; tolerance, difference, seconds")
    for what, tolerance, difference, seconds in TABLE:
        terminalreporter.write_line(f"{what:64} {tolerance:9.1e} {difference:9.1e} {seconds:7.1f}")
    if COUNTS["runs"]:
        terminalreporter.write_line(
            f"{COUNTS['faults']} faults injected, {COUNTS['recovered']} of {COUNTS['runs']} runs recovered, "
            f"{COUNTS['lost']} bytes lost"
        )


def import_all() -> None:
    """What the scripts import only when they need it, and Python's only thread stays alone."""
    from tqdm import tqdm
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    assert AutoTokenizer and PreTrainedTokenizerFast
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that a killed process leaves behind
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fresh():
    """A process that has imported everything and started no thread, so that it may fork runs."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=import_all) as pool:
        yield pool


@pytest.fixture(scope="session")
def undisturbed(data_dir, tmp_path_factory, fresh):
    """The folder of a pretraining run of so many ranks that no fault met."""
    done = {}

    def out_dir(world: int, **changes) -> Path:
        key = (world, *changes.items())
        if key not in done:
            done[key] = tmp_path_factory.mktemp("undisturbed")
            config = pretrain_config(data_dir, done[key], **SMALL, **changes)
            codes, log, _ = fresh.submit(planted.forked, "pretrain_gpt", config, world).result(90)
            assert not any(codes), log
        return done[key]

    return out_dir


@contextmanager
def torchrun(faults: str, config, *options: str):
    """Two ranks under torchrun with planted faults; nothing of them is left behind."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
    job = subprocess.Popen(
        [*command, str(ROOT / "tests" / "planted.py"), faults, "pretrain_gpt", *flags(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )
    try:
        yield job
    finally:
        if job.poll() is None:
            job.terminate()
            job.communicate(timeout=60)


# -- prepared data -------------------------------------------------------------------------------------------

TEXTS = [text(i) for i in range(40)]


ODD_TEXTS = [
    "zażółć gęślą jaźń – 漢字 🙂 e\u0301\u200d\ufeff",
    "before <|endoftext|> between <|im_start|>user\n<|im_end|> after",
    "  leading, trailing \n\n\ttabs\r\nand 1234567890 \x00 control\x7f ",
]


def prepare_config(out_dir, source, tokenizer, **changes) -> prepare_data.Config:
    fields = {"val_fraction": 0.2, "shard_tokens": 500, **changes}
    return prepare_data.Config(source=str(source), tokenizer=str(tokenizer), out_dir=str(out_dir), **fields)


def prepare(out_dir, source, tokenizer, **changes) -> Path:
    prepare_data.main(prepare_config(out_dir, source, tokenizer, **changes))
    return out_dir


def refused(match: str, call, *arguments, **keywords) -> None:
    """The call raises an InputError of one line that matches."""
    with pytest.raises(InputError, match=match) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value).strip()


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, but for the note of when which shard was verified."""
    paths = (
        p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in (".verified.json", ".lock")
    )
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def write_shard(path: Path, ids, version: int = 1) -> None:
    """A shard packed by hand, independent of ShardWriter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack("<256i", 20240520, version, len(ids), *[0] * 253)
    path.write_bytes(header + struct.pack(f"<{len(ids)}{'HI'[version - 1]}", *ids))


def read_ids(folder: Path, split: str) -> list[int]:
    """A split's ids, unpacked by hand, over all its shards."""
    ids = []
    for path in sorted(folder.glob(f"{split}_*.bin")):
        raw = path.read_bytes()
        magic, version, count = struct.unpack("<3i", raw[:12])
        assert magic == 20240520 and raw[12:1024] == bytes(1012), path
        ids += struct.unpack(f"<{count}{'HI'[version - 1]}", raw[1024:])
    return ids


def read_documents(folder: Path, split: str, tokenizer) -> list[str]:
    """A split's documents, decoded from its shards."""
    end, ids = tokenizer.convert_tokens_to_ids(END), read_ids(folder, split)
    starts = [i for i, token in enumerate(ids) if token == end]
    assert starts[:1] == [0] or not ids, f"the {split} split does not begin with {END}"
    return [tokenizer.decode(ids[a + 1 : b]) for a, b in zip(starts, [*starts[1:], len(ids)])]


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("source") / "texts.jsonl", ({"text": t} for t in TEXTS))


@pytest.fixture(scope="session")
def prepared(source, tokenizer_dir, tmp_path_factory):
    """TEXTS as shards; read only."""
    return prepare(tmp_path_factory.mktemp("prepared") / "shards", source, tokenizer_dir)


@pytest.fixture
def copied(prepared, tmp_path):
    """TEXTS as shards, to be damaged."""
    return shutil.copytree(prepared, tmp_path / "shards")


@pytest.fixture
def often(monkeypatch):
    """Small batches, and a place to continue from after each."""
    monkeypatch.setattr(shards, "BATCH_DOCUMENTS", 4)
    monkeypatch.setattr(shards, "SAVE_EVERY", 400)
