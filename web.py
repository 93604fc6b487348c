"""A chat page for the browser: Python's own HTTP server, and chat.html.

    GET /          the page
    GET /about     {"model": …, "system": …, "speed": …}
    POST /answer   {"messages": […]} → as the answer comes, a JSON object a line: {"waiting": true} if another
                   answer is not done, what `answer` gives for each token, and {"done": true} or {"error": …}

A conversation lives in its browser tab. Answers are made in the thread that calls `serve`, as autocast and
CUDA's device are a thread's own; so there is one at a time, and the next one waits. A tab that closes or
presses Stop hangs up, and its answer ends with the next token.

Any page that the browser of this machine shows can send requests here. So the server refuses those from
another page's script, and, on loopback, those to any other name: a site may have its own name point to this
machine (DNS rebinding).
"""

import base64
import hashlib
import ipaddress
import json
import selectors
import socket
import socketserver
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from queue import Empty, Queue
from urllib.parse import urlsplit

from common import InputError, one_line
from sft import why_unusable

LOOPBACK = ("localhost", "127.0.0.1", "::1")
MOST_BYTES = 2**20  # of a conversation
MOST_WAIT = 2.0  # seconds for what a browser still sends after its answer
PAGE = Path(__file__).with_name("chat.html")


class ChatServer(socketserver.ThreadingTCPServer):
    """Listens, and queues who waits for an answer. `answer` takes messages and yields what the page gets."""

    daemon_threads = allow_reuse_address = True

    def __init__(self, answer: Callable[[list[dict]], Iterator[dict]], *, about: dict, host: str, port: int):
        """Raises InputError if it cannot listen there. Port 0 is any free one."""
        if not host:
            raise InputError("--web_host is empty; name an address of this machine, 0.0.0.0 for all of them")
        self.answer, self.about = answer, about
        self.waiting: Queue[Handler] = Queue()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise InputError(
                f"the page cannot be served on --web_host={host} --port={port} ({one_line(error)}); choose "
                f"another port, or an address of this machine"
            ) from error
        local = ipaddress.ip_address(self.server_address[0]).is_loopback
        self.names = (*LOOPBACK, host.lower()) if local else None  # None: any
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self.server_address[1]}"

    def shutdown_request(self, request) -> None:
        """Close when the browser has sent all it wants to. To close before that resets the connection, and a
        reply on its way is lost."""
        end = time.monotonic() + MOST_WAIT
        with suppress(OSError):  # it hung up, or is silent
            request.shutdown(socket.SHUT_WR)
            while (left := end - time.monotonic()) > 0:
                request.settimeout(left)
                if not request.recv(2**16):
                    break
        self.close_request(request)

    def handle_error(self, request, client_address) -> None:
        """A browser that hung up is no news; all else is printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def serve(server: ChatServer) -> None:
    """Answer one after the other until Ctrl-C."""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"{server.about['model']} answers on {server.url}; Ctrl-C ends it", flush=True)
    try:
        while True:
            try:
                handler = server.waiting.get(timeout=0.5)  # a Ctrl-C just before a wait does not end it
            except Empty:
                continue
            try:
                handler.send_answer()
            finally:
                server.waiting.task_done()
    except KeyboardInterrupt:
        print()
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request. It closes its connection: an answer has no length that could be told before."""

    server: ChatServer
    timeout = 60  # seconds that a browser may take to send or to read a piece

    def do_GET(self) -> None:
        if why := self.why_refused():
            self.reply(403, why)
        elif self.path == "/":
            page = PAGE.read_text(encoding="utf-8")
            self.reply(200, page, kind="text/html", policy=content_policy(page))
        elif self.path == "/about":
            self.reply(200, json.dumps(self.server.about), kind="application/json")
        else:
            self.reply(404, "there is only /")

    def do_POST(self) -> None:
        if why := self.why_refused():
            return self.reply(403, why)
        if self.path != "/answer":
            return self.reply(404, "there is only /answer")
        try:
            self.messages = self.read_messages()
        except ValueError as error:
            return self.reply(400, one_line(error))
        self.start(200, "application/x-ndjson")
        if self.server.waiting.unfinished_tasks:
            self.send({"waiting": True})
        self.answered = threading.Event()
        self.server.waiting.put(self)
        self.answered.wait()  # when this method returns, the connection closes

    def why_refused(self) -> str | None:
        """Why a request is not obeyed, or None."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        try:
            name, page = urlsplit(f"//{host}").hostname, urlsplit(origin or "").netloc
        except ValueError:  # brackets that are no IPv6 address
            return f"the host {host!r} or the origin {origin!r} is no address"
        if self.server.names and name not in self.server.names:
            return f"{name} is not this machine's own name; chat.py --web_host=ADDRESS lets others in"
        if origin is not None and page != host:
            return f"this is a script of {origin}; only the page of http://{host} may ask"
        return None

    def read_messages(self) -> list[dict]:
        """The conversation that was sent, ending with a user's turn; ValueError for anything else."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            raise ValueError(f"a conversation has a Content-Length of at most {MOST_BYTES} bytes")
        try:
            messages = json.loads(self.rfile.read(int(length)))["messages"]
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError('expected {"messages": […]}') from error
        if not isinstance(messages, list):
            raise ValueError("messages is no list")
        if why := why_unusable([*messages, {"role": "assistant", "content": ""}]):
            raise ValueError(why)
        if not messages or messages[-1]["role"] != "user":
            raise ValueError("the last message is not the user's")
        return messages

    def send_answer(self) -> None:
        """Send the answer as it is made; if the browser hangs up, stop making it."""
        try:
            with closing(self.events()) as events:  # which begin when the first one is asked for
                while not self.hung_up() and (event := next(events, None)):
                    self.send(event)
        except OSError:
            pass  # it hung up between looking and sending, or its network is gone
        finally:
            self.answered.set()

    def events(self) -> Iterator[dict]:
        """The answer and its end, or what went wrong, which ends this answer only."""
        try:
            with closing(self.server.answer(self.messages)) as events:
                yield from events
            yield {"done": True}
        except InputError as error:
            yield {"error": str(error)}
        except Exception as error:  # out of memory, for example
            traceback.print_exc()
            yield {"error": f"the answer failed ({one_line(error)}); a shorter message may help"}

    def hung_up(self) -> bool:
        """Whether the browser closed the connection. It sends nothing more after its request."""
        with selectors.DefaultSelector() as selector:  # select.select takes no descriptor above 1,023
            selector.register(self.connection, selectors.EVENT_READ)
            readable = selector.select(0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    # -- writing

    def start(self, status: int, kind: str, *, policy: str = "default-src 'none'") -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Security-Policy", policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def reply(self, status: int, text: str, *, kind: str = "text/plain", **headers: str) -> None:
        self.start(status, kind, **headers)
        self.wfile.write(text.encode())

    def send(self, event: dict) -> None:
        self.wfile.write((json.dumps(event) + "\n").encode())

    def log_request(self, code="-", size="-") -> None:
        """Only what was not obeyed is worth a line."""
        if int(code) >= 400:
            super().log_request(code, size)


def content_policy(page: str) -> str:
    """What the browser may do for the page: run the one script that it came with, and ask this server."""
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; "
        f"frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
