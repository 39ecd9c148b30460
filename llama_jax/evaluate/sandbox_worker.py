"""The process in the sandbox that runs one program and its tests, within limits.

``sandbox`` gives this text to Python on the command line. The request is JSON on standard input:
``program`` and ``tests`` (Python), ``token``, and the limits ``seconds`` and ``memory_bytes``. The
answer on standard output is the token if the program and the tests end without an exception, and
"!" with the exception otherwise. It imports only the standard library.
"""

import ctypes
import errno
import json
import os
import random
import resource
import struct
import sys

FILE_BYTES = 64 << 20
"""Largest file that a program can write."""
OPEN_FILES = 64

# Numbers of system calls: x86-64, 64-bit ARM. A program has one process with one thread, and
# neither sockets nor memory outside the limit of its address space.
FORBIDDEN = {
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428), "fsopen": (430, 430),
    "ptrace": (101, 117), "socket": (41, 198), "io_uring_setup": (425, 425), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219),
}  # fmt: skip
# By name of the machine: the audit number of its architecture, and its place in FORBIDDEN.
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}


def limit(seconds: int, memory_bytes: int) -> None:
    """Set limits of the process, which it cannot raise."""
    for kind, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def forbid() -> None:
    """Give up all capabilities, and forbid the system calls of ``FORBIDDEN``."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    _check(libc.prctl(no_new_privileges, 1, 0, 0, 0))
    version_3 = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _check(libc.capset(version_3, (ctypes.c_uint32 * 6)()))
    steps = ctypes.create_string_buffer(_filter())
    count = (len(steps) - 1) // 8  # without the zero byte at the end
    header = ctypes.create_string_buffer(struct.pack("HP", count, ctypes.addressof(steps)))
    _check(libc.prctl(set_seccomp, filter_mode, ctypes.addressof(header), 0, 0))


def _check(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _filter() -> bytes:
    """The filter as a program of the Berkeley Packet Filter (linux/filter.h, linux/seccomp.h)."""
    if os.uname().machine not in MACHINES:
        raise OSError(f"no sandbox for a machine of type {os.uname().machine}")
    architecture, column = MACHINES[os.uname().machine]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | errno.EPERM
    numbers = [n for row in FORBIDDEN.values() if (n := row[column]) is not None]
    # A step: code, steps to skip if the comparison holds and if not, operand.
    steps = [(load, 0, 0, 4), (equal, 0, len(numbers) + 3, architecture), (load, 0, 0, 0)]
    steps.append((at_least, len(numbers) + 1, 0, 0x40000000))  # calls of x86-64's 32-bit mode
    steps += [(equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    steps += [(answer, 0, 0, allow), (answer, 0, 0, refuse)]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def main() -> None:
    """Run the program of the request."""
    request = json.loads(sys.stdin.buffer.read())
    output = os.dup(1)
    os.chdir("/tmp")
    printed = os.open("/tmp", os.O_RDWR | os.O_TMPFILE)  # at most FILE_BYTES; there is no input
    for standard in (0, 1, 2):
        os.dup2(printed, standard)
    limit(request["seconds"], request["memory_bytes"])
    forbid()
    random.seed(0)
    execute, write, leave = exec, os.write, os._exit  # a program can replace those of the modules
    try:
        # Compiled separately: an open string at the end of a program does not hide the tests.
        parts = [compile(request[name], f"<{name}>", "exec") for name in ("program", "tests")]
        namespace: dict = {}
        for part in parts:
            execute(part, namespace)
        answer = request["token"]
    except BaseException as e:
        answer = f"!{type(e).__name__}: {e}"
    write(output, answer[:1000].encode(errors="backslashreplace"))
    leave(0)


if __name__ == "__main__":
    main()
