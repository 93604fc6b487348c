"""Reading text and rows from files, folders and the hub."""

import gzip
import hashlib
import json
import os
import re
import tracemalloc
from pathlib import Path

import pytest
from conftest import ODD_TEXTS, TEXTS, prepare, prepare_config, refused, text, write_jsonl

import shards
import sources
from sources import hash_fraction

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_reading_a_file_takes_memory_for_some_of_its_rows_only(tmp_path, suffix):
    row, path = json.dumps({"text": "x" * 4000}).encode() + b"\n", tmp_path / f"texts{suffix}"
    with compressed(path) as file:
        for _ in range(4000):
            file.write(row)
    next(sources.source_rows(str(path), "", ""))
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    try:
        used = 0
        for n, _ in enumerate(sources.source_rows(str(path), "", "")):
            if n % 100 == 0:
                used = max(used, pyarrow.total_allocated_bytes() - before)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n == 3999 and peak + used < 4_000_000  # of 16,000,000


@pytest.mark.parametrize("groups", [1, 10])
def test_reading_a_parquet_file_takes_memory_for_some_of_its_rows_only(tmp_path, groups):
    texts = [os.urandom(2000).hex() for _ in range(4000)]
    table, path = pyarrow.table({"text": texts}), tmp_path / "texts.parquet"
    pyarrow.parquet.write_table(table, path, 4000 // groups, use_dictionary=False, compression="none")
    del table
    before, used = pyarrow.total_allocated_bytes(), []
    for (row, _), expected in zip(sources.source_rows(str(path), "", ""), texts):
        assert row["text"] == expected
        used.append(pyarrow.total_allocated_bytes() - before)
    assert len(used) == 4000 and max(used) < 8_000_000  # of 16,000,000


def test_a_long_txt_file_is_cut_at_line_ends_into_pieces_that_join_to_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "TXT_PIECE", 300)
    whole = "\n".join(TEXTS) + "\n" + "no line end " * 100 + "zażółć"
    (tmp_path / "long.txt").write_text(whole, encoding="utf-8")
    pieces = [row["text"] for row, _ in sources.source_rows(str(tmp_path / "long.txt"), "", "")]
    assert "".join(pieces) == whole and len(pieces) > 10
    assert max(map(len, pieces)) <= 600
    assert all(piece.endswith("\n") for piece in pieces[: len(TEXTS) // 3])


def compressed(path: Path):
    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    return pyarrow.output_stream(str(path), compression=codec)


def write_kind(folder: Path, kind: str, texts: list[str]) -> str:
    """The texts as a source of this kind; returns what --source takes."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)).encode()
    path = folder / f"texts.{kind.removesuffix(' in frames').removesuffix(' folder')}"
    if kind == "parquet":
        table = pyarrow.table({"id": range(len(texts)), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    elif kind == "txt":
        for i, t in enumerate(texts):
            (folder / f"{i:03d}.txt").write_text(t, encoding="utf-8", newline="")
        return str(folder)
    elif kind == "mixed folder":
        write_kind(folder / "b" / "c", "jsonl.gz", texts[20:])
        write_kind(folder / "b", "parquet", texts[30:])
        write_kind(folder / "a", "jsonl", texts[:20])
        (folder / "b" / "notes.md").write_text("not a source")
        return f"{folder}/a,{folder}/b/c/texts.jsonl.gz"
    else:
        frames = [raw[:1000], raw[1000:1001], raw[1001:]] if kind.endswith(" in frames") else [raw]
        for frame in frames:
            with compressed(folder / f"frame{path.suffix}") as file:
                file.write(frame)
            with open(path, "ab") as file:
                file.write((folder / f"frame{path.suffix}").read_bytes())
            (folder / f"frame{path.suffix}").unlink()
    return str(path)


KINDS = [
    "jsonl",
    "jsonl.gz",
    "jsonl.zst",
    "jsonl.gz in frames",
    "jsonl.zst in frames",
    "parquet",
    "txt",
    "mixed folder",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_documents(tmp_path, kind):
    texts = [*TEXTS, ODD_TEXTS[0], ODD_TEXTS[1]]
    source = write_kind(tmp_path / "source", kind, texts)
    assert [row.text for row in shards.documents(prepare_config(tmp_path, source, ""))] == texts


def test_a_folder_is_read_in_the_order_of_its_paths_whatever_they_hold(tmp_path):
    for name, part in (("a/z", TEXTS[:5]), ("b", TEXTS[5:9]), ("c/d/e", TEXTS[9:20])):
        write_kind(tmp_path / name, {"a/z": "parquet", "b": "jsonl.zst", "c/d/e": "txt"}[name], part)
    assert [row.text for row in shards.documents(prepare_config(tmp_path, tmp_path, ""))] == TEXTS[:20]


def test_texts_without_a_letter_are_left_out_and_another_column_can_be_named(tmp_path):
    rows = [{"body": t} for t in (" \n", "one", "", "two", "\t")]
    path = write_jsonl(tmp_path / "texts.jsonl", rows)
    path.write_text(path.read_text().replace("\n", "\n\n"))
    assert [row.text for row in shards.documents(prepare_config(tmp_path, path, "", column="body"))] == [
        "one",
        "two",
    ]


def test_a_hub_dataset_is_streamed_and_its_rows_are_the_documents(monkeypatch, tmp_path):
    asked = []

    def load_dataset(*arguments, **keywords):
        asked.append((arguments, keywords))
        return datasets.IterableDataset.from_generator(lambda: ({"text": t} for t in TEXTS))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("sample-10BT", ""):
        config = prepare_config(tmp_path, "some/dataset", "", config=name, split="validation")
        assert [row.text for row in shards.documents(config)] == TEXTS
        assert asked.pop() == (
            ("some/dataset", name or None),
            {"split": "validation", "revision": None, "streaming": True},
        )


def test_a_hub_dataset_that_cannot_be_had_is_refused(tmp_path, source, tokenizer_dir):
    refused(
        "no file or folder nobody/nothing, and no dataset", prepare, tmp_path, "nobody/nothing", tokenizer_dir
    )


def test_a_hub_stream_that_breaks_off_is_refused_with_the_row_it_reached(monkeypatch):
    def rows():
        yield from ({"text": t} for t in TEXTS[:3])
        raise ConnectionError("server disconnected")

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    refused("some/dataset broke off after row 3", list, sources.source_rows("some/dataset", "", "train"))


def raw(name: str, value: bytes):
    """A source of these bytes."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(value)
        return folder / name

    return make


ROW, GOOD = b'{"text": "fine"}\n', b'{"text": "fine"}\n' * 2


BAD_SOURCES = {
    "missing": (lambda folder: folder / "no.jsonl", r"no.jsonl does not exist"),
    "one of two missing": (lambda folder: f"{raw('a.txt', b'x')(folder)},{folder}/b", r"/b does not exist"),
    "empty folder": (lambda folder: folder, r"holds nothing to read; expected .*\.jsonl"),
    "unknown suffix": (raw("a.csv", b"text\nfine\n"), r"a.csv holds nothing to read"),
    "empty jsonl": (raw("a.jsonl", b""), r"a.jsonl holds no text"),
    "empty txt": (raw("a.txt", b" \n"), r"a.txt holds no text"),
    "empty gz": (raw("a.jsonl.gz", b""), r"a.jsonl.gz"),
    "empty parquet": (raw("a.parquet", b""), r"a.parquet cannot be read"),
    "no such column": (
        raw("a.jsonl", b'{"body": "x", "id": 1}\n'),
        r"row 1 of .*no column 'text', only 'body', 'id'",
    ),
    "no columns": (
        raw("a.jsonl", b"{}\n"),
        r"row 1 of .*no column 'text', only none; name one with --column",
    ),
    "not a string": (raw("a.jsonl", GOOD + b'{"text": 5}\n'), r"row 3 of .*'text' is int, not str"),
    "null": (raw("a.jsonl", GOOD + b'{"text": null}\n'), r"row 3 of .*'text' is NoneType, not str"),
    "not an object": (raw("a.jsonl", GOOD + b'["text"]\n'), r"row 3 of .*it is list, not a JSON object"),
    "invalid JSON": (raw("a.jsonl", GOOD + b'{"text": "cut\n'), r"row [23].*a.jsonl|a.jsonl.*row [23]"),
    "jsonl in Latin-1": (
        raw("a.jsonl", GOOD + b'{"text": "caf\xe9"}\n'),
        r"row 3 of .*a.jsonl: it is damaged .*utf-8",
    ),
    "txt in Latin-1": (raw("a.txt", b"caf\xe9\n"), r"a.txt is no UTF-8 beyond row 0"),
    "txt cut within a character": (raw("a.txt", b"caf\xc3"), r"a.txt cannot be read.*damaged or cut short"),
    "half of a surrogate pair": (raw("a.jsonl", GOOD + b'{"text": "x\\ud800"}\n'), r"row 3 of .*a.jsonl"),
    "gz that is none": (raw("a.jsonl.gz", GOOD), r"a.jsonl.gz cannot be read"),
    "zst that is none": (raw("a.jsonl.zst", GOOD), r"a.jsonl.zst cannot be read"),
    "gz with a wrong checksum": (
        raw("a.jsonl.gz", gzip.compress(GOOD)[:-8] + bytes(4) + gzip.compress(GOOD)[-4:]),
        r"a.jsonl.gz cannot be read",
    ),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
@pytest.mark.parametrize("kind", ["given", "train"])
def test_a_bad_source_is_refused_in_one_sentence_that_names_it(tmp_path, tokenizer_dir, name, kind):
    make, match = BAD_SOURCES[name]
    (tmp_path / "in").mkdir()
    chosen = {"tokenizer": tokenizer_dir} if kind == "given" else {"tokenizer": "train", "vocab_size": 300}
    refused(match, prepare, tmp_path / "out", source=make(tmp_path / "in"), **chosen)
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_a_compressed_file_cut_short_anywhere_is_refused_by_name(tmp_path, kind):
    path = Path(write_kind(tmp_path, kind, TEXTS))
    whole = path.read_bytes()
    cuts = {
        0,
        1,
        2,
        3,
        10,
        17,
        18,
        *range(20, len(whole), len(whole) // 20),
        *range(len(whole) - 12, len(whole)),
    }
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        refused(f"{path} cannot be read", list, sources.source_rows(str(path), "", ""))


def test_the_side_is_the_first_48_bits_of_the_text_s_sha256():
    texts = [text(i) for i in range(1000)] + ODD_TEXTS
    for t in texts:
        assert hash_fraction(t) == int(hashlib.sha256(t.encode()).hexdigest()[:12], 16) / 2**48
    assert 60 < sum(hash_fraction(t) < 0.1 for t in texts) < 140


@pytest.mark.parametrize("source", ["", ",", "a.txt,", ",a.txt", "a.txt, ,b.txt"])
def test_an_empty_name_in_a_source_is_refused_and_reads_no_folder(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("private")
    refused("has an empty name in it", sources.source_files, source)


def test_linked_folders_are_read_once_and_circles_end(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / f"{folder.name}.txt").write_text("x")
    (inside / "linked").symlink_to(outside)
    (inside / "again").symlink_to(outside)
    (outside / "circle").symlink_to(inside)
    names = [path.name for path in sources.source_files(str(inside))]
    assert sorted(names) == ["in.txt", "out.txt"]


def test_a_file_that_two_names_lead_to_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("in/a.txt", "b.txt"):
        (tmp_path / name).write_text("x")
    for source in (f"{tmp_path},{tmp_path}/in", f"{tmp_path}/b.txt,{tmp_path}/in,{tmp_path}/b.txt"):
        refused(r"\.txt is in the source twice, by .* and by .*; name it once", sources.source_files, source)
    assert len(sources.source_files(f"{tmp_path}/b.txt,{tmp_path}/in")) == 2
    (tmp_path / "in" / "latest.txt").symlink_to("a.txt")
    told = f"{tmp_path}/in: latest.txt is the same file as a.txt; both are read"
    assert (
        sources.folder_notes(f"{tmp_path}/in") == [told] and len(sources.source_files(f"{tmp_path}/in")) == 2
    )


def test_a_link_to_nothing_is_refused_by_name(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    refused("b.txt is no file, or a link to nothing", sources.source_files, str(tmp_path))


def test_a_folder_that_cannot_be_searched_is_refused_and_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "a.txt").write_text("x")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def guarded(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    refused("closed cannot be searched for files .Permission denied", sources.source_files, str(tmp_path))


def test_a_parquet_row_that_is_no_utf8_is_one_bad_row(tmp_path):
    raw = [b"one", b"caf\xe9", b"three"] * 100
    buffers = pyarrow.array(raw, pyarrow.binary()).buffers()
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(raw), buffers)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    config = prepare_config(tmp_path, tmp_path / "a.parquet", "", max_bad_rows=0.4)
    bad_rows = sources.BadRows(0.4)
    assert [row.text for row in shards.documents(config, bad_rows)] == ["one", "three"] * 100
    assert bad_rows.bad == 100 and bad_rows.rows == 300
    assert "row 2 of" in bad_rows.first and "'utf-8' codec" in bad_rows.first


def test_a_row_of_a_hub_stream_that_is_no_utf8_is_one_bad_row(tmp_path):
    """`datasets` reads the folder as it reads one of the hub."""
    raw = [b"one", b"caf\xe9", b"three"] * 200
    buffers = pyarrow.array(raw, pyarrow.binary()).buffers()
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(raw), buffers)
    table = pyarrow.table({"text": column, "number": range(len(raw))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows = list(sources.hub_rows(sources.hub_stream(str(tmp_path), "", "train"), 0, str(tmp_path)))
    assert [where for _, where in rows] == [f"row {i} of {tmp_path}" for i in range(1, 601)]
    for i, (row, _) in enumerate(rows[1::3]):  # what is whole of the row stays
        assert isinstance(row["text"], ValueError) and "'utf-8' codec" in str(row["text"])
        assert row["number"] == 3 * i + 1
    for first, said in ((0, "one"), (2, "three")):
        expected = [{"text": said, "number": i} for i in range(first, 600, 3)]
        assert [row for row, _ in rows[first::3]] == expected


def test_a_parquet_column_that_python_cannot_represent_does_no_harm_to_the_text(tmp_path):
    """A date beyond the year 9999; asked for itself, it is a damaged one."""
    when = pyarrow.array([0, 2**48, 1], pyarrow.timestamp("s"))
    table = pyarrow.table({"text": ["one", "two", "three"], "when": when})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    config = prepare_config(tmp_path, tmp_path / "a.parquet", "")
    assert [row.text for row in shards.documents(config)] == ["one", "two", "three"]
    row = [row for row, _ in sources.source_rows(str(tmp_path / "a.parquet"), "", "")][1]
    with pytest.raises(ValueError, match="its 'when' is damaged"):
        sources.column_of(row, "when")


def test_the_mark_that_windows_editors_put_first_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello\n")
    assert [row for row, _ in sources.source_rows(str(tmp_path / "a.txt"), "", "")] == [{"text": "hello\n"}]


def test_files_that_are_not_read_are_told(tmp_path, tokenizer_dir, capsys):
    (tmp_path / "in/.cache").mkdir(parents=True)
    for name in (
        "a.jsonl",
        "b.json.gz",
        "c.txt.gz",
        "D.TXT",
        "READ",
        "README.md",
        "e.00017.json",
        ".hidden",
        ".cache/d.lock",
    ):
        (tmp_path / "in" / name).write_text('{"text": "one"}\n')
    told = f"{tmp_path}/in: 5 files are not read (.TXT, .json, .json.gz, .txt.gz, READ); names must end in"
    assert sources.folder_notes(f"{tmp_path}/in")[0].startswith(told)
    assert sources.folder_notes("some/dataset") == sources.folder_notes(f"{tmp_path}/in/a.jsonl") == []
    prepare(tmp_path / "out", tmp_path / "in", tokenizer_dir, val_fraction=1e-9, max_tokens=1000)
    said = capsys.readouterr().out
    assert told in said and re.search(r"the source ended after \d+ tokens, before --max_tokens=1,000\n", said)


def test_hidden_files_and_folders_are_not_read_unless_they_are_named(tmp_path):
    for name in ("a.jsonl", "._a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"text": "one"}\n')
    assert sources.source_files(str(tmp_path)) == [tmp_path / "a.jsonl"]
    assert len(sources.source_files(str(tmp_path / ".ipynb_checkpoints"))) == 1


def test_a_folder_with_a_test_split_in_it_is_read_whole_and_told_so(tmp_path):
    for name in ("train-00000.jsonl", "test-00000.jsonl", "testimony.jsonl"):
        (tmp_path / name).write_text('{"text": "one"}\n')
    (note,) = sources.folder_notes(str(tmp_path))
    assert "all 3 files are read, test-00000.jsonl too" in note


@pytest.mark.parametrize("split", ["test", "nonsense"])
def test_another_split_than_train_of_local_files_is_refused(split, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    words = f"is read whole, and the split '{split}' is for datasets of the hub"
    refused(f"{words}.*, as {split},train", list, sources.source_rows(str(tmp_path), "", split))
    assert len(list(sources.source_rows(str(tmp_path), "", "train_prefs"))) == 1


def test_commas_join_files_only_and_the_way_to_mix_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    words = "commas join files and folders only; sft_gpt.py mixes any sources by weights, as embedded:0.5"
    refused(words, sources.source_files, f"embedded,{tmp_path}/a.jsonl")


def test_rows_damaged_anywhere_have_one_reason(tmp_path):
    (tmp_path / "a.jsonl").write_text("[\n" + "".join(f"{' ' * n}oops\n" for n in range(5)))
    reasons = set()
    for row, _ in sources.source_rows(str(tmp_path / "a.jsonl"), "", ""):
        with pytest.raises(ValueError) as caught:
            sources.column_of(row, "text")
        reasons.add(str(caught.value))
    assert reasons == {"it is damaged; expected a JSON object in one line"}
