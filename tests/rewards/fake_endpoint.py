"""An OpenAI-compatible endpoint on this machine that behaves as badly as a test wants."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-very-secret-0123456789"


@dataclass
class Reply:
    """What the endpoint does with one request.

    body       sent as it is, or as JSON
    closes     drop the connection without an answer
    silent     seconds to say nothing
    trickles   send the body byte by byte, with this many seconds between
    """

    body: Any = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    closes: bool = False
    silent: float = 0.0
    trickles: float = 0.0


@dataclass
class Asked:
    """A request as the endpoint read it. `first` and `second` are the texts that are scored."""

    body: dict[str, Any]
    authorization: str | None
    path: str

    @property
    def system(self) -> str:
        return str(self.body["messages"][0]["content"])

    @property
    def user(self) -> str:
        content = self.body["messages"][1]["content"]
        return content if isinstance(content, str) else str(content[-1]["text"])

    @property
    def images(self) -> list[str]:
        content = self.body["messages"][1]["content"]
        parts = [] if isinstance(content, str) else content
        return [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]

    @property
    def token(self) -> str:
        found = re.search(r'"token": "(\w+)"', self.system)
        assert found
        return found[1]

    def text(self, heading: str) -> str:
        """What stands between the marks of a heading."""
        token, name = re.escape(self.token), re.escape(heading)
        found = re.search(
            rf"\[{token} begin {name}[^\]]*\]\n(.*)\n\[{token} end {name}\]", self.user, re.DOTALL
        )
        assert found, heading
        return found[1]

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(re.findall(rf"\[{self.token} begin (response\w*)", self.user)))

    @property
    def dimensions(self) -> list[str]:
        return re.findall(r"^- (\w+): ", self.system, re.MULTILINE)


def chat(text: str, usage: Any = (100, 20)) -> dict[str, Any]:
    """A chat completion."""
    body: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    if usage is not None:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return body


def scored(asked: Asked, score: Callable[[str, str], Any]) -> str:
    """A well-formed answer: `score(label, text)` on every dimension."""
    scores = {
        label: {name: score(label, asked.text(label)) for name in asked.dimensions}
        for label in asked.labels
    }
    return json.dumps({"token": asked.token, "scores": scores})


def by_length(label: str, text: str) -> int:
    """Longer is better, up to 10; the longest scores below 10 differ by one a letter."""
    return max(1, min(10, len(text)))


def good(asked: Asked, number: int) -> Reply:
    return Reply(chat(scored(asked, by_length)))


class Endpoint:
    """The running endpoint: `behave(asked, number)` decides on each request, from number 0."""

    def __init__(self, behave: Callable[[Asked, int], Reply]) -> None:
        self.behave = behave
        self.asked: list[Asked] = []
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                body = json.loads(self.rfile.read(length))
                asked = Asked(body, self.headers.get("Authorization"), self.path)
                with endpoint.lock:
                    number = len(endpoint.asked)
                    endpoint.asked.append(asked)
                self.answer(endpoint.behave(asked, number))

            def answer(self, reply: Reply) -> None:
                with contextlib.suppress(OSError):  # the client may have hung up
                    time.sleep(reply.silent)
                    if reply.closes:
                        self.close_connection = True
                        self.connection.close()
                        return
                    raw = reply.body if isinstance(reply.body, (str, bytes)) else None
                    text = json.dumps(reply.body) if raw is None else raw
                    data = text.encode() if isinstance(text, str) else text
                    self.send_response(reply.status)
                    for name, value in reply.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    if not reply.trickles:
                        self.wfile.write(data)
                        return
                    for index in range(len(data)):
                        self.wfile.write(data[index : index + 1])
                        self.wfile.flush()
                        time.sleep(reply.trickles)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                return

        class Server(ThreadingHTTPServer):
            # Connections beyond the default of 5 waiting ones would be reset.
            request_queue_size = 128

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@contextlib.contextmanager
def endpoint(behave: Callable[[Asked, int], Reply] = good) -> Iterator[Endpoint]:
    """A running endpoint, on a free port."""
    running = Endpoint(behave)
    thread = threading.Thread(
        target=running.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    try:
        yield running
    finally:
        running.server.shutdown()
        running.server.server_close()
        thread.join()
