"""Runs scripts of the suite on a Linux from which that is taken away which Windows or macOS lack.

    python tests/stripped.py windows commands.json    the commands are lists: script, arguments

The libraries are imported before, as theirs would be others there; the suite's own modules are imported afterwards. `os.name`
stays, because pathlib and the libraries choose code of the operating system by it. What a locale says about text files comes
from the environment (LOCALE).
"""

import builtins
import ctypes
import importlib
import json
import multiprocessing.resource_tracker
import os
import platform
import re
import runpy
import select
import shutil
import signal
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "cp1252"}  # text files: ASCII
SIGNALS_OF_WINDOWS = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN", "SIGBREAK"}
LACKING = {
    "windows": {
        os: r"EX_|(sysconf|sched_|f?statvfs|mkfifo|nice|getloadavg|uname$|wait3|wait4|fork|register_at_fork|killpg|setsid"
        r"|setpgid|get[efpr]?[ug]?id$|getpg|chown|pread|pwrite|posix_|sendfile|sync$|memfd|pipe2|O_DIRECT|O_NOFOLLOW|O_TMPFILE)",
        select: r"e?poll$|EPOLL|POLL",
        signal: rf"(?!({'|'.join(SIGNALS_OF_WINDOWS)})$)SIG|pthread_|sigwait|sigtimedwait|sigpending|alarm$|pause$",
    },
    "macos": {
        os: r"sched_[gs]etaffinity|memfd|pipe2|O_TMPFILE|O_DIRECT$|posix_fa|copy_file_range|splice|eventfd",
        select: r"epoll|EPOLL",
        signal: r"sigwaitinfo|sigtimedwait|SIGRT|SIGPOLL|SIGPWR|SIGSTKFLT",
    },
}
KEPT = {"getpid", "getppid", "kill", "forkpty"}  # Windows has them, or nobody uses them
MODULES = {"windows": ["fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline"], "macos": []}
LIBRARIES = ["train_lora", "infer", "torch.utils.tensorboard", "bitsandbytes", "asyncio", "pyarrow.parquet", "csv"]


def import_libraries() -> None:
    """Imports what the suite imports, and forgets the suite's own modules."""
    sys.path.insert(0, str(ROOT))
    for name in LIBRARIES:
        importlib.import_module(name)
    for name in ("diffusers.pipelines.stable_diffusion_xl", "transformers.models.clip", "diffusers.schedulers"):
        importlib.import_module(name)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if file.startswith(f"{ROOT}/") and "/.venv" not in file and name != "__main__":
            del sys.modules[name]


def strip(system: str) -> None:
    """Takes away what `system`, 'windows' or 'macos', lacks."""
    platform.uname()  # cached
    tempfile.gettempdir()
    multiprocessing.resource_tracker._HAVE_SIGMASK = False  # read at its import, as other libraries do
    sys.platform = {"windows": "win32", "macos": "darwin"}[system]
    for module, pattern in LACKING[system].items():
        for name in [name for name in dir(module) if re.match(pattern, name) and name not in KEPT]:
            delattr(module, name)
    fcntl = importlib.import_module("fcntl")
    for name in MODULES[system]:
        sys.modules[name] = None

    class Library(ctypes.CDLL):
        def __init__(self, name, *arguments, **options):
            if name is None and system == "windows":
                raise TypeError("Windows has no library without a name")
            super().__init__(name, *arguments, **options)

        def __getattr__(self, name):
            if name == "prctl":
                raise AttributeError("prctl")
            return super().__getattr__(name)

    ctypes.CDLL = Library
    if system == "windows":
        behave_like_windows(fcntl)


def behave_like_windows(fcntl) -> None:
    """Names, open files and folders as there; and the modules that are there only."""

    def locking(file: int, mode: int, size: int) -> None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, size)
        except OSError:
            raise PermissionError(13, "Permission denied") from None

    sys.modules["msvcrt"] = type(sys)("msvcrt")
    sys.modules["msvcrt"].__dict__.update(locking=locking, LK_NBLCK=2, LK_LOCK=1)
    memory_info = psutil.Process.memory_info
    Memory = namedtuple("Memory", "rss vms peak_wset")
    psutil.Process.memory_info = lambda self: Memory(*memory_info(self)[:2], memory_info(self).rss)
    shutil._use_fd_functions = shutil._USE_CP_SENDFILE = False
    rename = os.rename

    def rename_once(source, target, **options) -> None:
        if os.path.exists(target):
            raise FileExistsError(17, f"rename onto {target}")
        rename(source, target, **options)

    os.rename = rename_once

    def watch(event: str, arguments: tuple) -> None:
        if event not in ("open", "os.mkdir", "os.remove", "os.rmdir", "os.rename"):
            return
        paths = [os.path.abspath(os.fsdecode(path)) for path in arguments[:2] if isinstance(path, str | bytes | os.PathLike)]
        if event == "open":
            del paths[1:]  # the mode
        if any(path.startswith(("/proc", "/sys", "/dev")) for path in paths):
            return
        for path in paths:
            if re.search(r'[<>:"|?*\\]|[. ](/|$)', path.removeprefix("/")):
                raise OSError(22, f"no name on Windows: {path}")
            if event == "open" and os.path.isdir(path):
                raise PermissionError(13, f"a folder cannot be opened on Windows: {path}")
            if event in ("os.remove", "os.rename") and (user := opened(path)):
                raise PermissionError(13, f"in use on Windows: {user}")

    sys.addaudithook(watch)


def opened(path: str) -> str | None:
    """An open or mapped file that is `path` or in it."""
    found = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")]
    with builtins.open("/proc/self/maps", encoding="utf-8") as file:
        found += [line.split(maxsplit=5)[5].strip() for line in file if line.count("/")]
    return next((name for name in found if name == path or name.startswith(f"{path}/")), None)


def run(command: list[str]) -> None:
    """Raises what the script raises, and RuntimeError for another status than 0."""
    print("$", *command, flush=True)
    sys.argv = command
    streams = sys.stdout, sys.stderr
    try:
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    except SystemExit as error:
        if error.code:
            raise RuntimeError(f"{command} exited with {error.code}") from None
    finally:
        sys.stdout, sys.stderr = streams


if __name__ == "__main__":
    import_libraries()
    strip(sys.argv[1])
    for command in json.loads(Path(sys.argv[2]).read_bytes()):
        run(command)
