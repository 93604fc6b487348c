"""What the scripts promise of the Hugging Face hub, proved against a stand-in for it on loopback.

The libraries read HF_ENDPOINT as they are imported, and that takes seconds: so one worker process imports all
once, and forks for each run of a script.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import conftest
import pytest
from conftest import ROOT, conversation, flags, losses, sft_config, small_model, text, write_jsonl

import prepare_data
import sft_gpt
from gpt import GPTModel

pytestmark = pytest.mark.skipif(not find_spec("datasets"), reason="datasets is not installed")

FAULTS = (429, 500, 503, "drop")  # that end after a while
COMMIT = "c0ffee" * 6 + "c0de"
ROWS = 600  # two batches of documents, and some
PARTS = [[text(i) for i in range(k * ROWS, (k + 1) * ROWS)] for k in range(3)]  # a file each
TEXTS = {"parquet": {}, "jsonl": {"source": "someone/lines", "config": ""}}  # both have all parts

WORKER = """
import gc, importlib, json, os, signal, sys, time, traceback
import datasets, huggingface_hub, pandas, pyarrow.parquet
from transformers import AutoTokenizer, PreTrainedTokenizerFast
import chat, common, prepare_data, sft_gpt, shards

datasets.config.USE_PARQUET_EXPORT = False  # it would look up the host datasets-server.127.0.0.1
shards.BATCH_DOCUMENTS, shards.SAVE_EVERY = 16, 2000
gc.freeze()  # the forks share these objects
for line in sys.stdin:
    script, arguments, folder = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    signal.alarm(60)
    for stream, name in (1, "stdout"), (2, "stderr"):
        os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    waits, status = [], 0
    time.sleep = waits.append  # the libraries' waits between retries are added up, not waited
    sys.argv = [script, *arguments]
    module = importlib.import_module(script)
    try:
        common.run_script(module.main, module.Config)
    except SystemExit as end:  # as Python itself does
        status = end.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        status = 2
        traceback.print_exc()
    with open(f"{folder}/waited", "w") as file:
        file.write(str(sum(waits)))
    sys.stdout.flush()
    os._exit(status)  # taking all the modules apart would take longer than the run
"""


# -- the stand-in --------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """Serves folder/models/… and folder/datasets/… as the hub does; notes each request's path in `log`.
    `newest` has the commits of repositories that changed; they lie in folder/datasets/NAME@COMMIT.

    `fault(path)` may ask for a wrong answer: a status, or "drop" for half of the right one and a hang-up.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0):
        super().__init__(("127.0.0.1", port), Answer)
        self.folder, self.log, self.fault, self.newest = folder, [], lambda path: None, {}
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @contextmanager
    def failing(self, fault):
        self.fault = fault
        try:
            yield
        finally:
            self.fault = lambda path: None

    @contextmanager
    def down(self):
        """While nothing listens on the port."""
        self.shutdown()
        self.server_close()
        try:
            yield
        finally:
            self.__init__(self.folder, self.server_port)


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.log.append(path)
        self.fault = self.server.fault(path)
        if isinstance(self.fault, int):
            wait = {"Retry-After": "7"} if self.fault in (429, 503) else {}
            return self.reply(self.fault, error="GatedRepo" if self.fault == 403 else "", **wait)
        api = re.fullmatch("/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)/?(.*))?", path)
        file = re.fullmatch("/(datasets/|)([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        kind, name = api.group(1, 2) if api else (file[1] or "models", file[2]) if file else ("", "nothing")
        newest, asked = self.server.newest.get(name, COMMIT), (api or file or [""] * 5)[4 if api else 3]
        commit = asked if asked and len(asked) == len(COMMIT) else newest
        repo = self.server.folder / kind / (f"{name}@{commit}" if name in self.server.newest else name)
        if not repo.is_dir():
            self.reply(404, error="RepoNotFound")
        elif file and (repo / file[4]).is_file():
            self.send_file((repo / file[4]).read_bytes())
        elif file or not (repo / (api[5] or "")).exists():
            self.reply(404, error="EntryNotFound")
        elif api[3] == "tree":
            below = (repo / api[5]).rglob if "recursive=true" in self.path else (repo / api[5]).glob
            self.reply_json([self.entry(p, repo) for p in sorted(below("*"))])
        else:
            files = [{"rfilename": str(p.relative_to(repo))} for p in sorted(repo.rglob("*")) if p.is_file()]
            self.reply_json({"id": name, "sha": commit, "siblings": files})

    do_HEAD = do_GET

    def entry(self, path: Path, repo: Path) -> dict:
        kind = "directory" if path.is_dir() else "file"
        return {"type": kind, "path": str(path.relative_to(repo)), "size": path.stat().st_size, "oid": COMMIT}

    def reply_json(self, value):
        self.reply(200, json.dumps(value).encode())

    def send_file(self, content: bytes):
        etag, size = f'"{hashlib.sha1(content).hexdigest()}"', len(content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.reply(200, content, ETag=etag)
        first, last = int(wanted[1]), min(int(wanted[2] or size), size - 1)
        span = {"Content-Range": f"bytes {first}-{last}/{size}"}
        self.reply(206, content[first : last + 1], ETag=etag, **span)

    def reply(self, status: int, body: bytes = b"", error: str = "", **headers):
        self.send_response(status)
        headers |= {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}
        for name, value in (headers | ({"X-Error-Code": error} if error else {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.fault == "drop":
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.fault == "drop" else body)

    def log_message(self, *_):
        pass


# -- what it serves, and the worker --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tokenizer, tokenizer_dir, tmp_path_factory):
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("hub")
    (folder / "models/someone").mkdir(parents=True)
    (folder / "models/someone/tokenizer").symlink_to(tokenizer_dir)
    small_model(max_position_embeddings=128).save_pretrained(folder / "models/someone/model", tokenizer)
    for name in ("texts/all", "texts/some", "lines", "odd", "cut", "script", "chats"):
        (folder / "datasets/someone" / name).mkdir(parents=True)
    data = folder / "datasets/someone"
    for k, part in enumerate(PARTS):
        write_jsonl(data / f"lines/train-{k}.jsonl", ({"text": t} for t in part))
        table = pyarrow.table({"id": range(ROWS), "text": part})
        pyarrow.parquet.write_table(table, data / f"texts/all/train-{k}.parquet", row_group_size=20)
    shutil.copy(data / "texts/all/train-0.parquet", data / "texts/some/train-0.parquet")
    configs = [{"config_name": name, "data_files": f"{name}/*"} for name in ("all", "some")]
    (data / "texts/README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    write_jsonl(data / "odd/train-0.jsonl", [{"text": "fine"}])
    write_jsonl(data / "odd/train-1.jsonl", [{"text": ["a", "list"]}])
    (data / "cut/train.parquet").write_bytes((data / "texts/all/train-0.parquet").read_bytes()[:-1000])
    (data / "script/script.py").write_text("")
    write_jsonl(data / "chats/train.jsonl", (conversation(i, turns=1 + i % 3) for i in range(120)))
    for path in list(folder.glob("*/someone/*")):  # other names for each, for what is not in the cache yet
        for word in ("new", "late", *(f"late{fault}" for fault in FAULTS)):
            path.with_name(f"{word}-{path.name}").symlink_to(path)
    with Hub(folder) as server:
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory) -> dict[str, str]:
    """Of a process that takes the stand-in for the hub."""
    rest = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    home = str(tmp_path_factory.mktemp("home"))
    return rest | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": home, "NO_PROXY": "*"}


@pytest.fixture(scope="module")
def worker(environment):
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process
        process.stdin.close()


@pytest.fixture
def run(worker, tmp_path):
    """Runs a script: its status, stdout and stderr, and the seconds it would have waited between retries."""

    def run(script: str, *arguments: str) -> SimpleNamespace:
        print(json.dumps([script, arguments, str(tmp_path)]), file=worker.stdin, flush=True)
        status = int(worker.stdout.readline())
        stdout, stderr, waited = ((tmp_path / n).read_text() for n in ("stdout", "stderr", "waited"))
        return SimpleNamespace(status=status, stdout=stdout, stderr=stderr, waited=float(waited))

    return run


def preparation(out_dir, source="someone/texts", tokenizer="someone/tokenizer", **changes):
    fields = {"config": "all", "val_fraction": 0.2, "shard_tokens": 5000, **changes}
    return prepare_data.Config(source=str(source), tokenizer=str(tokenizer), out_dir=str(out_dir), **fields)


@pytest.fixture(scope="module")
def local(hub, tokenizer_dir, tmp_path_factory):
    """Makes the preparation of the same texts from a local .jsonl with the local tokenizer: its bytes."""
    folder = tmp_path_factory.mktemp("local")
    source = write_jsonl(folder / "texts.jsonl", ({"text": t} for part in PARTS for t in part))

    def prepare(**changes):
        out_dir = folder / f"shards{changes}"
        prepare_data.main(preparation(out_dir, source, tokenizer_dir, **changes))
        return shards(out_dir)

    return prepare


def shards(folder: Path) -> dict[str, bytes]:
    """Name and bytes of the shards and of the tokenizer."""
    return {p.name: p.read_bytes() for p in [*folder.glob("*.bin"), folder / "tokenizer/tokenizer.json"]}


def succeeded(result) -> None:
    assert result.status == 0, result.stderr[-1500:]


def refused(result, *words: str) -> None:
    """The script ended with status 1 and, after the libraries' warnings, a sentence that has these words."""
    sentence = result.stderr.splitlines()[-1]
    assert result.status == 1, result.stderr[-1500:]
    assert sentence.startswith("error: ") and "Traceback" not in result.stderr, result.stderr[-1500:]
    for word in words:
        assert word in sentence


# -- data ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", TEXTS)
def test_a_hub_dataset_and_tokenizer_give_the_same_bytes_as_local_ones(kind, run, local, tmp_path):
    succeeded(run("prepare_data", *flags(preparation(tmp_path / "data", **TEXTS[kind]))))
    assert shards(tmp_path / "data") == local()


@pytest.mark.slow
def test_max_tokens_stops_before_the_other_files_are_downloaded(hub, environment, local, tmp_path):
    hub.log.clear()
    config = preparation(tmp_path / "data", max_tokens=2000)
    result = conftest.run("prepare_data.py", *flags(config), env=environment)  # with a real end of process
    assert result.returncode == 0, result.stderr
    assert shards(tmp_path / "data") == local(max_tokens=2000)
    assert {Path(path).name for path in hub.log if path.endswith(".parquet")} == {"train-0.parquet"}


@pytest.mark.slow
def test_processes_divide_the_files_of_a_hub_dataset(hub, run, tokenizer_dir, tmp_path):
    read = []
    for part in ("1/2", "2/2"):
        hub.log.clear()
        succeeded(run("prepare_data", *flags(preparation(tmp_path / "hub", part=part))))
        read.append({Path(path).name for path in hub.log if path.endswith(".parquet")})
        lines = hub.folder / "datasets/someone/lines"
        prepare_data.main(preparation(tmp_path / "local", lines, tokenizer_dir, part=part))
    assert read[0] == {"train-0.parquet", "train-2.parquet"}
    assert read[1] <= {"train-1.parquet", "train-0.parquet"}  # of the first datasets wants the columns
    assert shards(tmp_path / "hub") == shards(tmp_path / "local")


@pytest.mark.parametrize("fault", [500, "drop"])
def test_a_hub_that_fails_midway_is_told_and_the_same_command_continues_to_the_same_bytes(
    fault, hub, run, local, tmp_path
):
    command = "prepare_data", *flags(preparation(tmp_path / "data"))
    with hub.failing(lambda path: fault if path.endswith("train-2.parquet") else None):
        refused(run(*command), "file 3 of someone/texts broke off after row 0", "run the same command again")
    hub.log.clear()
    result = run(*command)
    succeeded(result)
    assert re.search(r"continuing after 1,\d* documents", result.stdout)
    asked = Counter(Path(path).name for path in hub.log)  # the file that is done for its columns alone
    assert asked["train-0.parquet"] == 1 and asked["train-1.parquet"] > 1 and asked["train-2.parquet"] > 1
    assert shards(tmp_path / "data") == local()


class Passing:
    """A fault that ends: each path that matches has it at the first so many requests."""

    def __init__(self, fault, pattern: str, times: int = 2):
        self.fault, self.pattern, self.times, self.met = fault, pattern, times, Counter()

    def __call__(self, path: str):
        if not re.search(self.pattern, path) or self.met[path] == self.times:
            return None
        self.met[path] += 1
        return self.fault


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("pattern", [r"\.parquet$", r"/api/", r"tokenizer"])
def test_a_hub_that_fails_for_a_while_is_asked_again_and_no_document_is_lost_or_doubled(
    fault, pattern, hub, run, local, tmp_path
):
    passing = Passing(fault, pattern)
    config = preparation(tmp_path / "data", "someone/late-texts", f"someone/late{fault}-tokenizer")
    with hub.failing(passing):
        result = run("prepare_data", *flags(config))
    succeeded(result)
    assert passing.met and result.waited < 300
    assert shards(tmp_path / "data") == local()


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_hub_that_fails_for_a_while_gives_models_and_conversations_all_the_same(fault, hub, run, tmp_path):
    commands = {"chat": chat(f"someone/late{fault}-model")}
    model = hub.folder / "models/someone/model"
    commands["sft"] = ["sft_gpt", *flags(sft_config(model, f"someone/late{fault}-chats", tmp_path / "hub"))]
    for command in commands.values():
        with hub.failing(Passing(fault, r"/api/|\.(safetensors|jsonl|json)$")):
            result = run(*command)
        succeeded(result)
        assert result.waited < 300
    sft_gpt.main(sft_config(model, hub.folder / "datasets/someone/chats", tmp_path / "local"))
    weights = [(tmp_path / name / "step_0000004/model.safetensors").read_bytes() for name in ("hub", "local")]
    assert weights[0] == weights[1]
    assert run(*commands["chat"]).stdout == run(*chat(model)).stdout


MISTAKES = {
    "configuration": ({"config": "nope"}, ["'nope' not found", "'all'", "'some'"]),
    "no configuration": ({"config": ""}, ["Config name is missing", "'all'", "'some'"]),
    "split": ({"split": "nope"}, ["nope", "'train'"]),
    "column": (
        {"column": "body"},
        ["row 1 of file 1 of someone/texts", "'body'", "'id', 'text'", "--column"],
    ),
    "dataset": ({"source": "someone/nothing"}, ["someone/nothing", "doesn't exist on the Hub"]),
    "tokenizer": ({"tokenizer": "someone/nothing"}, ["tokenizer", "someone/nothing"]),
    "dataset made by a script": ({"source": "someone/script", "config": ""}, ["scripts are no longer"]),
    "rows that differ": ({"source": "someone/odd", "config": ""}, ["file 2 of someone/odd", "row 0", "list"]),
    "file cut short": ({"source": "someone/cut", "config": ""}, ["someone/cut", "magic bytes not found"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_about_hub_data_is_one_sentence_that_names_what_exists(mistake, run, tmp_path):
    changes, words = MISTAKES[mistake]
    refused(run("prepare_data", *flags(preparation(tmp_path / "data", **changes))), *words)


# -- models --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hub_model_fine_tunes_on_hub_data_to_the_same_bytes_as_on_local_copies(hub, run, tmp_path):
    succeeded(run("sft_gpt", *flags(sft_config("someone/model", "someone/chats", tmp_path / "hub"))))
    model, data = hub.folder / "models/someone/model", hub.folder / "datasets/someone/chats"
    sft_gpt.main(sft_config(model, data, tmp_path / "local"))
    mine, theirs = (GPTModel.from_pretrained(tmp_path / n / "step_0000004") for n in ("hub", "local"))
    start = GPTModel.from_pretrained(model).state_dict()
    for name, tensor in mine.state_dict().items():
        assert tensor.equal(theirs.state_dict()[name]) and not tensor.equal(start[name])


@pytest.mark.slow
def test_a_dataset_that_changes_is_rendered_anew_but_a_run_keeps_the_commit_it_began_with(hub, run, tmp_path):
    model, commits = hub.folder / "models/someone/model", ("a" * 40, "b" * 40)
    for i, commit in enumerate(commits):
        folder = hub.folder / f"datasets/someone/moving@{commit}"
        folder.mkdir()
        write_jsonl(folder / "train.jsonl", map(conversation, range(i * 60, i * 60 + 60)))

    def tune(name: str) -> list:
        config = sft_config(model, "someone/moving", tmp_path / name, cache_dir=str(tmp_path / "cache"))
        succeeded(run("sft_gpt", *flags(config)))
        return losses(tmp_path / name)

    hub.newest["someone/moving"] = commits[0]
    first = tune("first")
    hub.newest["someone/moving"] = commits[1]
    second = tune("second")
    assert first != second
    with hub.down():  # the newest commit that is known, and its rows in the cache
        assert tune("third") == second
    hub.newest["someone/moving"] = commits[1]
    shutil.rmtree(tmp_path / "first" / "step_0000004")
    for rendered in (tmp_path / "cache").glob("data-*"):
        shutil.rmtree(rendered)
    assert tune("first") == first
    assert "step_0000004" in os.listdir(tmp_path / "first")


def chat(model) -> list[str]:
    return ["chat", f"--model={model}", "--prompt=What is water?", "--temperature=0", "--max_new_tokens=8"]


def test_a_hub_model_answers_as_its_local_copy_does_also_while_the_hub_is_down(hub, run):
    local, remote = run(*chat(hub.folder / "models/someone/model")), run(*chat("someone/model"))
    succeeded(remote)
    assert remote.stdout == local.stdout != ""
    with hub.down():
        cached = run(*chat("someone/model"))
    assert (cached.stdout, cached.waited) == (local.stdout, 0)


def test_a_model_that_the_hub_does_not_have_or_does_not_give_is_one_sentence(hub, run):
    refused(run(*chat("someone/nothing")), "someone/nothing", "Not Found")
    with hub.failing(lambda path: 403 if "someone/gated" in path else None):
        refused(run(*chat("someone/gated")), "someone/gated", "gated repo")


def test_a_hub_model_of_another_kind_is_refused_before_its_weights_are_downloaded(hub, run):
    config = json.loads((hub.folder / "models/someone/model/config.json").read_text())
    other = hub.folder / "models/someone/other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config | {"num_experts": 8}))
    (other / "model.safetensors").write_bytes(b"")
    hub.log.clear()
    refused(run(*chat("someone/other")), "num_experts=8")
    assert any("other/resolve" in path for path in hub.log)
    assert not any("safetensors" in path for path in hub.log)


def test_a_model_whose_download_breaks_off_is_one_sentence(hub, run):
    with hub.failing(lambda path: "drop" if path.endswith("model.safetensors") else None):
        refused(run(*chat("someone/new-model")), "someone/new-model")


# -- a hub that does not answer ------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["down", "hanging up"])
def test_a_hub_that_does_not_answer_is_one_sentence_within_a_minute(state, hub, run, tmp_path):
    model, tokenizer = (hub.folder / "models/someone" / name for name in ("model", "tokenizer"))
    runs = {
        "someone/new-model": chat("someone/new-model"),
        "someone/new-tokenizer": preparation(tmp_path / "a", tokenizer="someone/new-tokenizer"),
        "someone/new-lines": preparation(tmp_path / "b", "someone/new-lines", tokenizer),
        "someone/texts": preparation(tmp_path / "c", "someone/texts", tokenizer),  # its card may be cached
        "someone/new-chats": sft_config(model, "someone/new-chats", tmp_path / "d"),
    }
    with hub.down() if state == "down" else hub.failing(lambda path: "drop"):
        for name, command in runs.items():
            if not isinstance(command, list):
                command = [type(command).__module__, *flags(command)]
            result = run(*command)
            refused(result, name)
            assert result.waited < 60
