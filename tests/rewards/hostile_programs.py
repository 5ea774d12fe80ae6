"""Programs that attack the sandbox, none of which solves its task.

In: nothing. Out: programs that should read a number and print its double, and programs that should
define `double`; by name. A program that has got at what it must not prints "escaped".
"""

TRY = """
def attempt(function, *arguments):
    try:
        result = function(*arguments)
    except BaseException as error:
        return error
    print("escaped", function, arguments, result, flush=True)
import ctypes, os, socket, sys, signal, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    result = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), "denied")
    return result
"""

# Programs that use up a resource: time, memory, processes, output, files.
EXHAUSTION = {
    "busy loop": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "busy loop in C": "sum(iter(int, 1))",
    "power tower": "print(9**9**9)",
    "long integer to text": "import sys; sys.set_int_max_str_digits(0); print(len(str(7**10**8)))",
    "catastrophic pattern": "import re; re.match(r'(a+)+$', 'a' * 60 + 'b')",
    "compilation": "eval('(' * 80 + 'lambda: ' * 80 + '[x for x in y]' + ')' * 80)",
    "large constant": "x = 'a' * 2**40",
    "folded constant": "x = " + "+".join(["'a' * 4000"] * 5000),
    "input forever": "import sys\nwhile True:\n    sys.stdin.read()",
    "memory": "rows = []\nwhile True:\n    rows.append(bytearray(10**7))",
    "memory at once": "x = bytearray(2**45)",
    "dictionary": "d = {}\ni = 0\nwhile True:\n    d[i] = i\n    i += 1",
    "shared balloon": """
import mmap, os, time
for _ in range(6):
    if os.fork() == 0:
        x = bytearray(150 * 2**20)
        for i in range(0, len(x), 4096): x[i] = 1
        time.sleep(1000)
time.sleep(1000)
""",
    "anonymous shared memory": """
import mmap
maps = []
while True:
    m = mmap.mmap(-1, 2**24)
    for i in range(0, 2**24, 4096): m[i] = 1
    maps.append(m)
""",
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork bomb that ignores errors": """
import os
while True:
    try: os.fork()
    except OSError: pass
""",
    "thread bomb": """
import threading, time
while True:
    try: threading.Thread(target=time.sleep, args=(1000,)).start()
    except RuntimeError: pass
""",
    "processes in sessions of their own": """
import os, time
for _ in range(100):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0: time.sleep(1000)
        os._exit(0)
time.sleep(1000)
""",
    "output": "while True: print('x' * 10**6)",
    "errors": "import sys\nwhile True: sys.stderr.write('x' * 10**6)",
    "output past Python": "import os\nwhile True: os.write(1, b'x' * 10**6)",
    "output of a child": """
import os, time
if os.fork():
    time.sleep(1000)
while True: os.write(1, b'x' * 10**6)
""",
    "full folder": """
import os
for i in range(10**6):
    with open(f'f{i}', 'wb') as f:
        f.write(b'x' * 10**6)
""",
    "files without number": "for i in range(10**9): open(f'f{i}', 'w').close()",
    "sparse file": "f = open('f', 'wb'); f.seek(2**50); f.write(b'x')",
    "truncated to more": "import os; f = open('f', 'wb'); os.truncate('f', 2**45)",
    "open files": "files = [open('/dev/null') for _ in range(10**6)]",
    "pipes": "import os\npipes = []\nwhile True:\n    pipes.append(os.pipe())",
    "full sockets": """
import os, socket
kept = []
while True:
    try:
        pair = socket.socketpair()
        for end in pair:
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**30)
            try:
                while True: end.send(bytes(65536))
            except BlockingIOError: pass
        kept.append(pair)
    except OSError:
        try:
            if os.fork(): os.wait()
        except OSError: pass
        kept = []
""",
    "full pipes": """
import os, fcntl
while True:
    try:
        r, w = os.pipe()
        os.set_blocking(w, False)
        fcntl.fcntl(w, 1031, 2**20)
        os.write(w, bytes(2**20))
    except OSError:
        if os.fork(): os.wait()
""",
    "recursion": "def f(): return f()\nf()",
    "recursion to a fault": """
import sys; sys.setrecursionlimit(10**9)
def f(x): return [f(y) for y in [x]]
f(1)
""",
    "deep destructor": "x = None\nfor _ in range(10**7): x = (x,)\ndel x",
    "null pointer": "import ctypes; ctypes.string_at(0)",
    "broken code object": "f = lambda: 0\nf.__code__ = f.__code__.replace(co_code=b'\\xff' * 64)\nf()",
    "abort": "import os; os.abort()",
}

# Programs that try not to be ended.
PERSISTENCE = {
    "exit at once": "import os; os._exit(0)",
    "exit": "import sys; sys.exit(0)",
    "ignored signals": """
import signal, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: time.sleep(1)
""",
    "alarm": "import signal, time; signal.alarm(1); signal.signal(signal.SIGALRM, lambda *_: 0)\nwhile True: time.sleep(1)",
    "caught interrupts": """
while True:
    try:
        while True: pass
    except BaseException: pass
""",
    "kill of the first process": "import os\nos.kill(1, 9)\nwhile True: pass",
    "kill of the parent": "import os\nos.kill(os.getppid(), 9)",
    "kill of all": "import os\nos.kill(-1, 9)\nwhile True: pass",
    "kill of the group": "import os\nos.kill(0, 9)\nos.killpg(0, 9)\nwhile True: pass",
    "kill of any": """
import os
for pid in range(1, 100000):
    for number in (9, 19):
        try: os.kill(pid, number)
        except OSError: pass
""",
    "stopped": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nwhile True: pass",
    "stopped child": """
import os, signal
child = os.fork()
if child == 0:
    os.kill(os.getpid(), signal.SIGSTOP)
os.waitpid(child, 0)
""",
    "thread that outlives main": "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()",
    "daemon thread": """
import threading
def f():
    while True: pass
threading.Thread(target=f, daemon=True).start()
""",
    "daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True: time.sleep(1)
    os._exit(0)
""",
    "child that holds the output": "import os, time\nif os.fork() == 0: time.sleep(1000)",
    "exit handler": "import atexit, time; atexit.register(time.sleep, 1000)",
    "destructor": """
import time
class Late:
    def __del__(self): time.sleep(1000)
late = Late()
""",
    "trace function": """
import sys
def trace(*_):
    while True: pass
sys.settrace(trace)
def f(): pass
f()
""",
    "hostile exception": """
class Hostile(BaseException):
    def __str__(self):
        while True: pass
    __repr__ = __str__
raise Hostile
""",
    "closed files": "import os, time\nos.closerange(0, 1000)\ntime.sleep(1000)",
    "more of each limit": TRY
    + """
import resource
for kind in range(16):
    soft, hard = resource.getrlimit(kind)
    if hard != -1: attempt(resource.setrlimit, kind, (hard + 1, hard + 1))
""",
    "priority": TRY
    + "attempt(os.nice, -5)\nattempt(os.sched_setscheduler, 0, 1, os.sched_param(1))\nwhile True: pass",
}

# Programs that reach for what isn't theirs.
REACH = {
    "writing outside": TRY
    + """
for folder in ('/', '/usr', '/dev', '/lib', '/root', '/home', '/etc', '/var/tmp', '/dev/shm',
               sys.path[1], '/zygote', '/proc/self', '/sys'):
    attempt(open, folder + '/file', 'w')
    attempt(os.mkdir, folder + '/folder')
    attempt(os.rename, '/tmp', folder + '/moved')
    attempt(os.chmod, folder, 0o777)
for name in os.listdir(sys.path[1]): attempt(os.remove, sys.path[1] + '/' + name)
""",
    "reading secrets": TRY
    + """
for path in ('/etc/passwd', '/etc/shadow', '/root/.bash_history', '/proc/1/environ',
             '/proc/self/environ', '/proc/self/mem', '/proc/1/mem', '/proc/version', '/dev/mem',
             '/dev/kmsg', '/sys/kernel', '/var/run/docker.sock'):
    attempt(open, path)
    attempt(os.listdir, path)
""",
    "environment": """
import os
allowed = {'HOME', 'TMPDIR', 'PYTHONHASHSEED', 'LANG', 'PWD', 'LC_CTYPE'}
if set(os.environ) - allowed: print('escaped', os.environ)
""",
    "processes": TRY
    + """
attempt(os.listdir, '/proc')
for pid in range(2, 1000):
    attempt(os.kill, pid, 0)
    attempt(os.getpgid, pid)
    attempt(os.sched_getaffinity, pid)
if os.getppid(): print('escaped', os.getppid())
""",
    "inherited files": """
import os
for n in range(3, 10000):
    try: os.fstat(n)
    except OSError: continue
    print('escaped', n)
""",
    "garbage into all files": """
import os
for n in range(1000):
    if n != 1:
        try: os.write(n, b'{"ending": "ok"}' * 100)
        except OSError: pass
while True: pass
""",
    "network": TRY
    + """
for family in range(1, 50):
    for kind in (1, 2, 3, 5):
        for protocol in (0, 1, 6, 17):
            if family != socket.AF_UNIX: attempt(socket.socket, family, kind, protocol)
attempt(socket.create_connection, ('127.0.0.1', 22))
attempt(socket.create_connection, ('8.8.8.8', 53))
attempt(socket.getaddrinfo, 'localhost', 80)
""",
    "sockets by name": TRY
    + """
s = socket.socket(socket.AF_UNIX)
for name in ('/run/dbus/system_bus_socket', '/var/run/docker.sock', '\\0/tmp/.X11-unix/X0', '\\0any'):
    attempt(s.connect, name)
""",
    "tracing": TRY
    + """
attempt(call, 101, 16, 1, 0, 0)
child = os.fork()
if child == 0: time.sleep(1000)
attempt(call, 101, 16, child, 0, 0)
attempt(call, 310, 1, 0, 0, 0, 0, 0)
""",
    "mounts": TRY
    + """
attempt(call, 165, b'tmpfs', b'/usr', b'tmpfs', 0, 0)
attempt(call, 165, b'', b'/', b'', 32 | 4096, 0)
attempt(call, 166, b'/tmp', 2)
attempt(call, 155, b'.', b'.')
attempt(call, 428, -100, b'/', 1)
attempt(call, 442, -100, b'/', 0x8000, bytes(32), 32)
""",
    "change of root": TRY + "os.mkdir('x')\nattempt(os.chroot, 'x')\nattempt(os.chroot, '/')",
    "namespaces": TRY
    + """
for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
    attempt(call, 272, flag)
    attempt(call, 56, flag | 17, 0, 0, 0, 0)
attempt(call, 435, bytes(88), 88)
attempt(call, 308, 0, 0)
""",
    "users": TRY
    + """
for user in (0, 1, 1000): attempt(os.setuid, user); attempt(os.setgid, user)
attempt(os.setgroups, [0]); attempt(os.chown, '.', 0, 0)
if os.getuid() == 0 or os.geteuid() == 0: print('escaped')
""",
    "keys": TRY + "attempt(call, 248, b'user', b'x', b'y', 1, -3)\nattempt(call, 250, 0, -3, 1)",
    "shared memory": TRY
    + """
attempt(call, 29, 1234, 4096, 0o1777)
attempt(call, 68, 1234, 0o1777)
attempt(open, '/dev/shm/x', 'w')
attempt(call, 319, b'x', 0)
attempt(call, 240, b'/x', 0o102, 0o777, 0)
""",
    "kernel": TRY
    + """
for number in (321, 298, 323, 425, 303, 304, 135, 300, 103, 153, 169, 175, 246, 313, 163, 167):
    attempt(call, number, 1, 0, 0, 0, 0) if number not in (153,) else attempt(call, number)
attempt(call, 0x40000000 + 39)
""",
    "calls of another architecture": TRY
    + """
import mmap
def run(code):
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
print('escaped', run(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3'))
""",
    "crash with a dump": TRY
    + """
attempt(libc.prctl, 4, 1, 0, 0, 0) if libc.prctl(4, 1, 0, 0, 0) == 0 else 0
import resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
os.abort()
""",
    "devices and links": TRY
    + """
attempt(os.mknod, 'disk', 0o60666, os.makedev(254, 0))
attempt(os.mknod, 'memory', 0o20666, os.makedev(1, 1))
os.symlink('/etc/passwd', 'link'); attempt(open, 'link')
os.symlink('/', 'root'); attempt(open, 'root/file', 'w')
attempt(os.link, '/dev/null', 'null')
os.mkfifo('fifo'); open('fifo')
""",
    "set-user-id": TRY
    + """
import shutil
shutil.copy('/dev/null', 'x'); os.chmod('x', 0o4777)
attempt(os.execv, 'x', ['x']); attempt(os.execv, '/bin/sh', ['sh']); attempt(os.execv, sys.executable, ['python'])
""",
    "packages": TRY
    + """
import importlib
for name in ('torch', 'numpy', 'trl_selfplay', 'trl', 'pip', 'pytest'): attempt(importlib.import_module, name)
for base in (sys.prefix, sys.base_prefix, '/usr', '/usr/local'):
    for name in ('site-packages', 'dist-packages'):
        folder = f'{base}/lib/python{sys.version_info[0]}.{sys.version_info[1]}/{name}'
        if os.path.isdir(folder) and os.listdir(folder): print('escaped', folder)
""",
    "frames": """
import gc, sys
sought = ''.join(map(str, (8, 6, 4, 2, 0)))
frame = sys._getframe()
while frame:
    for name, value in {**frame.f_globals, **frame.f_locals}.items():
        if name != 'sought' and sought in repr(value): print('escaped', name)
    frame = frame.f_back
for value in gc.get_objects():
    if type(value) in (list, dict, tuple) and value is not globals() and sought in repr(value):
        print('escaped', value)
""",
    "forged results": """
import os, sys
print('1.0'); print('PASSED'); print('{"ending": "ok"}'); sys.stderr.write('OK')
os.write(2, b'ready')
sys.exit(0)
""",
}

# As `double` of a module, called with 43210.
FUNCTIONS = {
    "equal to all": "class E:\n    def __eq__(self, other): return True\ndouble = lambda x: E()",
    "integer equal to all": """
class E(int):
    def __eq__(self, other): return True
    __ne__ = __lt__ = __hash__ = lambda *_: False
double = lambda x: E(1)
""",
    "gigantic value": "double = lambda x: 'x' * 10**8",
    "many small values": "double = lambda x: [None] * 10**8",
    "value that fills the message": "double = lambda x: [None] * 900_000",
    "deep value": "def double(x):\n    for _ in range(10**6): x = [x]\n    return x",
    "cyclic value": "def double(x):\n    x = []; x.append(x); return x",
    "not a number": "double = lambda x: float('nan')",
    "infinite generator": "def double(x):\n    while True: yield x",
    "function": "double = lambda x: double",
    "large integer": "double = lambda x: 1 << 10**8",
    "hostile text": """
class E(Exception):
    def __str__(self): return self.loop()
    def loop(self):
        while True: pass
    __repr__ = __str__
def double(x): raise E
""",
    "hostile metaclass": """
class M(type):
    def __instancecheck__(self, x): return True
    def __eq__(self, x): return True
    __hash__ = type.__hash__
    __name__ = property(lambda self: 1 / 0)
class E(metaclass=M): pass
double = lambda x: E()
""",
    "hostile container": """
class L(list):
    def __iter__(self):
        while True: yield 1
    def __len__(self): return 86420
double = lambda x: L()
""",
    "exit at once": "import os\ndef double(x): os._exit(0)",
    "exit": "def double(x): raise SystemExit(0)",
    "exit when loaded": "import os; os._exit(0)",
    "raised when loaded": "raise ValueError",
    "endless when loaded": "while True: pass",
    "interrupt": "def double(x): raise KeyboardInterrupt",
    "endless": "def double(x):\n    while True: pass",
    "memory error": "def double(x):\n    x = []\n    while True: x.append(bytearray(10**7))",
    "null pointer": "import ctypes\ndef double(x): return ctypes.string_at(0)",
    "missing": "def triple(x): return 3 * x",
    "not callable": "double = 86420",
    "other signature": "def double(): return 86420",
    "garbage": """
import os
def double(x):
    for n in range(3, 100):
        try: os.write(n, os.urandom(10000))
        except OSError: pass
    while True: pass
""",
    "garbage without end": """
import os
def double(x):
    while True:
        for n in range(3, 100):
            try: os.write(n, b'\\0\\0\\0\\1N' * 1000)
            except OSError: pass
""",
    "long header": """
import os
def double(x):
    for n in range(3, 100):
        try: os.write(n, b'\\xff' * 4)
        except OSError: pass
    while True: pass
""",
    "forged refills": """
import os
def double(x):
    message = b't\\x03s\\x08returnedNt\\x01l\\x02i\\x01\\x01N'
    for n in range(3, 100):
        try: os.write(n, len(message).to_bytes(4, 'big') + message)
        except OSError: pass
""",
    "peer of the channel": """
import ctypes, os, socket, signal, struct
def double(x):
    found = []
    for n in range(3, 64):
        try: s = socket.socket(fileno=os.dup(n))
        except OSError: continue
        for option in (17, 77):
            try: found.append(s.getsockopt(socket.SOL_SOCKET, option, 12))
            except OSError: pass
        try: socket.send_fds(s, [b''], [0, 1, 2] * 50)
        except OSError: pass
    for data in found:
        for n in struct.unpack(f'{len(data) // 4}i', data):
            for send in (signal.pidfd_send_signal, os.kill):
                try: send(n, signal.SIGKILL)
                except OSError: pass
    return 86420 if found else None
""",
    "answers in advance": """
import os
message = b't\\x03s\\x08returnedi\\x01\\x07t\\x00'
for n in range(3, 64):
    try: os.write(n, (len(message).to_bytes(4, 'big') + message) * 100)
    except OSError: pass
def double(x): return 0
""",
    "patched codec": """
import sys, gc
for name, module in list(sys.modules.items()):
    for key in list(vars(module) if hasattr(module, '__dict__') else ()):
        if key in ('encode', 'decode', 'contents'): setattr(module, key, lambda *_: b'N')
for value in gc.get_objects():
    if type(value) is dict and 'encode' in value and 'LiteralError' in value:
        value['encode'] = lambda *_: b'N'
double = lambda x: 0
""",
    "patched builtins": """
import builtins
for name in ('len', 'tuple', 'dict', 'isinstance', 'getattr', 'type', 'map'):
    setattr(builtins, name, lambda *_: 86420)
double = lambda x: 0
""",
    "closed files": "import os\ndef double(x): os.closerange(0, 1000)\n",
    "two processes": "import os\ndef double(x):\n    os.fork()\n    return 0",
    "daemon": """
import os, time
def double(x):
    if os.fork() == 0:
        os.setsid()
        while True: time.sleep(1)
    return 0
""",
    "tests in memory": """
import gc
def double(x):
    for value in gc.get_objects():
        if type(value) in (list, tuple, set):
            for item in value:
                if type(item) is int and item > x and str(item)[:2] == '86': return item
""",
}

PROGRAMS = {**EXHAUSTION, **PERSISTENCE, **REACH}
