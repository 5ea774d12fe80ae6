"""Questions to a real server in this process, well-behaved or not."""

import json
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress
from email.utils import formatdate
from itertools import count

import pytest
from chat_server import completion, send, serving
from free_ports import reserved_port
from patience import ENDS_S, under_growing_deadlines

from trl_selfplay.rewards.endpoint import (
    _PLAIN_QUESTION,
    KEY_VARIABLE,
    Endpoint,
    EndpointError,
    Reply,
)

DEADLINE_S = 1.0
LATE = "no answer within the deadline"
UNREADABLE = "the endpoint's answer couldn't be read"
REFUSED = "the endpoint answered with an error"


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(ENDS_S)  # one that has done its work may not have had the time to end
        assert not thread.is_alive()


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.fixture
def quick(monkeypatch):
    """Don't wait between tries."""
    monkeypatch.setattr("trl_selfplay.rewards.endpoint._FIRST_WAIT_S", 0.01)


def ask(endpoint, *questions, temperature=0.0, max_completion_length=9):
    return endpoint.ask(
        questions, temperature=temperature, max_completion_length=max_completion_length
    )


def upper(question):
    return question.upper()


def but_plain(respond):
    """Reply to the question by which an endpoint is told from a question that it can't answer."""
    return lambda question: "yes" if question == _PLAIN_QUESTION else respond(question)


def test_each_question_gets_its_own_reply_a_few_at_a_time() -> None:
    questions = [f"question {i} é" for i in range(20)]
    with serving(upper) as server:
        replies = ask(Endpoint("m", server.url, concurrency=3), *questions)
    assert replies == [Reply(q.upper()) for q in questions]
    assert server.most_at_once <= 3
    assert sorted(server.questions) == sorted(questions)


def test_a_request_says_what_openai_compatible_servers_read() -> None:
    with serving(upper) as server:
        ask(Endpoint("m", f"{server.url}/"), "a", temperature=0.5)
        extra = {"max_tokens": None, "max_completion_tokens": 7, "seed": 1}
        ask(Endpoint("m", server.url, extra_body=extra), "a")
    message = {"role": "user", "content": "a"}
    assert server.bodies == [
        {"model": "m", "messages": [message], "temperature": 0.5, "max_tokens": 9},
        {"model": "m", "messages": [message], "temperature": 0.0, "max_completion_tokens": 7, "seed": 1},
    ]  # fmt: skip
    assert all("Authorization" not in headers for headers in server.headers)


def test_a_reply_that_was_cut_off_says_so() -> None:
    with serving(
        lambda question: lambda request: send(request, completion("x", "length"))
    ) as server:
        assert ask(Endpoint("m", server.url), "a") == [Reply("x", is_cut_off=True)]


def half_closed(request):
    request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" + completion("x")[:30])


@pytest.mark.parametrize(
    "fail",
    [
        lambda request: send(request, b"busy", 500),
        lambda request: send(request, b"busy", 429, Retry_After="0"),
        lambda request: send(request, b"busy", 503, Retry_After=formatdate(0, usegmt=True)),
        lambda request: send(request, b"<html>starting</html>"),
        half_closed,
        lambda request: None,
    ],
    ids=["500", "429", "503 until a date", "HTML", "half-closed", "closed"],
)
def test_what_may_pass_is_tried_again(fail, quick) -> None:
    numbers = count()
    with serving(lambda question: fail if next(numbers) == 0 else "done") as server:
        assert ask(Endpoint("m", server.url), "a") == [Reply("done")]
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
    "wait", ["100", formatdate(time.time() + 86_400, usegmt=True)], ids=["seconds", "date"]
)
def test_a_server_that_asks_for_more_time_than_there_is_isnt_asked_again(wait) -> None:
    def busy(question):
        return lambda request: send(request, b"", 429, Retry_After=wait)

    with serving(but_plain(busy)) as server:
        assert ask(Endpoint("m", server.url, deadline=30.0), "a") == [Reply(None, REFUSED)]
    assert server.questions == ["a", _PLAIN_QUESTION]


def test_a_refused_question_isnt_asked_again() -> None:
    """A prompt beyond the context, for example."""
    too_long = but_plain(lambda question: lambda request: send(request, b"too long", 400))
    with serving(too_long) as server:
        assert ask(Endpoint("m", server.url), "a") == [Reply(None, REFUSED)]
    assert server.questions == ["a", _PLAIN_QUESTION]


def silent(server, request):
    server.gone.wait()


def drip(server, request, start, text):
    request.wfile.write(start)
    for place in count():
        request.wfile.write(text[place % len(text) :][:1])
        if server.gone.wait(0.02):
            return


def drips_headers(server, request):
    drip(server, request, b"HTTP/1.1 200 OK\r\nX-", b"y")


def drips_body(server, request):
    drip(server, request, b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n", b" ")


def drips_chunks(server, request):
    start = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    drip(server, request, start, b"1\r\nx\r\n")


def continues(server, request):
    drip(server, request, b"", b"HTTP/1.1 100 Continue\r\n\r\n")


def giant(server, request):
    request.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while not server.gone.is_set():
        request.wfile.write(b"[" * 2**20)


def many_headers(server, request):
    request.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10_000 + b"\r\n")


def says(content):
    return lambda server, request: send(request, content)


ENDLESS = {
    "silent": silent,
    "headers byte by byte": drips_headers,
    "a body byte by byte": drips_body,
    "chunks without end": drips_chunks,
    "100 Continue without end": continues,
}
UNUSABLE = {
    "a giant body": (giant, UNREADABLE),
    "many headers": (many_headers, UNREADABLE),
    "half-closed": (lambda server, request: half_closed(request), UNREADABLE),
    "another protocol": (lambda server, request: request.wfile.write(b"SSH-2.0-x\r\n"), UNREADABLE),
    "HTML": (says(b"<html>"), UNREADABLE),
    "no text": (says(b"\xff\xfe\x00"), UNREADABLE),
    "nested": (says(b"[" * 100_000), UNREADABLE),
    "no choice": (says(b'{"choices": []}'), UNREADABLE),
    "two choices": (says(b'{"choices": [{}, {}]}'), UNREADABLE),
    "a null choice": (says(b'{"choices": [null]}'), UNREADABLE),
    "no content": (says(completion(None)), UNREADABLE),
    "an error in the body": (says(b'{"error": "overloaded"}'), UNREADABLE),
    "500": (lambda server, request: send(request, b"", 500), REFUSED),
    "429": (lambda server, request: send(request, b"", 429, Retry_After="-5"), REFUSED),
}


@pytest.mark.parametrize("in_thread", [False, True])
def test_no_answer_without_end_outlasts_the_deadline(in_thread) -> None:
    """VF-4, from the main thread and another."""
    servers = []

    def respond(question):
        return lambda request: ENDLESS[question](servers[0], request)

    def ask_within(deadline_s):
        replies = []

        def run():
            with suppress(ConnectionError, EndpointError):  # the plain question was late
                endpoint = Endpoint("m", servers[0].url, deadline=deadline_s)
                replies.extend(ask(endpoint, *ENDLESS))

        if in_thread:
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        else:
            run()
        return replies

    with serving(but_plain(respond)) as server:
        servers.append(server)
        replies = under_growing_deadlines(ask_within, bool, DEADLINE_S)
    assert replies == [Reply(None, LATE)] * len(ENDLESS)


def test_what_cant_be_used_abstains_and_leaves_other_questions_alone(quick) -> None:
    """VF-3."""
    servers = []

    def respond(question):
        if question not in UNUSABLE:
            return question.upper()
        return lambda request: UNUSABLE[question][0](servers[0], request)

    asked = ["before", *UNUSABLE, "after"]
    with serving(respond) as server:
        servers.append(server)
        replies = dict(zip(asked, ask(Endpoint("m", server.url), *asked), strict=True))
    assert (replies.pop("before"), replies.pop("after")) == (Reply("BEFORE"), Reply("AFTER"))
    assert replies == {name: Reply(None, cause) for name, (_, cause) in UNUSABLE.items()}


def test_a_late_try_leaves_the_cause_of_those_before_it() -> None:
    def ask_within(deadline_s):
        numbers, servers = count(), []

        def respond(question):
            if next(numbers) == 0:
                return lambda request: send(request, b"", 500)
            return lambda request: silent(servers[0], request)

        replies = []
        with serving(but_plain(respond)) as server:
            servers.append(server)
            with suppress(ConnectionError, EndpointError):  # the plain question was late
                replies = ask(Endpoint("m", server.url, deadline=deadline_s), "a")
        return replies, server.questions

    asked = ["a", "a", _PLAIN_QUESTION]
    found = under_growing_deadlines(
        ask_within, lambda found: bool(found[0]) and found[1] == asked, DEADLINE_S
    )
    assert found == ([Reply(None, REFUSED)], asked)


@contextmanager
def full_backlog():
    """A socket that takes no more connections, so that connecting hangs."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        waiting = []
        for _ in range(8):
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(listening.getsockname())
            waiting.append(one)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        finally:
            for one in waiting:
                one.close()


def test_nothing_at_the_address_is_an_error_at_construction() -> None:
    with (
        reserved_port() as port,
        pytest.raises(ConnectionError, match=r"127\.0\.0\.1.*Start the server"),
    ):
        Endpoint("m", f"http://127.0.0.1:{port}/v1")
    with full_backlog() as url, pytest.raises(ConnectionError, match="nothing answers"):
        Endpoint("m", url, deadline=0.3)
    with pytest.raises(ConnectionError, match="nothing answers"):
        Endpoint("m", "http://no-such-host.invalid/v1", deadline=5.0)


def test_an_endpoint_that_goes_down_is_an_error_and_no_abstention(quick) -> None:
    with reserved_port() as port:
        with serving(upper, port) as server:
            endpoint = Endpoint("m", server.url)
        with pytest.raises(
            EndpointError, match=r"any more, to a plain question neither: .* reached"
        ):
            ask(endpoint, "a", "b")
        with pytest.raises(EndpointError, match="16 questions in a row"):
            ask(endpoint, *map(str, range(16)))


def test_questions_that_all_fail_end_in_an_error_though_a_plain_one_does_not(quick) -> None:
    with serving(but_plain(lambda question: lambda request: send(request, b"", 400))) as server:
        endpoint = Endpoint("m", server.url)
        for _ in range(3):
            assert ask(endpoint, *"abcde") == 5 * [Reply(None, REFUSED)]
        with pytest.raises(EndpointError, match="16 questions in a row"):
            ask(endpoint, "f")


def test_failures_that_arent_in_a_row_dont_add_up() -> None:
    def respond(question):
        return (lambda request: send(request, b"", 400)) if question.startswith("bad") else "fine"

    with serving(respond) as server:
        endpoint = Endpoint("m", server.url, concurrency=1)
        for start in (0, 10):
            replies = ask(
                endpoint, *(f"bad {i}" for i in range(start, start + 10)), f"good {start}"
            )
            assert [r.text for r in replies] == [None] * 10 + ["fine"]


@pytest.mark.parametrize("status", [301, 401, 403, 404])
def test_a_wrong_address_key_or_model_is_an_error_that_doesnt_tell_the_key(status) -> None:
    def refuse(request):
        send(request, f"not with {request.headers['Authorization']}".encode(), status)

    with serving(lambda question: refuse) as server:
        endpoint = Endpoint("m", server.url, api_key="sk-secret")
        with pytest.raises(EndpointError, match=r"'m'.*\(api key\)") as raised:
            ask(endpoint, *"abcdef")
    assert "sk-secret" not in str(raised.value)
    assert "sk-secret" not in repr(endpoint)


def test_the_key_comes_from_the_argument_or_our_own_variable(monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of another service")
    with serving(upper) as server:
        ask(Endpoint("m", server.url), "a")
        monkeypatch.setenv(KEY_VARIABLE, "from the variable")
        ask(Endpoint("m", server.url), "a")
        ask(Endpoint("m", server.url, api_key="given"), "a")
    sent = [headers.get("Authorization") for headers in server.headers]
    assert sent == [None, "Bearer from the variable", "Bearer given"]


def test_the_same_question_is_asked_once(tmp_path) -> None:
    numbers = count()
    with serving(lambda question: f"{question} {next(numbers)}") as server:
        endpoint = Endpoint("m", server.url)
        assert ask(endpoint, "a") == ask(endpoint, "a") == [Reply("a 0")]
        on_disk = [Endpoint("m", server.url, cache=tmp_path, api_key="sk-secret") for _ in range(2)]
        assert ask(on_disk[0], "a") == ask(on_disk[1], "a") == [Reply("a 1")]
        assert ask(on_disk[0], "a", temperature=1.0) == [Reply("a 2")]
        assert ask(on_disk[0], "a", max_completion_length=3) == [Reply("a 3")]
        assert ask(Endpoint("other", server.url, cache=tmp_path), "a") == [Reply("a 4")]
        files = sorted(tmp_path.rglob("*.json"))
        assert len(files) == 4
        assert not any("sk-secret" in path.read_text() + str(path) for path in files)
        for path in files:
            path.write_text(path.read_text()[:-3])
        assert ask(on_disk[0], "a") == ask(on_disk[1], "a") == [Reply("a 5")]


def test_failures_arent_kept(tmp_path) -> None:
    numbers = count()
    bad = lambda request: send(request, b"", 400)  # noqa: E731
    with serving(lambda question: bad if next(numbers) == 0 else "fine") as server:
        endpoint = Endpoint("m", server.url, cache=tmp_path)
        assert [ask(endpoint, "a")[0].text for _ in range(2)] == [None, "fine"]


def test_half_surrogates_are_sent_and_kept(tmp_path) -> None:
    lone = json.loads('"x\\ud800"')
    with serving(lambda question: lone) as server:
        assert ask(Endpoint("m", server.url, cache=tmp_path), lone) == [Reply("x?")]
    assert server.questions == ["x?"]


def test_an_interrupt_ends_the_call_and_its_threads() -> None:
    servers = []

    def interrupt(question):
        os.kill(os.getpid(), signal.SIGINT)
        servers[0].gone.wait()
        return "late"

    with serving(interrupt) as server:
        servers.append(server)
        endpoint = Endpoint("m", server.url, deadline=3600.0, concurrency=1)
        with pytest.raises(KeyboardInterrupt):
            ask(endpoint, *"abc")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "base_url"),
        ({"base_url": "http://"}, "base_url"),
        ({"base_url": "http://h:port/v1"}, "base_url"),
        ({"base_url": "http://h/v1/chat/completions"}, "without /chat/completions"),
        ({"base_url": "http://me:secret@h/v1"}, "api_key"),
        ({"model": None}, "name of a model"),
        ({"deadline": 0}, "deadline=0"),
        ({"deadline": float("nan")}, "deadline=nan"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"api_key": "a\r\nX: y"}, "api_key"),
    ],
)
def test_arguments_that_cant_work_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        Endpoint(**{"model": "m", "base_url": "http://127.0.0.1:1/v1", **arguments})
    assert "secret" not in str(raised.value)
