"""Conversations whose rendering was killed: the next run goes on from the last note, to the same bytes."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import contents, conversation
from transformers import AutoTokenizer

import sft
from common import read_json

pytestmark = pytest.mark.slow

ROWS = 40
NOTED = ("open", "os.remove", "os.rename", "os.truncate", "os.mkdir", "shutil.rmtree", "a row")
NOTE_EVERY = 7  # rows
BATCH = 5  # rows that are rendered at once


def rows():
    for i in range(ROWS):
        sys.audit("a row", i)
        yield (None if i % 20 == 13 else conversation(i)["messages"]), f"row {i}"


def render(folder: Path, tokenizer, die_at: int) -> None:
    """Render in this process, which SIGKILL ends just before the so-manieth row is read or file is touched;
    0: never. The rows that are rendered are noted beside the folder."""
    events, seconds, render_batch = [], iter(range(10**6)), sft.render_batch
    log = os.open(folder.with_suffix(".rendered"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noted(conversations, tokenizer):
        os.write(log, b"." * len(conversations))
        return render_batch(conversations, tokenizer)

    def hook(event, arguments):
        ours = event == "a row" or (event in NOTED and str(folder.parent) in str(arguments[0]))
        if ours and die_at:
            events.append(event)
            if len(events) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sft.render_batch, sft.batched.__defaults__ = noted, (BATCH,)
    sft.time, sft.SECONDS_BETWEEN_NOTES = SimpleNamespace(monotonic=lambda: next(seconds)), NOTE_EVERY
    os.fsync = lambda descriptor: None  # a killed process loses nothing that it has written
    sys.addaudithook(hook)
    sft.prepare_conversations(folder, rows(), tokenizer, max_length=64, val_fraction=0.3, overlong="split")


def forked(*arguments) -> int:
    """The status of `render` in a process of its own, negative for a signal."""
    child = os.fork()
    if not child:
        status = 1
        try:
            render(*arguments)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_everywhere(folder: Path, tokenizer_dir: Path) -> list[tuple]:
    """Render undisturbed; then kill a run at each moment: the rows that its last note keeps, how many it has
    rendered, and how many the next run renders."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a thread would not survive a fork
    tokenizer, found = AutoTokenizer.from_pretrained(tokenizer_dir), []
    assert not forked(folder / "whole", tokenizer, 0)
    while True:
        data = folder / f"{len(found)}" / "data"
        data.parent.mkdir()
        if not (status := forked(data, tokenizer, len(found) + 1)):
            return found
        assert status == -signal.SIGKILL
        note, log = data.parent / ".data.partial" / "progress.json", data.with_suffix(".rendered")
        kept = read_json(note)["rows"] if note.exists() else 0
        done = log.stat().st_size
        assert not forked(data, tokenizer, 0)
        found.append((kept, done, log.stat().st_size - done))


def test_rendering_killed_at_any_file_and_any_row_goes_on_from_its_last_note(tokenizer_dir, tmp_path, fresh):
    found = fresh.submit(killed_everywhere, tmp_path, tokenizer_dir).result(300)
    expected, usable = contents(tmp_path / "whole"), [i % 20 != 13 for i in range(ROWS)]
    assert len(expected) == 7 and len(found) > 100
    for i, (kept, done, again) in enumerate(found):
        assert contents(tmp_path / f"{i}" / "data") == expected, i
        if done < sum(usable) or again:
            assert again == sum(usable[kept:]), (i, kept, done, again)
            assert sum(usable[:kept]) >= done - NOTE_EVERY - BATCH, (i, kept, done, again)
