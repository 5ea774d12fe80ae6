"""A server with the interface that judges ask, in a thread of the test.

In: a function that makes the reply to a question. Out: the server's address, and what it was sent.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class ChatServer:
    """A running server.

    Attributes:
        url: What to give as `base_url`.
        bodies: The requests' bodies, in order.
        headers: Their headers.
        most_at_once: Maximum requests in progress at a time.
        gone: Set when the server is to stop; whoever waits may wait for it.
    """

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    gone: threading.Event = field(default_factory=threading.Event)
    stop: Callable[[], None] = lambda: None

    @property
    def questions(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.bodies]


def completion(text: Any, finish_reason: str = "stop") -> bytes:
    """Return a body as servers send it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    return json.dumps({"choices": [{**choice, "finish_reason": finish_reason}]}).encode()


def send(
    request: BaseHTTPRequestHandler, content: bytes, status: int = 200, **headers: str
) -> None:
    """Send a whole response."""
    request.send_response(status)
    for name, value in {"Content-Length": str(len(content)), **headers}.items():
        request.send_header(name.replace("_", "-"), value)
    request.end_headers()
    request.wfile.write(content)


@contextmanager
def serving(respond: Callable[..., Any], port: int = 0) -> Iterator[ChatServer]:
    """Serve until the block ends.

    Args:
        respond: `respond(question)` returns the reply's text, or a function that gets the request
            and answers it in any way.
        port: Where to listen; 0 chooses.
    """
    state = ChatServer()
    lock, active = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                active[0] += 1
                state.most_at_once = max(state.most_at_once, active[0])
                state.bodies.append(body)
                state.headers.append(dict(self.headers))
            with suppress(ConnectionError):  # the client has left
                answer = respond(body["messages"][-1]["content"])
                if callable(answer):
                    answer(self)
                else:
                    send(self, completion(answer))
            with lock:
                active[0] -= 1

        def log_message(self, *args: Any) -> None:
            pass

    url, end = start(Handler, port)
    state.url = f"{url}/v1"

    def stop() -> None:
        state.gone.set()
        end()

    state.stop = stop
    try:
        yield state
    finally:
        if not state.gone.is_set():
            stop()


def start(handler: type[BaseHTTPRequestHandler], port: int = 0) -> tuple[str, Callable[[], None]]:
    """Serve in a thread; return the address, and what stops the server."""

    class Server(ThreadingHTTPServer):
        daemon_threads = False  # joined when the server closes

        def handle_error(self, *args: Any) -> None:  # a client that only looked whether it is there
            pass

    server = Server(("127.0.0.1", port), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def stop() -> None:
        server.shutdown()
        thread.join()
        server.server_close()

    return f"http://127.0.0.1:{server.server_address[1]}", stop
