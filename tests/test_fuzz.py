"""Thousands of damaged and hostile inputs: each ends in success or one sentence, soon and in little memory.

    python test_fuzz.py FOLDER 1000     # so many mutations of each kind; prints the counts

All run in one process of their own, whose memory is limited to a gigabyte above what it starts with.
"""

import copy
import dataclasses
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

SECONDS, BYTES = 10, 1 << 30  # that one input may take, of the processor and of memory
DEEP = "[" * 20_000 + "]" * 20_000
HOSTILE = (
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2.5,
        10**30,
        -(10**30),
        1e308,
        3_000_000,
        2**31,
        2**63,
        1e-45,
        float("nan"),
    ),
    *("", "x", "../x", "/dev/zero", "a/b", "null", "\ud800", "é" * 300, "<|im_end|>", "\0"),
    *([], {}, [[]], {"": None}, ["x"], [1, None], {"a": {"b": []}}),
)


def places(value, at=()) -> list[tuple]:
    """The paths to all values inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, child in inside for path in places(child, (*at, key)))]


def mutated_json(value, choose: random.Random):
    """A JSON value with one to three of its places replaced, removed or added to."""
    value = json.loads(json.dumps(value))
    for _ in range(choose.choice([1, 1, 1, 2, 3])):
        *path, last = choose.choice([p for p in places(value) if p] or [("new",)])
        owner = value
        for key in path:
            owner = owner[key]
        if not isinstance(owner, dict | list) or (isinstance(owner, list) and not owner):
            continue
        action = choose.random()
        if action < 0.75:
            owner[last] = copy.deepcopy(choose.choice(HOSTILE))
        elif action < 0.9 and last in (owner if isinstance(owner, dict) else range(len(owner))):
            del owner[last]
        elif isinstance(owner, dict):
            owner[choose.choice(["new", "type", "factor", "model_type", "../x"])] = copy.deepcopy(
                choose.choice(HOSTILE)
            )
    return value


def mutated_file(path: Path, choose: random.Random) -> bytes:
    """A JSON file with other values, or with its bytes cut, flipped or nested too deeply."""
    raw, action = path.read_bytes(), choose.random()
    if action < 0.8:
        return json.dumps(mutated_json(json.loads(raw), choose)).encode()
    if action < 0.87:
        return raw[: choose.randrange(len(raw))]
    if action < 0.97:
        at = choose.randrange(len(raw))
        return raw[:at] + bytes([choose.randrange(256)]) + raw[at + 1 :]
    return choose.choice([b"", b"[]", b"5", b"\xe9", DEEP.encode(), b'{"a": ' * 20_000])


def mutated_rows(rows: list, choose: random.Random) -> str:
    """Lines of JSON, some of them with other values or no JSON at all."""
    lines = [json.dumps(mutated_json(row, choose) if choose.random() < 0.3 else row) for row in rows]
    if choose.random() < 0.3:
        lines[choose.randrange(len(lines))] = choose.choice(["{", "\\", "5", DEEP, "null", '"x'])
    return "\n".join(lines) + choose.choice(["\n", "", "{"])


def mutated_flag(config_class: type, choose: random.Random) -> str:
    field = choose.choice(dataclasses.fields(config_class))
    value = choose.choice(
        ["", "x", "-1", "0", "1e20", "1e400", "nan", "-inf", "true", "1.5", "é", "auto,", "9" * 400]
    )
    return choose.choice([f"--{field.name}={value}", f"--{field.name}", f"--{field.name}x={value}", value])


class Fuzzer:
    """Tries inputs and counts how they ended."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.choose, self.counts = folder, random.Random(seed), Counter()

    def attempt(self, kind: str, action, told) -> None:
        from common import InputError

        began = time.process_time()  # a busy machine makes no input slow
        try:
            action()
            self.counts[f"{kind}: success"] += 1
        except InputError as error:
            if "\n" in str(error).strip() and kind != "flags":  # which list what exists
                raise AssertionError(f"{kind}: not one sentence, by {told()!r:.2000}") from error
            self.counts[f"{kind}: one sentence"] += 1
        except Exception as error:
            raise AssertionError(f"{kind}: {error!r:.300}, by {told()!r:.2000}") from error
        took = time.process_time() - began
        assert took < SECONDS, f"{kind}: {took:.0f} s, by {told()!r:.2000}"

    def file(self, kind: str, path: Path, action) -> None:
        """Try an action with a mutated file, and bring the file back."""
        original = path.read_bytes()
        path.write_bytes(mutated_file(path, self.choose))
        try:
            self.attempt(kind, action, path.read_bytes)
        finally:
            path.write_bytes(original)


def prepare_inputs(folder: Path) -> None:
    """A model directory, a finished run, shards and their source, all tiny."""
    import conftest

    import prepare_data
    import pretrain_gpt
    from tokenization import train_tokenizer

    tokenizer = train_tokenizer((conftest.text(i) for i in range(300)), 320)
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "added_tokens.json").write_text('{"<extra>": 320}')
    source = conftest.write_jsonl(folder / "texts.jsonl", ({"text": conftest.text(i)} for i in range(100)))
    fields = {"source": str(source), "tokenizer": str(folder / "tokenizer"), "val_fraction": 0.2}
    prepare_data.main(prepare_data.Config(**fields, out_dir=str(folder / "shards")))
    pretrain_gpt.main(
        conftest.pretrain_config(folder / "shards", folder / "run", context_length=64, max_steps=2)
    )
    checkpoint = folder / "run" / "step_0000002"
    index = {"weight_map": {"lm_head.weight": "model.safetensors", "x": "model.safetensors"}}
    shutil.copytree(checkpoint, folder / "model")
    (folder / "model" / "checkpoint.json").unlink()
    shutil.copytree(folder / "model", folder / "indexed")
    (folder / "indexed" / "model.safetensors.index.json").write_text(json.dumps(index))


def fuzz(folder: Path, times: int) -> Counter:
    """Mutate every kind of input so many times."""
    import conftest

    import dpo_gpt
    import prepare_data
    import pretrain_gpt
    import sft_gpt
    from checkpoint import find_model
    from data import verified_manifest
    from gpt import GPTModel
    from resume import load_resumable
    from tokenization import load_tokenizer

    fuzzer, tokenizer = Fuzzer(folder, seed=0), load_tokenizer(folder / "tokenizer")
    model, run, shards = folder / "model", folder / "run", folder / "shards"
    choose = fuzzer.choose
    for _ in range(times):
        fuzzer.file("config.json", model / "config.json", lambda: GPTModel.from_pretrained(model))
        index = folder / "indexed" / "model.safetensors.index.json"
        fuzzer.file("weight index", index, lambda: GPTModel.from_pretrained(folder / "indexed"))
        name = choose.choice(["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
        fuzzer.file(name, folder / "tokenizer" / name, lambda: load_tokenizer(folder / "tokenizer"))
        fuzzer.file("data manifest", shards / "manifest.json", lambda: verified_manifest(shards))
        noted = run / "step_0000002" / "checkpoint.json"
        fuzzer.file("checkpoint.json, to chat", noted, lambda: find_model(str(run)))
        fuzzer.file("checkpoint.json, to resume", noted, lambda: load_resumable(run, "auto", conftest.ALONE))
    for i in range(times):
        attempt_text(fuzzer, folder / "rows.jsonl")
        attempt_conversations(fuzzer, folder / "chats.jsonl", folder / "out" / str(i), tokenizer)
        script = choose.choice([prepare_data, pretrain_gpt, sft_gpt, dpo_gpt])
        attempt_flags(fuzzer, script.Config)
    return fuzzer.counts


def attempt_text(fuzzer: Fuzzer, path: Path) -> None:
    import conftest

    import prepare_data
    import shards

    lines = mutated_rows([{"text": conftest.text(k)} for k in range(6)], fuzzer.choose)
    path.write_text(lines, errors="surrogatepass")
    config = prepare_data.Config(source=str(path), max_bad_rows=1.0)
    fuzzer.attempt("rows of text", lambda: list(shards.documents(config)), lambda: lines)


def attempt_conversations(fuzzer: Fuzzer, path: Path, out: Path, tokenizer) -> None:
    import conftest

    import sft
    import sft_gpt

    lines = mutated_rows([conftest.conversation(k, turns=2) for k in range(8)], fuzzer.choose)
    path.write_text(lines, errors="surrogatepass")
    limits = {"max_length": 64, "val_fraction": 0.3, "max_bad_rows": 0.5}

    def prepare():
        conversations = sft_gpt.conversations(sft_gpt.Config(data=str(path)))
        sft.prepare_conversations(out, conversations, tokenizer, **limits)

    fuzzer.attempt("rows of conversations", prepare, lambda: lines)
    shutil.rmtree(out, ignore_errors=True)


def attempt_flags(fuzzer: Fuzzer, config_class: type) -> None:
    from common import check_numbers, parse_config

    flags = [mutated_flag(config_class, fuzzer.choose) for _ in range(fuzzer.choose.choice([1, 1, 2]))]

    def parse():
        check_numbers(dataclasses.asdict(parse_config(config_class, flags)), ())

    fuzzer.attempt("flags", parse, lambda: flags)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_every_mutation_ends_in_success_or_one_sentence_soon_in_little_memory_and_elsewhere_nothing_changes(
    tmp_path,
):
    (tmp_path / "work").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "work" / "x").write_text("mine")  # what ../x would lead to
    before = snapshot(tmp_path / "mine")
    command = [sys.executable, __file__, str(tmp_path / "work"), "1000"]
    job = subprocess.run(command, capture_output=True, text=True, timeout=600)
    print(job.stdout)
    assert job.returncode == 0, job.stderr[-3000:]
    assert snapshot(tmp_path / "mine") == before and (tmp_path / "work" / "x").read_text() == "mine"
    assert "9,000 inputs" in job.stdout


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    place, number = Path(sys.argv[1]), int(sys.argv[2])
    prepare_inputs(place)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, resource.RLIM_INFINITY))
    tempfile.tempdir = str(place)
    results = fuzz(place, number)
    for name, count in sorted(results.items()):
        print(f"{count:6,}  {name}")
    print(f"{sum(results.values()):,} inputs, no trace, none over {SECONDS} s or 1 GB")
