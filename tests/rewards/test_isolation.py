"""Each kind of isolation that the machine offers, as each kind of user."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import hostile_programs
import psutil
import pytest
from patience import ENDS_S, under_growing_deadlines

import trl_selfplay.rewards.isolation as isolations
from trl_selfplay.rewards.sandbox import Limits, Ran, Sandbox

KINDS = (
    "bubblewrap",
    "namespaces",
    pytest.param("bubblewrap per program", marks=pytest.mark.slow),
    pytest.param("weak", marks=pytest.mark.slow),
)
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _patience_with_zygotes(monkeypatch):
    """A zygote that is slow to say how a program ended isn't ended with it."""
    monkeypatch.setattr("trl_selfplay.rewards.sandbox._GRACE_S", ENDS_S)


@pytest.fixture(scope="module", params=KINDS)
def sandbox(request):
    if "bubblewrap" in request.param and not shutil.which("bwrap"):
        pytest.skip("bubblewrap isn't installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(isolations, "candidates", lambda allow_weak_isolation: [request.param])
        try:
            made = Sandbox(workers=1)
        except RuntimeError as error:
            pytest.skip(str(error))
    yield made
    made.close()


def test_programs_run_and_functions_are_called(sandbox) -> None:
    assert sandbox.run("print(int(input()) * 2)", "21", deadline_s=ENDS_S) == Ran("42\n", "ok")
    with sandbox.session("import json\ndef f(x): x.append(json.dumps(x))", deadline_s=ENDS_S) as s:
        row = [1]
        assert s.call("f", [row]).value is None
    assert row == [1, "[1]"]


@pytest.mark.parametrize("name", ["network", "tracing", "keys", "mounts", "namespaces", "users"])
def test_calls_that_no_program_needs_are_denied(sandbox, name) -> None:
    """VF-8: also where isolation is weak."""
    assert "escaped" not in sandbox.run(hostile_programs.REACH[name], deadline_s=ENDS_S).stdout


@pytest.mark.parametrize(
    "name", ["writing outside", "reading secrets", "processes", "packages", "inherited files"]
)
def test_nothing_outside_is_in_reach(sandbox, name) -> None:
    if sandbox.isolation == "weak":
        pytest.skip("limits don't hide files or processes")
    if sandbox.isolation == "bubblewrap per program" and name == "processes":
        pytest.skip("the zygote, which ends with its only program, is in the same namespace")
    assert "escaped" not in sandbox.run(hostile_programs.REACH[name], deadline_s=ENDS_S).stdout


def test_nothing_is_passed_on_to_the_next_program(sandbox) -> None:
    leave = """
import os, socket
open('mark', 'w').write('x')
s = socket.socket(socket.AF_UNIX); s.bind(b'\\0mark'); s.listen()
if os.fork() == 0:
    os.setsid()
    while True: pass
"""
    find = """
import os, socket
print(os.listdir('.'))
try:
    socket.socket(socket.AF_UNIX).connect(b'\\0mark')
    print('found')
except OSError: pass
"""
    assert sandbox.run(leave, deadline_s=ENDS_S).ending == "ok"
    assert sandbox.run(find, deadline_s=ENDS_S) == Ran("[]\n", "ok")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shared balloon", "fork bomb that ignores errors"])
def test_limits_hold_for_all_processes_of_a_program(sandbox, name) -> None:
    ran = sandbox.run(hostile_programs.EXHAUSTION[name], deadline_s=1.5)
    # Without a namespace its processes are counted with all others of the user.
    assert ran.ending in ("too much memory", "late") or sandbox.isolation == "weak"
    assert sandbox.run("print(1)", deadline_s=ENDS_S) == Ran("1\n", "ok")


def test_weak_isolation_leaves_no_folder(monkeypatch) -> None:
    monkeypatch.setattr(isolations, "candidates", lambda allow_weak_isolation: ["weak"])
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        monkeypatch.setattr("tempfile.tempdir", folder)
        sandbox = Sandbox(workers=1)
        source = "import os; os.makedirs('a/b'); open('c', 'w').close(); print(os.getcwd())"
        ran = sandbox.run(source, deadline_s=ENDS_S)
        assert ran.ending == "ok"
        assert ran.stdout.startswith(folder)
        sandbox.close()
        assert list(Path(folder).iterdir()) == []


LEAVE_OR_SIGNAL = """
import ctypes, os, resource, signal
libc = ctypes.CDLL(None)
def attempt(function, *arguments):
    try:
        result = function(*arguments)
    except OSError:
        return
    if result != -1:
        print("escaped", function, arguments, flush=True)
if os.fork() == 0:
    attempt(os.setsid)
    attempt(os.setpgid, 0, 0)
    os._exit(0)
parent = os.getppid()
for pid in (-1, parent, -os.getpgid(parent)):
    attempt(os.kill, pid, 0)
attempt(os.setpgid, 0, os.getpgid(parent))
attempt(libc.tgkill, parent, parent, 0)
attempt(signal.pidfd_send_signal, os.pidfd_open(parent), 0)
attempt(resource.prlimit, parent, resource.RLIMIT_CPU, (1, 1))
attempt(libc.fcntl, 1, 8, parent)
attempt(open, f"/proc/{parent}/mem", "r+b")
os.wait()
resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
signal.signal(signal.SIGUSR1, lambda *_: print("own"))
os.kill(os.getpid(), signal.SIGUSR1)
signal.raise_signal(signal.SIGUSR1)
"""
CROWDS = {
    "idle": "import os, time\nfor _ in range(3): os.fork()\ntime.sleep(600)",
    "fork bomb": hostile_programs.EXHAUSTION["fork bomb that ignores errors"],
    # Each is dead before it's found.
    "short lives": """
import os, time
if os.fork(): time.sleep(600)
for _ in range(4): os.fork()
while True:
    try:
        if os.fork(): os._exit(0)
    except OSError: pass
""",
}


@pytest.fixture
def start_weak(monkeypatch):
    """Return a function that starts a sandbox with weak isolation, and returns it with its monitor."""
    monkeypatch.setattr(isolations, "candidates", lambda allow_weak_isolation: ["weak"])
    # A program that outlives its zygote holds the files that are read until then.
    monkeypatch.setattr("trl_selfplay.rewards.sandbox._GRACE_S", 0.5)
    with ExitStack() as started:

        def start() -> tuple[Sandbox, psutil.Process]:
            before = psutil.Process().children()
            made = started.enter_context(closing(Sandbox(workers=1)))
            (monitor,) = (child for child in psutil.Process().children() if child not in before)
            return made, monitor

        yield start


def test_with_weak_isolation_a_program_stays_in_its_group_and_signals_it_alone(start_weak) -> None:
    sandbox, _ = start_weak()
    assert sandbox.run(LEAVE_OR_SIGNAL, deadline_s=ENDS_S) == Ran("own\nown\n", "ok")


@pytest.mark.parametrize("killed", ["nothing", "zygote", "monitor"])
@pytest.mark.parametrize(
    "crowd",
    ["idle", *(pytest.param(name, marks=pytest.mark.slow) for name in CROWDS if name != "idle")],
)
def test_weak_isolation_leaves_no_process(start_weak, crowd, killed) -> None:
    """VF-7: also where the machine's memory is low, and it kills others than the program."""

    def run(deadline_s) -> bool:
        """Return whether the program has made a crowd by the deadline."""
        sandbox, monitor = start_weak()
        (zygote,) = monitor.children()

        def crowded() -> list[psutil.Process]:
            return [p for p in psutil.process_iter() if lives_in(p, monitor.pid)]

        with ThreadPoolExecutor(1) as other:
            running = other.submit(sandbox.run, CROWDS[crowd], deadline_s=deadline_s)
            while not (is_crowded := len(crowded()) >= 6) and not running.done():
                time.sleep(0.01)
            if killed != "nothing":
                {"zygote": zygote, "monitor": monitor}[killed].kill()
                sandbox.close()
            assert running.result().stdout == ""
        sandbox.close()
        assert crowded() == []
        return is_crowded

    assert under_growing_deadlines(run, bool)


def lives_in(process, session) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def test_without_isolation_it_refuses_and_says_what_to_do(monkeypatch) -> None:
    candidates = list(isolations.candidates(allow_weak_isolation=False))
    assert "weak" not in candidates
    monkeypatch.setattr(isolations, "command", lambda: [sys.executable, "-c", "no such thing"])
    with pytest.raises(RuntimeError, match=r"SyntaxError.*allow_weak_isolation=True"):
        Sandbox()


@pytest.mark.parametrize(
    "fault",
    [
        {"memory_bytes": 2**20},
        {"memory_bytes": 1e9},
        {"cpu_s": -1.0},
        {"processes": -3},
        {"output_bytes": None},
    ],
)
def test_limits_that_make_no_sense_are_refused(fault) -> None:
    with pytest.raises(ValueError, match=next(iter(fault))):
        Limits(**fault)


def test_workers_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="workers is 0"):
        Sandbox(workers=0)


def interpreter_for_all() -> str | None:
    """Return an interpreter that any user may run, if there is one."""
    for path in (sys.executable, "/usr/bin/python3"):
        test = "import sys; sys.exit(sys.version_info < (3, 11))"
        try:
            if subprocess.run([path, "-c", test], user=1234, group=1234).returncode == 0:
                return path
        except OSError:
            continue
    return None


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_plain_user_has_the_same_isolation(tmp_path_factory, kind) -> None:
    interpreter = interpreter_for_all()
    if interpreter is None or (kind == "bubblewrap" and not shutil.which("bwrap")):
        pytest.skip("no interpreter for other users, or no bubblewrap")
    folder = tmp_path_factory.mktemp("package")
    for parent in (folder, *(p for p in folder.parents if "pytest-" in str(p))):
        parent.chmod(0o755)
    rewards = folder / "trl_selfplay" / "rewards"
    rewards.mkdir(parents=True)
    (rewards.parent / "__init__.py").touch()
    (rewards / "__init__.py").touch()
    for name in ("isolation", "literals", "processes", "program", "sandbox", "syscalls", "zygote"):
        shutil.copy(ROOT / "trl_selfplay" / "rewards" / f"{name}.py", rewards)
    shutil.copy(hostile_programs.__file__, folder)
    script = f"""
import hostile_programs
import trl_selfplay.rewards.isolation as isolations
isolations.candidates = lambda allow_weak_isolation: [{kind!r}]
from trl_selfplay.rewards.sandbox import Sandbox
sandbox = Sandbox(workers=1)
print(sandbox.run("print(6 * 7)", deadline_s=60.0).stdout.strip())
for name, source in hostile_programs.REACH.items():
    ran = sandbox.run(source, "43210", deadline_s=1.5)
    if "escaped" in ran.stdout:
        print(name, ran)
for name, deadline_s in (("fork bomb", 60.0), ("shared balloon", 1.5)):
    print(sandbox.run(hostile_programs.EXHAUSTION[name], deadline_s=deadline_s).ending)
sandbox.close()
"""
    done = subprocess.run(
        [interpreter, "-B", "-c", script],
        user=1234,
        group=1234,
        extra_groups=[],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    answer, bomb, balloon = done.stdout.splitlines()
    assert (answer, bomb) == ("42", "raised")
    assert balloon in ("too much memory", "late")


def wait_for_end(processes) -> bool:
    """Say whether processes end."""
    ends = time.monotonic() + ENDS_S
    while any(map(is_alive, processes)):
        if time.monotonic() >= ends:
            return False
        time.sleep(0.05)
    return True


def is_alive(process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("work", ["idle", "busy", "copied"])
def test_all_processes_end_with_a_grader_that_is_killed(work) -> None:
    """VF-7: idle, at work, and while another process holds copies of the grader's files."""
    script = f"""
import os, sys, time, threading
from trl_selfplay.rewards.sandbox import Sandbox
sandbox = Sandbox(workers=1)
copy = 0
if {work!r} == "copied":
    copy = os.fork()
    if copy == 0:
        os.closerange(0, 3)
        time.sleep(600)
        os._exit(0)
if {work!r} == "busy":
    threading.Thread(target=sandbox.run, args=("while True: pass",), kwargs={{"deadline_s": 600.0}}).start()
    while sandbox._idle:
        time.sleep(0.01)
print(copy, flush=True)
time.sleep(600)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    ) as grader:
        copy = int(grader.stdout.readline())
        processes = psutil.Process(grader.pid).children(recursive=True)
        processes = [process for process in processes if process.pid != copy]
        assert len(processes) >= 3  # monitor, zygote, program
        grader.send_signal(signal.SIGKILL)
    assert wait_for_end(processes)
    if copy:
        os.kill(copy, signal.SIGKILL)
