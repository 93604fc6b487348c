"""Conversations shown as they will be trained."""

import re

import pytest
from conftest import conversation, refused, run, write_jsonl

import preview
from common import IGNORE
from preview import Config, for_terminal, pieces_of_text
from sft import render_chatml


def shown(tmp_path, base_run, rows, capsys, **changes) -> str:
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    preview.main(Config(model=str(base_run), data=str(data), **changes))
    return capsys.readouterr().out


def test_each_token_is_shown_once_marked_if_it_is_trained_on(tokenizer):
    ids, labels = render_chatml(conversation(3, turns=3)["messages"], tokenizer)
    stretches = list(pieces_of_text(ids, labels, tokenizer))
    assert "".join(text for text, _ in stretches) == tokenizer.decode(ids)
    trained = [label for label in labels if label != IGNORE]
    assert "".join(text for text, kept in stretches if kept) == tokenizer.decode(trained)
    assert [kept for _, kept in stretches] == [False, True] * 3 + [False]  # the newline at the end


def test_answers_stand_in_brackets_and_the_summary_counts_what_is_cut(base_run, tmp_path, capsys):
    rows = [conversation(i, turns=1) for i in range(4)] + [{"messages": None}]
    out = shown(tmp_path, base_run, rows, capsys, show=1)
    answer = rows[0]["messages"][1]["content"]
    assert f"<|im_start|>assistant\n[[{answer}<|im_end|>]]\n" in out
    assert "4 of 5 conversations are trained on, in 4 pieces" in out and "turns: 4 of 2" in out
    assert "1 left out: messages is no list of objects" in out
    share = re.search(r"([\d,]+) of ([\d,]+) tokens are trained on", out)
    assert 0 < int(share[1]) < int(share[2])
    assert "\n0 tokens of answers are cut" in out
    assert "\n0 tokens of answers are cut" not in shown(
        tmp_path, base_run, rows, capsys, show=1, max_length=36
    )


def test_what_is_trained_on_is_shown_as_chosen(base_run, tmp_path, capsys):
    contents = ("?", "<think>h</think>bb", "?", "cc")
    roles = ("user", "assistant") * 2
    rows = [{"messages": [{"role": role, "content": content} for role, content in zip(roles, contents)]}]
    out = shown(tmp_path, base_run, rows, capsys)
    assert "[[<think>h</think>bb<" in out and "[[cc<" in out and "are trained on, in 1 pieces" in out
    out = shown(tmp_path, base_run, rows, capsys, train_on="last")
    assert "\n<think>h</think>bb<" in out and out.count("[[") == 1 and "[[cc<" in out
    out = shown(tmp_path, base_run, rows, capsys, reasoning="drop")
    assert "[[<think>h</think>bb<" in out and "\nbb<" in out and "[[cc<" in out and "in 2 pieces" in out
    assert "turns: 1 of 4" in out
    refused("--reasoning=hide", preview.main, Config(model=str(base_run), reasoning="hide"))


def test_a_source_in_which_nothing_would_be_trained_on_is_refused_with_the_reason(base_run, tmp_path, capsys):
    for rows, reason in (
        ([{"messages": [{"role": "user", "content": "Alone"}]}], "no answer|assistant"),
        ([conversation(1, turns=1)] * 3, "no answer begins within 4 tokens"),
    ):
        data = write_jsonl(tmp_path / "data.jsonl", rows)
        config = Config(model=str(base_run), data=str(data), max_length=4)
        told = f"nothing in .*data.jsonl would be trained on .the first conversation: .*({reason})"
        refused(told, preview.main, config)


def test_text_that_looks_like_html_or_terminal_codes_is_shown_as_text(base_run, tmp_path, capsys):
    odd = "<script>alert(1)</script> \x1b[31mred & </pre>"
    rows = [{"messages": [{"role": "user", "content": odd}, {"role": "assistant", "content": odd}]}]
    out = shown(tmp_path, base_run, rows, capsys, html=str(tmp_path / "page.html"))
    assert "\x1b" not in out and "\\x1b[31m" in out
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("</pre>") == page.count("<pre>") == 2 and page.count("<mark>") == 1
    assert not re.search("https?://", page)


def test_the_sources_of_a_mix_are_shown_one_after_the_other(base_run, tmp_path, capsys):
    first, second = (
        write_jsonl(tmp_path / f"{name}.jsonl", [conversation(i, turns=1)])
        for i, name in enumerate(("talk", "facts"))
    )
    preview.main(Config(model=str(base_run), data=f"{first}:3,{second}:0"))
    out = capsys.readouterr().out
    for number, path in enumerate((first, second)):
        assert f"\n{path}\n1 of 1 conversations are trained on" in out
        assert f"[[{conversation(number, turns=1)['messages'][1]['content']}<|im_end|>]]" in out


def test_a_page_that_cannot_be_written_is_one_sentence(base_run, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [conversation(1, turns=1)])
    config = Config(model=str(base_run), data=str(data), html=str(tmp_path / "no" / "page.html"))
    refused("page.html cannot be written", preview.main, config)


@pytest.mark.slow
def test_a_terminal_gets_colours_and_a_pipe_none(base_run, tmp_path):
    assert for_terminal([("a", False), ("b", True)], True) == "a\033[32mb\033[0m"
    data = write_jsonl(tmp_path / "data.jsonl", [conversation(1, turns=1)])
    done = run("preview.py", f"--model={base_run}", f"--data={data}")
    assert done.returncode == 0 and "\033" not in done.stdout and "[[" in done.stdout, done.stderr
