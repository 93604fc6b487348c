"""The chat page: what it answers, whom it refuses, when it stops."""

import errno
import http.client
import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from chromium import DESKTOP, PHONE, browser, needs_chromium
from conftest import ROOT, refused, run

import web
from common import InputError
from web import ChatServer

QUESTION = [{"role": "user", "content": "Hello!"}]


def echo(messages):
    """Two tokens that look like HTML, and what was asked."""
    yield {"text": "<b>you said</b> "}
    yield {"text": messages[-1]["content"]}


@contextmanager
def served(answer=echo, host: str = "127.0.0.1", **about):
    """A server on a free port, whose answers are made in a thread."""
    about = {"model": "a model", "system": "", "speed": False, **about}
    server = ChatServer(answer, about=about, host=host, port=0)
    threading.Thread(target=web.serve, args=[server], daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def request(server, method: str, path: str, body: str | None = None, **headers):
    """Status, headers and text of an answer."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.headers, response.read().decode()


def ask(server, messages=QUESTION, **headers):
    status, _, text = request(server, "POST", "/answer", json.dumps({"messages": messages}), **headers)
    return status, [json.loads(line) for line in text.splitlines()] if status == 200 else text


def test_an_answer_comes_as_a_line_a_token_and_an_end():
    with served() as server:
        events = [{"text": "<b>you said</b> "}, {"text": "Hello!"}, {"done": True}]
        assert ask(server) == (200, events)


def test_what_the_user_did_wrong_ends_the_answer_and_the_next_one_comes():
    def too_long(messages):
        if messages == QUESTION:
            raise InputError("the message takes 9 tokens and the context leaves it 8; shorten it")
        yield {"text": "fine"}

    with served(too_long) as server:
        assert ask(server)[1][0]["error"].endswith("shorten it")
        assert ask(server, [{"role": "user", "content": "Hi"}])[1] == [{"text": "fine"}, {"done": True}]


def test_an_answer_that_fails_on_this_machine_ends_alone_and_the_next_one_comes(capsys):
    def out_of_memory(messages):
        if messages == QUESTION:
            raise RuntimeError("not enough memory: 9 GB")
        yield {"text": "fine"}

    with served(out_of_memory) as server:
        told = "the answer failed (not enough memory: 9 GB); a shorter message may help"
        assert ask(server)[1] == [{"error": told}]
        assert ask(server, [{"role": "user", "content": "Hi"}])[1] == [{"text": "fine"}, {"done": True}]
    assert "RuntimeError: not enough memory" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8")
def test_every_address_of_loopback_obeys_its_own_names_only():
    with served(host="127.0.0.2") as server:
        assert request(server, "GET", "/about")[0] == 200
        assert request(server, "GET", "/about", Host="evil.example")[0] == 403


def test_a_connection_is_watched_however_many_files_are_open():
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < 2000:
        pytest.skip("needs 2,000 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limit, 2000), most))
    files = [open(os.devnull) for _ in range(1100)]
    try:
        with served() as server:
            assert ask(server)[0] == 200
    finally:
        for file in files:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))


def test_the_page_may_run_the_script_that_it_came_with_and_no_other():
    with served(system="be short") as server:
        status, headers, page = request(server, "GET", "/")
        assert status == 200 and page == web.PAGE.read_text()
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "connect-src 'self'" in policy
        assert policy == web.content_policy(page) != web.content_policy(page.replace("ask()", "alert()"))
        assert json.loads(request(server, "GET", "/about")[2])["system"] == "be short"
        assert request(server, "GET", "/etc/passwd")[0] == request(server, "POST", "/")[0] == 404


def test_the_page_never_sets_text_as_html():
    page = web.PAGE.read_text()
    assert "textContent" in page
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", page)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:{port}"}, 200),
        ({"Host": "127.0.0.1:{port}", "Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Host": "[::1]:{port}", "Origin": "http://[::1]:{port}"}, 200),
        ({"Host": "evil.example:{port}"}, 403),  # its name points to this machine
        ({"Host": "evil.example:{port}", "Origin": "http://evil.example:{port}"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "evil@evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "localhost:{port}", "Origin": "http://evil.example"}, 403),
        ({"Host": "localhost:{port}", "Origin": "http://localhost:1"}, 403),  # another server's page
        ({"Host": "localhost:{port}", "Origin": "null"}, 403),
    ],
)
def test_requests_to_another_name_or_from_another_pages_script_are_refused(headers, status):
    with served() as server:
        headers = {name: value.format(port=server.server_address[1]) for name, value in headers.items()}
        assert ask(server, **headers)[0] == request(server, "GET", "/", **headers)[0] == status


def test_a_server_that_others_may_reach_still_refuses_other_pages_scripts():
    with served(host="0.0.0.0") as server:
        assert ask(server, Host="gpu7:8000", Origin="http://gpu7:8000")[0] == 200
        assert ask(server, Host="gpu7:8000", Origin="http://evil.example")[0] == 403


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("", "Expecting value"),
        ("[]", 'expected {"messages"'),
        ('{"messages": 5}', "messages is no list"),
        ('{"messages": []}', "the last message is not the user's"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "the last message is not the user's"),
        ('{"messages": [{"role": "root", "content": "x"}]}', "the role 'root' is none of"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "the content is no Unicode text"),
        ('{"messages": [{"role": "user"}]}', "the content is NoneType"),
        ("[" * 100_000, 'expected {"messages"'),
        ("x" * (web.MOST_BYTES + 1), "at most 1048576 bytes"),
    ],
)
def test_what_is_no_conversation_is_told_with_status_400(body, words):
    with served() as server:
        status, _, text = request(server, "POST", "/answer", body)
        assert status == 400 and words in text and "\n" not in text


def test_a_closed_tab_stops_its_answer_and_the_next_in_line_gets_its_own():
    stopped = threading.Event()

    def endless(messages):
        if messages != QUESTION:
            yield {"text": "mine"}
            return
        try:
            while True:
                yield {"text": "more "}
        finally:
            stopped.set()

    with served(endless) as server:
        first, second = (http.client.HTTPConnection(*server.server_address, timeout=60) for _ in range(2))
        first.request("POST", "/answer", json.dumps({"messages": QUESTION}))
        stream = first.getresponse()
        assert json.loads(stream.readline()) == {"text": "more "}
        other = [{"role": "user", "content": "and me?"}]
        second.request("POST", "/answer", json.dumps({"messages": other}))
        line = second.getresponse()
        assert json.loads(line.readline()) == {"waiting": True} and not stopped.is_set()
        stream.close()
        first.close()
        assert [json.loads(row) for row in line] == [{"text": "mine"}, {"done": True}]
        assert stopped.is_set()


def test_a_browser_whose_network_is_gone_ends_its_answer_only(monkeypatch):
    lost, send = [], web.Handler.send

    def unreachable(self, event):
        if not lost and "text" in event:
            lost.append(event)
            raise OSError(errno.EHOSTUNREACH, "No route to host")
        send(self, event)

    monkeypatch.setattr(web.Handler, "send", unreachable)
    with served() as server:
        assert ask(server) == (200, [])
        assert ask(server)[1][-1] == {"done": True} and lost


def test_a_question_whose_browser_left_while_it_waited_is_not_begun():
    begun, go = [], threading.Event()

    def slow(messages):
        begun.append(messages[0]["content"])
        yield {"text": "one"}
        go.wait(60)
        yield {"text": "two"}

    with served(slow) as server:
        first = threading.Thread(target=ask, args=[server])
        first.start()
        while not begun:
            time.sleep(0.01)
        body = json.dumps({"messages": [{"role": "user", "content": "left"}]}).encode()
        with socket.create_connection(server.server_address[:2], timeout=60) as client:
            head = f"POST /answer HTTP/1.0\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            with client.makefile("rb") as answer:
                while b"waiting" not in answer.readline():  # then it is in the queue, or about to be
                    pass
        go.set()
        first.join(60)
        assert ask(server, [{"role": "user", "content": "stays"}])[0] == 200
    assert begun == ["Hello!", "stays"]


def test_a_browser_that_never_stops_sending_is_hung_up_on(monkeypatch):
    monkeypatch.setattr(web, "MOST_WAIT", 0.2)
    with served() as server, socket.create_connection(server.server_address[:2], timeout=60) as client:
        client.sendall(b"GET /about HTTP/1.0\r\nHost: localhost\r\n\r\n")
        with pytest.raises(ConnectionError):
            for _ in range(6000):  # a minute at least
                client.sendall(b"x")
                time.sleep(0.01)


def test_an_address_or_port_that_cannot_be_had_is_one_sentence():
    with served() as server:
        for host, port in (("127.0.0.1", server.server_address[1]), ("192.0.2.1", 0), ("127.0.0.1", 70000)):
            settings = {"about": {}, "host": host, "port": port}
            refused(f"cannot be served on --web_host={host} --port={port}", ChatServer, echo, **settings)
    refused("--web_host is empty; name", ChatServer, echo, about={}, host="", port=0)


@pytest.mark.slow
def test_a_model_answers_over_http_and_ctrl_c_ends_the_server(base_run):
    flags = ["--web", "--port=0", "--max_new_tokens=8", "--temperature=0"]
    command = [sys.executable, str(ROOT / "chat.py"), f"--model={base_run}", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r".* answers on http://127\.0\.0\.1:(\d+); Ctrl-C ends it\n", line)
        assert found, line + process.stderr.read()
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=300)
        connection.request("POST", "/answer", json.dumps({"messages": QUESTION}))
        events = [json.loads(row) for row in connection.getresponse()]
        process.send_signal(2)
        out, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0 and not errors and not out.strip()
    assert events.pop() == {"done": True}
    events = [event for event in events if event != {"cut": 8}]
    assert 1 <= len(events) <= 8
    one = run("chat.py", f"--model={base_run}", "--prompt=Hello!", *flags[2:])
    assert "".join(event["text"] for event in events) == one.stdout[:-1]


@pytest.mark.slow
def test_a_prompt_for_the_page_is_refused(base_run):
    result = run("chat.py", f"--model={base_run}", "--web", "--prompt=hello")
    assert (result.returncode, result.stdout) == (1, "") and "exclude each other" in result.stderr


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_in_a_browser_an_answer_arrives_and_html_is_shown_as_text(size, tmp_path):
    def cut_short(messages):
        assert messages[0] == {"role": "system", "content": "Be short."}
        yield from echo(messages)
        yield {"cut": 2}

    with served(cut_short, speed=True) as server, browser(tmp_path) as tab:
        tab.open(server.url, size)
        known = "!document.getElementById('system').disabled"  # what /about says has arrived
        tab.until(known)
        tab.run("document.querySelector('details').open = true; document.getElementById('system').focus()")
        tab.call("Input.insertText", text="Be short.")
        tab.run("document.querySelector('details').open = false; document.getElementById('text').focus()")
        tab.type("<i>hello</i>")
        answered = "document.getElementById('send').textContent == 'Send'"
        tab.until(f"document.querySelector('.answer')?.textContent && {answered}")
        texts = tab.run("[...document.querySelectorAll('#log > *')].map(e => e.textContent)")
        assert texts[:2] == ["<i>hello</i>", "<b>you said</b> <i>hello</i>"]
        assert texts[2].startswith("The answer was cut at 2 tokens. 2 tokens, ") and len(texts) == 3
        assert tab.run("document.querySelectorAll('#log b, #log i').length") == 0
        assert not tab.overflows() and not tab.errors
        tab.open(server.url, size)  # the same tab keeps its conversation
        tab.until(known)
        assert tab.run("[...document.querySelectorAll('#log > *')].map(e => e.textContent)") == texts[:2]
        assert tab.run("document.getElementById('system').value") == "Be short."
