"""The recipe that cleans a corpus with datatrove and ends in our shards."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import ROOT, prepare, read_documents, text, write_jsonl

import shards

pytestmark = pytest.mark.slow


@pytest.mark.skipif(not find_spec("datatrove"), reason="datatrove is not installed")
def test_what_datatrove_leaves_of_a_corpus_becomes_shards_by_any_number_of_processes(
    tokenizer, tokenizer_dir, tmp_path
):
    texts = [" ".join(text(i) for i in range(k, k + 1 + k % 9)) for k in range(60)]
    (tmp_path / "crawl" / "below").mkdir(parents=True)
    for k in range(3):
        rows = ({"id": str(i), "text": texts[i]} for i in range(k, 60, 3))
        write_jsonl(tmp_path / "crawl" / ("below" if k else "") / f"{k}.jsonl", rows)
    recipe = [sys.executable, str(ROOT / "docs" / "clean_with_datatrove.py"), "crawl", "clean"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([*recipe, "--tasks=3", "--least_words=100"], **options)
    assert done.returncode == 0, done.stderr
    expected = [text for text in texts if len(text.split()) >= 100]
    assert 10 < len(expected) < 50
    for part in ("1/2", "2/2"):
        prepare(tmp_path / "parts", tmp_path / "clean", tokenizer_dir, part=part)
    for out in (tmp_path / "parts", prepare(tmp_path / "one", tmp_path / "clean", tokenizer_dir)):
        found = read_documents(out, "train", tokenizer) + read_documents(out, "val", tokenizer)
        assert sorted(found) == sorted(expected)
    for other in ("--tasks=4", "--least_words=90"):  # marks of finished tasks know neither
        done = subprocess.run([*recipe, "--tasks=3", "--least_words=100", other], **options)
        assert done.returncode == 1 and "clean was made with other settings, see clean.logs" in done.stderr
    assert shards.PARTS not in [path.name for path in (tmp_path / "parts").iterdir()]
