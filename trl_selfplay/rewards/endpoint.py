"""Ask an OpenAI-compatible endpoint many questions at once, in bounded time.

In: questions as text. Out: a `Reply` to each, or the cause of there being none. Only the standard
library is used. The deadline of a question covers everything: name resolution, connection, retries
and a body that comes one byte at a time. No thread or connection outlives a call, except for a
thread in which the system still resolves a name.
"""

import email.utils
import hashlib
import http.client
import io
import json
import logging
import os
import queue
import random
import socket
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trl_selfplay.confidential import shown
from trl_selfplay.disk import DamagedFileError, naming_damage, save_text
from trl_selfplay.generation.valid_text import valid_text

logger = logging.getLogger(__name__)

# The variable that holds the key if none is given. Another service's variable would send its key
# to whatever server `base_url` names.
KEY_VARIABLE = "TRL_SELFPLAY_JUDGE_KEY"

_PATH = "/chat/completions"
_LARGEST_BODY_BYTES = 4 * 2**20
_MOST_TRIES = 5
# Questions in a row without a usable reply after which the endpoint itself is at fault.
_MOST_FAILURES = 16
# Asked where it isn't clear whether a question or the endpoint is at fault.
_PLAIN_QUESTION = "Reply with the word yes."
_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 8.0
# How long a thread that waits for bytes takes to notice that the call was interrupted.
_NOTICES_AFTER_S = 0.2
_CHECK_S = 10.0
_MOST_IN_MEMORY = 10_000
_RETRIED = (408, 409, 425, 429)
# Answers that every question would get: the address, the key or the model's name is wrong.
_MISCONFIGURED = (301, 302, 303, 307, 308, 401, 403, 404, 405)

LATE = "no answer within the deadline"
_UNREACHED = "the endpoint couldn't be reached"
_REFUSED = "the endpoint answered with an error"
_UNREADABLE = "the endpoint's answer couldn't be read"


class EndpointError(RuntimeError):
    """The endpoint can't be used at all: it is down, or its address, key or model is wrong."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What was replied to one question.

    Attributes:
        text: The reply; None if there is none.
        cause: Why there is none, in a few fixed words.
        is_cut_off: Whether the reply reached the maximum length.
    """

    text: str | None
    cause: str = ""
    is_cut_off: bool = False


class Endpoint:
    """A model behind an OpenAI-compatible HTTP interface, such as that of vLLM or llama.cpp.

    Redirects and proxies aren't followed.

    Args:
        model: Name of the model there.
        base_url: Address up to and without `/chat/completions`, such as "http://localhost:8000/v1".
        api_key: Key for the server; None takes that in the variable TRL_SELFPLAY_JUDGE_KEY, if it is
            set. It is sent to the server and appears nowhere else.
        deadline: Seconds per question, with all retries.
        concurrency: Questions in progress at a time.
        cache: Folder in which replies are kept, so that no question is asked twice; None keeps the
            latest 10,000 in memory.
        extra_body: Further fields of each request, such as {"seed": 1}. None as a value leaves out
            a field that is sent by default.

    Raises:
        ConnectionError: Nothing listens at the address.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        api_key: str | None = None,
        deadline: float = 60.0,
        concurrency: int = 8,
        cache: str | Path | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        _check_arguments(model, base_url, deadline, concurrency)
        parts = urlsplit(base_url)
        self.base_url = base_url.rstrip("/")
        self.name = f"{model} at {self.base_url}"
        self.extra_body = dict(extra_body or {})
        self._model = model
        self._host = str(parts.hostname)
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._path = parts.path.rstrip("/") + _PATH
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._key = (os.environ.get(KEY_VARIABLE) if api_key is None else api_key) or ""
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError("the api_key has characters that no HTTP header can hold.")
        self._deadline_s, self._concurrency = deadline, concurrency
        self._cache = _Cache(None if cache is None else Path(cache))
        self._failures_in_a_row = 0
        self._lock = threading.Lock()
        self._check_reachable()

    def ask(
        self, questions: Sequence[str], *, max_completion_length: int, temperature: float
    ) -> list[Reply]:
        """Return a reply to each question.

        Args:
            questions: Each is sent as the only message of the user.
            max_completion_length: Maximum tokens per reply.
            temperature: 0.0 is greedy.

        Raises:
            EndpointError: The server refuses every request; or 16 questions in a row, of this and
                earlier calls, had no usable reply; or one had none, and a plain question that is
                asked after all others has none either. What a server leaves open that went away
                is then asked again by whoever resumes, and doesn't count as abstentions.
        """
        stop = threading.Event()

        def body_of(question: str) -> bytes:
            body: dict[str, Any] = {
                "model": self._model,
                "messages": [{"role": "user", "content": valid_text(question)}],
                "temperature": temperature,
                "max_tokens": max_completion_length,
                **self.extra_body,
            }
            body = {name: value for name, value in body.items() if value is not None}
            return json.dumps(body, sort_keys=True).encode()

        def ask(question: str) -> Reply:
            body = body_of(question)
            key = hashlib.sha256(f"{self.base_url}\n".encode() + body).hexdigest()
            found = self._cache.get(key)
            if found is None:
                found = self._ask_once(body, stop)
                if found.text is not None:
                    self._cache.put(key, found)
            return found

        with ThreadPoolExecutor(self._concurrency, "judge") as threads:
            asked = [threads.submit(ask, question) for question in questions]
            try:
                replies = [future.result() for future in asked]
            finally:  # also after Ctrl-C
                stop.set()
                threads.shutdown(wait=False, cancel_futures=True)
        if any(reply.text is None for reply in replies):
            self._check_answers(body_of(_PLAIN_QUESTION))
        return replies

    def _check_answers(self, body: bytes) -> None:
        """Raise if a plain question has no usable reply."""
        count = self._failures_in_a_row
        reply = self._ask_once(body, threading.Event())
        if reply.text is None:
            raise EndpointError(
                f"{self.base_url} gives no usable reply any more, to a plain question neither: "
                f"{reply.cause}. Look at the server, and at `deadline`."
            )
        self._failures_in_a_row = count  # they may all be too long for it

    def _ask_once(self, body: bytes, stop: threading.Event) -> Reply:
        """Try until there is a reply, the deadline has passed or the tries are used up."""
        ends = time.monotonic() + self._deadline_s
        failure = _Failure(LATE)
        for number in range(_MOST_TRIES):
            try:
                reply = self._try(body, ends, stop)
            except _Failure as raised:
                # That time is up says less than what earlier tries have met.
                if number == 0 or raised.cause != LATE:
                    failure = raised
                failure.is_final = raised.is_final
            else:
                with self._lock:
                    self._failures_in_a_row = 0
                return reply
            wait = min(_FIRST_WAIT_S * 2**number, _LONGEST_WAIT_S) * random.uniform(0.75, 1.25)
            wait = max(wait, failure.wait_s)
            is_last = failure.is_final or number == _MOST_TRIES - 1
            if is_last or time.monotonic() + wait >= ends or stop.wait(wait):
                break
        if stop.is_set():
            return Reply(None, failure.cause)
        with self._lock:
            self._failures_in_a_row += 1
            count = self._failures_in_a_row
            if count >= _MOST_FAILURES:
                self._failures_in_a_row = 0  # whoever goes on has looked at it
        if count >= _MOST_FAILURES:
            raise EndpointError(
                f"{count} questions in a row had no usable reply from {self.base_url}: {failure}. "
                "Look at the server, and at `deadline`."
            )
        return Reply(None, failure.cause)

    def _try(self, body: bytes, ends: float, stop: threading.Event) -> Reply:
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            connected = self._connect(ends)
        except TimeoutError as error:
            raise _Failure(LATE, is_final=True) from error
        except OSError as error:
            raise _Failure(_UNREACHED, str(error)) from error
        try:
            with closing(http.client.HTTPConnection(self._host, self._port)) as connection:
                connection.sock = connected
                connection.response_class = _reader_until(ends, stop)  # type: ignore[assignment]
                connection.request("POST", self._path, body, headers)
                with connection.getresponse() as response:
                    content = response.read(_LARGEST_BODY_BYTES + 1)
                    status, wait = response.status, response.getheader("Retry-After")
        except TimeoutError as error:
            raise _Failure(LATE, is_final=True) from error
        except (OSError, http.client.HTTPException) as error:
            raise _Failure(_UNREADABLE, f"{type(error).__name__} {error}") from error
        if status != http.client.OK:
            self._raise_error(status, content, wait)
        if len(content) > _LARGEST_BODY_BYTES:
            raise _Failure(_UNREADABLE, f"more than {_LARGEST_BODY_BYTES} bytes", is_final=True)
        return _read_reply(content)

    def _raise_error(self, status: int, content: bytes, retry_after: str | None) -> None:
        text = content[:500].decode("utf-8", "replace")
        said = f"status {status}, {' '.join(self._masked(text).split())[:300]!r}"
        if status in _MISCONFIGURED:
            raise EndpointError(
                f"{self.base_url}{_PATH} refuses the model {self._model!r}: {said}. Check `base_url`, "
                f"the model's name, and the key (`api_key`, or the variable {KEY_VARIABLE})."
            )
        is_final = status not in _RETRIED and status < http.client.INTERNAL_SERVER_ERROR
        raise _Failure(_REFUSED, said, is_final=is_final, wait_s=_seconds_of(retry_after))

    def _masked(self, text: str) -> str:
        return text.replace(self._key, "(api key)") if self._key else text

    def _check_reachable(self) -> None:
        try:
            self._connect(time.monotonic() + min(self._deadline_s, _CHECK_S)).close()
        except OSError as error:
            raise ConnectionError(
                f"nothing answers at base_url={self.base_url!r} ({error or 'no answer in time'}). "
                "Start the server first, or correct the address."
            ) from error

    def _connect(self, ends: float) -> socket.socket:
        """Return a connected socket.

        Raises:
            OSError: There is no connection; TimeoutError if time is up.
        """
        failure: OSError = ConnectionRefusedError(f"{self._host} has no address")
        for family, kind, protocol, _, address in _resolve(self._host, self._port, ends):
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(_left(ends))
                connection.connect(address)
                if self._tls is not None:
                    connection = self._tls.wrap_socket(connection, server_hostname=self._host)
                connection.settimeout(_left(ends))  # of sending all of the request
                return connection
            except OSError as error:
                connection.close()
                failure = error
        raise failure


class _Failure(Exception):
    """One try without a usable reply.

    Args:
        cause: In a few fixed words.
        detail: What came instead.
        is_final: Another try would end alike.
        wait_s: How long the server asks to wait.
    """

    def __init__(
        self, cause: str, detail: str = "", *, is_final: bool = False, wait_s: float = 0.0
    ) -> None:
        super().__init__(f"{cause} ({detail})" if detail else cause)
        self.cause, self.is_final, self.wait_s = cause, is_final, wait_s


class _Cache:
    """Replies by key: one file each in a folder, or the latest in memory. For use by several threads.

    Args:
        folder: None keeps them in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._held: OrderedDict[str, Reply] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Reply | None:
        """Return what is kept, or None."""
        if self._folder is None:
            with self._lock:
                return self._held.get(key)
        path = self._path(key)
        if not path.exists():
            return None
        try:
            with naming_damage(path, "The question is asked again."):
                return Reply(**json.loads(path.read_text()))
        except DamagedFileError as error:
            logger.warning("%s", error)
            return None

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply."""
        if self._folder is not None:
            save_text(self._path(key), json.dumps(asdict(reply)))
            return
        with self._lock:
            self._held[key] = reply
            if len(self._held) > _MOST_IN_MEMORY:
                self._held.popitem(last=False)

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / key[:2] / f"{key}.json"


class _BytesUntil(io.RawIOBase):
    """The bytes that a socket receives, as a file that ends at a deadline.

    The socket's own timeout holds for each byte anew.
    """

    def __init__(self, connection: socket.socket, ends: float, stop: threading.Event) -> None:
        self._socket, self._ends, self._stop = connection, ends, stop
        # Keeps the socket open when the connection is closed, until the response has been read.
        self._file = connection.makefile("rb", buffering=0)

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Wait for bytes.

        Raises:
            TimeoutError: The deadline has passed, or the call was interrupted.
        """
        while not self._stop.is_set():
            self._socket.settimeout(min(_left(self._ends), _NOTICES_AFTER_S))
            with suppress(TimeoutError):
                return self._socket.recv_into(buffer)
        raise TimeoutError

    def close(self) -> None:
        """Let the socket close."""
        self._file.close()
        super().close()

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return the file that `http.client` reads from."""
        return io.BufferedReader(self)


def _reader_until(ends: float, stop: threading.Event) -> Callable[..., http.client.HTTPResponse]:
    """Return what makes a response of a connection's socket."""

    def read(connection: Any, *args: Any, **kwargs: Any) -> http.client.HTTPResponse:
        source: Any = _BytesUntil(connection, ends, stop)
        return http.client.HTTPResponse(source, *args, **kwargs)

    return read


def _left(ends: float) -> float:
    """Return the seconds that are left; raise TimeoutError if none are."""
    left = ends - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline has passed")
    return left


def _resolve(host: str, port: int, ends: float) -> list[Any]:
    """Return the addresses of a host; the system's resolver knows no deadline, so it gets a thread."""
    answers: queue.SimpleQueue[list[Any] | OSError] = queue.SimpleQueue()

    def resolve() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            answers.put(error)

    threading.Thread(target=resolve, name="resolve", daemon=True).start()
    try:
        answer = answers.get(timeout=_left(ends))
    except queue.Empty:
        raise TimeoutError(f"the name {host!r} wasn't resolved in time") from None
    if isinstance(answer, OSError):
        raise answer
    return answer


def _read_reply(content: bytes) -> Reply:
    """Return the one reply in a response's body."""
    try:
        [choice] = json.loads(content)["choices"]
        text = choice["message"]["content"]
        is_cut_off = choice.get("finish_reason") == "length"
        if not isinstance(text, str):
            raise TypeError(f"the content is {type(text).__name__}")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _Failure(_UNREADABLE, f"{type(error).__name__}, {content[:200]!r}") from error
    return Reply(valid_text(text), is_cut_off=is_cut_off)


def _seconds_of(retry_after: str | None) -> float:
    """Return how long the header `Retry-After` asks to wait: seconds, or a date."""
    if retry_after is None:
        return 0.0
    if retry_after.strip().isdecimal():
        return float(retry_after)
    with suppress(ValueError, TypeError, OverflowError):
        return max(email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    return 0.0


def _check_arguments(model: Any, base_url: str, deadline: float, concurrency: int) -> None:
    if not isinstance(model, str) or not model:
        raise ValueError(
            f"with a base_url, `model` is the name of a model there, not {model!r:.100}."
        )
    try:
        parts = urlsplit(base_url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        is_address = False
    if not is_address or parts.query or parts.fragment or parts.path.rstrip("/").endswith(_PATH):
        raise ValueError(
            f"base_url={shown(base_url)}; give an address such as 'http://localhost:8000/v1', "
            f"without {_PATH}."
        )
    if parts.username is not None or parts.password is not None:
        raise ValueError("base_url holds a user or a password; pass the server's key as `api_key`.")
    if not 0 < deadline < float("inf"):
        raise ValueError(f"deadline={deadline}; give seconds, more than 0.")
    if concurrency < 1:
        raise ValueError(f"concurrency={concurrency}; give at least 1.")
