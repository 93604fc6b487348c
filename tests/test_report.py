"""The page about a run."""

import html
import json
import re
from html.parser import HTMLParser

import pytest
from chromium import DESKTOP, PHONE, browser, needs_chromium
from conftest import pretrain_config, refused, run, sft_config, small_model, write_jsonl
from safetensors.torch import save_file

import chat
import pretrain_gpt
import report
import sft_gpt
from report import Run, chart, duration, report_end, short, ticks, write_report


@pytest.fixture(scope="session")
def chat_run(base_run, chats, tmp_path_factory):
    """A finished fine-tuning run."""
    out_dir = tmp_path_factory.mktemp("report") / "chat"
    sft_gpt.main(sft_config(base_run, chats, out_dir))
    return out_dir


class Seen(HTMLParser):
    """The texts of a page, and what its tags ask for."""

    def __init__(self, page: str):
        super().__init__()
        self.texts, self.tags, self.links, self.open = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "link", "br", "line", "polyline", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("line", "polyline", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def page_of(*folders) -> str:
    return write_report(*folders).read_text()


def test_a_finished_run_has_its_report_with_curves_texts_settings_and_commands(chat_run):
    page = (chat_run / "report.html").read_text()
    seen = Seen(page)
    text = "\n".join(seen.texts)
    assert not seen.open and page == page_of(chat_run)  # well-formed, and the same at any time
    rows = [json.loads(line) for line in (chat_run / "metrics.jsonl").read_text().splitlines()]
    first, last = (row["val_loss"] for row in (rows[0], rows[-1]))
    assert f"{first:.3f} → {last:.3f} nats/token" in text and "4 of 4" in text
    assert page.count("<svg") == 4 and "tokens/s, the median" in text and "float32" in text
    answers = [json.loads(line) for line in (chat_run / "answers.jsonl").read_text().splitlines()]
    for row in (answers[0], next(row for row in answers if row["step"] == 4)):
        assert report.shortened(row["answer"]) in seen.texts
    assert "What is water?" in seen.texts and "val_accuracy" in seen.texts and "stopped" in seen.texts
    assert "batch_tokens" in seen.texts and str(sft_gpt.Config().beta2) in seen.texts
    assert f"python chat.py --model={chat_run} --web" in seen.texts
    assert f"{chat.load(str(chat_run))[0].num_parameters():,}" in seen.texts


def test_the_page_needs_no_other_file_and_runs_no_script(chat_run):
    seen = Seen((chat_run / "report.html").read_text())
    assert seen.links == ["data:,"] and not {"script", "img", "iframe", "object"} & set(seen.tags)
    assert "url(" not in report.STYLE and "@import" not in report.STYLE


def test_a_pretraining_run_shows_what_it_wrote_and_how_it_is_fine_tuned(data_dir, tmp_path):
    out_dir = tmp_path / "base"
    pretrain_gpt.main(pretrain_config(data_dir, out_dir, samples=True))
    rows = [json.loads(line) for line in (out_dir / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0] * 3 + [3] * 3 + [6] * 3
    seen = Seen((out_dir / "report.html").read_text())
    for row in rows[:3] + rows[6:]:
        assert row["text"].startswith(pretrain_gpt.PROMPTS) and report.shortened(row["text"]) in seen.texts
    assert f"python sft_gpt.py --model={out_dir} --out_dir=out/chat" in seen.texts
    assert not any("python chat.py" in text for text in seen.texts)  # it is no chat model yet


def small_run(folder, *, facts=True, **changes):
    """A run's folder by hand."""
    folder.mkdir()
    rows = [{"step": 0, "val_loss": 3.0}]
    rows += [
        {"step": i, "loss": 3 - i / 10, "lr": 0.1, "tokens_per_second": 5e4, "seconds": 40} for i in (1, 2)
    ]
    write_jsonl(folder / "metrics.jsonl", [*rows, {"step": 2, "val_loss": 2.5, **changes}])
    settings = {"data": "mine.jsonl", "lr": 0.1, "seed": 0, **changes}
    if facts:
        known = {"max_steps": 2, "step_tokens": 100, "command": "sft_gpt.py --lr=0.1", "settings": settings}
        (folder / "run.json").write_text(json.dumps(known))
    return folder


def test_two_runs_are_compared_and_what_differs_is_marked(tmp_path):
    first, second = small_run(tmp_path / "a"), small_run(tmp_path / "b", lr=0.2)
    path = write_report(first, second)
    assert path == second / "report_a_b.html"
    page = path.read_text()
    marked = re.findall(r"<tr class=differs><th>(.*?)</th>", page)
    assert marked == ["lr"]
    for name in ("run0", "run1"):
        assert f'<polyline class="{name}"' in page and f'<polyline class="{name} marked"' in page
    seen = Seen(page)
    assert not seen.open and seen.texts.count("a") == 6 and "b validation" in seen.texts


def test_runs_whose_folders_have_the_same_name_are_told_apart_by_their_paths(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    first, second = (small_run(tmp_path / name / "base") for name in ("x", "y"))
    texts = Seen(page_of(first, second)).texts
    assert "base" not in texts and f"{first} validation" in texts and f"{second} validation" in texts


def test_runs_with_steps_of_other_sizes_are_drawn_over_tokens(tmp_path):
    first, second = small_run(tmp_path / "a"), small_run(tmp_path / "b")
    facts = json.loads((second / "run.json").read_text()) | {"step_tokens": 400}
    assert "by step" in page_of(first, second)
    (second / "run.json").write_text(json.dumps(facts))
    page = page_of(first, second)
    assert "by tokens" in page and "by step" not in page
    lines = re.findall(r'<polyline class="(run\d)" points="[\d.]+,[\d.]+ ([\d.]+),', page)
    ends = dict(lines[:2])
    assert float(ends["run0"]) < float(ends["run1"]) == 388  # 200 tokens, and 800 at the right edge


def test_text_that_looks_like_html_is_shown_as_text(tmp_path):
    evil = "<script>alert(1)</script><b>\"'&amp;"
    folder = small_run(tmp_path / "<b>a&b", **{evil: 1})
    write_jsonl(folder / "answers.jsonl", [{"step": 2, "question": evil, "answer": evil}])
    page = page_of(folder)
    seen = Seen(page)
    assert not {"script", "b"} & set(seen.tags) and not seen.open
    assert seen.texts.count(evil) >= 3 and html.escape(evil) in page


def test_a_run_of_before_run_json_has_a_report_too(tmp_path):
    page = page_of(small_run(tmp_path / "old", facts=False))
    assert "Summary" in page and "Settings" not in page and "3.000 → 2.500" in page


def test_a_stopped_run_tells_the_command_that_goes_on(tmp_path):
    folder = small_run(tmp_path / "a")
    assert "It was made by:" in page_of(folder)
    facts = json.loads((folder / "run.json").read_text()) | {"max_steps": 9}
    (folder / "run.json").write_text(json.dumps(facts))
    texts = Seen(page_of(folder)).texts
    place = texts.index("It is not finished; the same command continues it:")
    assert texts[place + 1] == "python sft_gpt.py --lr=0.1"
    (folder / "run.json").write_text(json.dumps(facts | {"launcher": "torchrun --nproc_per_node=2"}))
    assert "torchrun --nproc_per_node=2 sft_gpt.py --lr=0.1" in Seen(page_of(folder)).texts


def test_losses_of_skipped_steps_and_what_is_not_finite_are_left_out(tmp_path):
    folder = small_run(tmp_path / "a")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 40.0, "lr": 0.1, "skipped": "its loss of 40.000 is a spike"}\n')
        file.write('{"step": 4, "loss": null, "lr": 0.1, "skipped": "its loss is nan"}\n')
        file.write('{"step": 5, "val_loss": Infinity}\n7\n{"note": "a row without a step"}\n')
    text = "\n".join(Seen(page_of(folder)).texts)
    assert "2, the last because its loss is nan" in text and Run.read(folder).curve("loss")[-1] == (2, 2.8)


def test_a_report_that_fails_is_told_and_fails_no_run(tmp_path, capsys, monkeypatch):
    folder = small_run(tmp_path / "a")
    monkeypatch.setattr(report, "page", lambda runs: 1 / 0)
    report_end(folder)
    told = capsys.readouterr()
    assert "ZeroDivisionError" in told.err and f"python report.py {folder} tries again" in told.err
    assert not told.out and not (folder / "report.html").exists()


WRONG = [
    ([], "0 folders were named; expected a run's folder, or two to compare"),
    (["a", "b", "c"], "3 folders were named"),
    (["nowhere"], "nowhere holds no metrics.jsonl with rows; name a training run's --out_dir"),
]


def test_weights_in_several_files_are_counted_together(tmp_path, capsys):
    checkpoint, model = tmp_path / "step_0000001", small_model()
    checkpoint.mkdir()
    tensors = sorted(model.state_dict().items())
    places = {name: f"model-{i % 2}.safetensors" for i, (name, _) in enumerate(tensors)}
    for file in set(places.values()):
        save_file({name: t for name, t in tensors if places[name] == file}, checkpoint / file)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert Run.read(tmp_path).parameters() == model.num_parameters()
    (checkpoint / "model-1.safetensors").unlink()
    assert Run.read(tmp_path).parameters() is None and "cannot be read" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_one_sentence(tmp_path, monkeypatch):
    def replace_file(*_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    monkeypatch.setattr(report, "replace_file", replace_file)
    refused("report.html cannot be written .*copy the run to a folder of yours", write_report, tmp_path)


@pytest.mark.parametrize(("arguments", "words"), WRONG)
def test_what_cannot_be_reported_is_refused(arguments, words):
    refused(re.escape(words), report.main, arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "words"), WRONG)
def test_the_command_tells_what_cannot_be_reported_in_one_sentence(arguments, words, tmp_path):
    result = run("report.py", *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "") and result.stderr.startswith(f"error: {words}")


@pytest.mark.slow
def test_the_command_prints_where_the_page_is(tmp_path):
    folder = small_run(tmp_path / "a")
    result = run("report.py", str(folder))
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{folder}/report.html\n", "")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.1, 3.9), (0, 3e-6), (-2, 7), (0, 123456), (5, 5.0001)])
def test_ticks_are_a_few_round_numbers_within_the_axis(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 8 and low - 1e-9 <= found[0] and found[-1] <= high * (1 + 1e-9)
    assert len({short(value) for value in found}) == len(found) or high - low < 1e-3


@pytest.mark.parametrize("points", [[(5, 2.0)], [(0, 0.0), (1, 0.0)], [(0, 3.0), (9, 3.0)]])
def test_a_curve_that_is_a_point_or_flat_can_be_drawn(points):
    for from_zero in (False, True):
        drawn = chart("x", [report.Series("", points, "run0")], from_zero=from_zero)
        places = re.search(r'<polyline class="run0" points="([^"]*)"', drawn)[1].split()
        assert len(places) == len(points)
        for place in places:
            right, down = map(float, place.split(","))
            assert 0 <= right <= report.WIDTH and 0 <= down <= report.HEIGHT


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    points = [(i, float(i % 7)) for i in range(100_001)]
    few = report.thinned(points)
    assert len(few) <= report.POINTS + 1 and (few[0], few[-1]) == (points[0], points[-1])


def test_numbers_and_times_are_short():
    assert [short(v) for v in (0.003, 4.4212, 12345, 1.2e6, 3e9)] == [
        "0.003",
        "4.421",
        "12.35k",
        "1.2M",
        "3B",
    ]
    assert [duration(s) for s in (12.4, 200, 14700)] == ["12 s", "3 min 20 s", "4 h 05 min"]


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_in_a_browser_the_page_fits_its_window(size, tmp_path, chat_run):
    other = small_run(tmp_path / "other")
    with browser(tmp_path / "browser") as tab:
        for path in (chat_run / "report.html", write_report(chat_run, other)):
            tab.open(f"file://{path}", size)
            assert not tab.overflows() and not tab.errors
            widths = tab.run("[...document.querySelectorAll('svg')].map(e => e.clientWidth)")
            assert len(widths) == 4 and min(widths) > 300
