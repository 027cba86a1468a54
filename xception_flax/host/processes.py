"""Several processes as one run: all start alike, and when one ends all end, each with the reason.

When a process dies, the others wait for it in a collective, and JAX ends them after minutes without a reason. So the
processes also talk through the key-value store of JAX's coordinator, which exists from before the first device to the
end. With one process, nothing here has an effect.
"""

import atexit
import contextlib
import ctypes
import hashlib
import json
import math
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from xception_flax.host import signals
from xception_flax.host.project import PACKAGE, TRAIN
from xception_flax.text.errors import TRY_AGAIN, UserError
from xception_flax.text.lookup import differing

START_SECONDS = 300  # a process waits so long for the others to start; JAX's own default
QUIET_SECONDS = 20  # after which it says so
JAX_START_SECONDS = START_SECONDS + 30  # later than ours, since JAX ends the process with a stack trace
LOOK_SECONDS = 2  # between two signs of life, and between two looks at those of the others
AWAY_LOOKS = 4  # if so many looks are missing, it was this process that stood still, perhaps all at once
STILL_SECONDS = 10  # after an error here, another process without a sign of life for so long counts as dead
SILENT_SECONDS = 75  # otherwise it does after so long, if the command says nothing else
LEAST_SILENT_SECONDS = 10  # and it cannot say less: a few signs may be late where a machine is busy
JAX_AFTER_SECONDS = 25  # so much later than we do, at least, JAX ends the processes by itself, with a stack trace
FAREWELL_SECONDS = 15  # a process that ends waits so long for the others to hear of it
SHARED_SECONDS = 30  # NFS may take so long to show a new file to all hosts

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "simplejpeg", "pillow")
SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")

MAX_NAMED = 5  # differences, or processes, in an error message
MAX_LETTERS = 80  # of each value in an error message

_EACH_HOST = (
    "Start the same command on every host, with --coordinator each with its own --process-id; look at the output there."
)
_WORD, _SIGN, _HEARD = (f"xception_flax/{name}" for name in ("word", "sign", "heard"))


# Beginning -----------------------------------------------------------------------------------------


def connect(coordinator: str, num_processes: int, process_id: int, silent_seconds: float = SILENT_SECONDS) -> None:
    """Joins the processes of a run. Call it before JAX uses a device.

    If they do not all start within `START_SECONDS`, this process prints the reason and ends with code 2.

    Args:
      coordinator: `HOST:PORT` of process 0.
      num_processes: of the whole run.
      process_id: of this process, from 0.
      silent_seconds: a process of which nothing is heard for so long counts as dead, and all others end.

    Raises:
      UserError: invalid numbers, an invalid address, or a port that process 0 cannot listen on.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator must be HOST:PORT, such as 10.0.0.1:1234, got {coordinator!r}.")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process-id must be from 0 to --num-processes less one, got {process_id} of {num_processes}."
        )
    address = (host.strip("[]"), int(port))
    if process_id == 0 and (reason := _cannot_listen(address[1])):
        raise UserError(f"process 0 cannot listen on port {port}: {reason}; take another --coordinator on all hosts.")
    with _bounded(lambda: _nobody_came(address, num_processes, process_id)):
        jax.distributed.initialize(coordinator, num_processes, process_id, **_patience(silent_seconds))
    watch(silent_seconds)


def connect_cluster(silent_seconds: float = SILENT_SECONDS) -> None:
    """Joins the processes that the cluster (TPU pod, Slurm, mpirun) has started; otherwise as `connect`.

    Raises:
      UserError: JAX finds no cluster here.
    """
    with _bounded(lambda: f"this process has waited {START_SECONDS} s for the others of the cluster. {_EACH_HOST}"):
        try:
            jax.distributed.initialize(**_patience(silent_seconds))
        except ValueError as error:  # JAX does not know this kind of cluster, or it is not set up
            raise UserError(
                f"--distributed finds no cluster (TPU pod, Slurm, mpirun) here: {str(error).rstrip('.')}. Leave it out "
                "on one machine, or give --coordinator, --num-processes and --process-id."
            ) from None
    watch(silent_seconds)


def _patience(silent_seconds: float) -> dict[str, int]:
    """Returns how long JAX itself waits.

    If process 0 stands still, JAX ends the others after half of `heartbeat_timeout_seconds` to all of it: it waits for
    an answer for half of it, from its next heartbeat on, and these are half of it apart. (With 20 s: after 12 to 21.)
    """
    return {
        "initialization_timeout": JAX_START_SECONDS,
        "heartbeat_timeout_seconds": 2 * (math.ceil(silent_seconds) + JAX_AFTER_SECONDS),
    }


@contextlib.contextmanager
def _bounded(reason: Callable[[], str]) -> Iterator[None]:
    """Ends the process, with `reason`, if the block takes longer than `START_SECONDS`; until then, Ctrl-C ends it."""

    def give_up() -> None:
        _say(f"error: {reason()}")
        os._exit(TRY_AGAIN)

    timers = [
        threading.Timer(START_SECONDS, give_up),
        threading.Timer(QUIET_SECONDS, _say, [f"waiting for the other processes, at most {START_SECONDS} s"]),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    # The block is one call of native code, so a handler of Python's would wait for its end.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
        for timer in timers:
            timer.cancel()


def _cannot_listen(port: int) -> str | None:
    """Returns why this process cannot listen on the port, or None. JAX would only print a stack trace.

    The port is bound but not listened on, so that no other process connects to this test.
    """
    try:
        with socket.socket() as look:
            look.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            look.bind(("", port))
            return None
    except OSError as error:
        return os.strerror(error.errno)


def _nobody_came(address: tuple[str, int], num_processes: int, process_id: int) -> str:
    where = f"{address[0]}:{address[1]}"
    others = "process 1 has not" if num_processes == 2 else f"not all of the processes 1 to {num_processes - 1} have"
    missing = f"{others} come to {where}"
    if process_id:
        try:
            socket.create_connection(address, timeout=5).close()
        except OSError as error:
            missing = f"process 0 does not answer at {where}: {error.strerror or error}"
    return f"process {process_id} of {num_processes} has waited {START_SECONDS} s; {missing}. {_EACH_HOST}"


# Comparing -----------------------------------------------------------------------------------------


def agree(what: str, values: Callable[[], Mapping[str, Any]]) -> None:
    """Compares values over all processes. Each process must call it.

    Args:
      what: name of the comparison; a name can be used once.
      values: returns JSON values by name, which must be equal everywhere. The names stand in the error message. With
        one process it is not called.

    Raises:
      UserError: on every process, if a value differs. The message says which, and on which processes.
    """
    if jax.process_count() == 1:
        return
    if differing := differences([json.loads(text) for text in _gather(what, json.dumps(values()))]):
        more = f"; and {len(differing) - MAX_NAMED} more" if len(differing) > MAX_NAMED else ""
        raise UserError(
            f"the processes of this run are not alike: {'; '.join(differing[:MAX_NAMED])}{more}. "
            "Start the same on every host."
        )


def software() -> dict[str, Any]:
    """Returns what a result depends on, for `agree`: this code, the versions of libraries, flags and devices."""
    code = hashlib.sha256()
    for file in sorted({*PACKAGE.rglob("*.py"), TRAIN}):
        if file.is_file():
            code.update(f"{file.relative_to(PACKAGE.parent)}\0".encode() + file.read_bytes())
    return {
        "the code of xception_flax (SHA-256)": code.hexdigest()[:16],
        **{f"the version of {name}": _version(name) for name in LIBRARIES},
        **{name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
        **{name: getattr(jax.config, name) for name in SETTINGS},
        "--num-processes": _client_state().num_processes,
        "the kind of devices": jax.local_devices()[0].device_kind,
        "the number of local devices": jax.local_device_count(),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # a nightly build has another name
        return "none of that name"


def differences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describes each value that differs between processes, one row each: 'seed is 0 on process 0, 1 on process 1'."""
    said = []
    for name in differing(rows):
        found: dict[str, list[int]] = {}
        for process, row in enumerate(rows):
            found.setdefault(json.dumps(row[name], sort_keys=True) if name in row else "missing", []).append(process)
        values = [f"{_shortened(value)} on {_processes(where)}" for value, where in found.items()]
        said.append(f"{name} is {', '.join(values)}")
    return said


def _shortened(text: str) -> str:
    """Cuts a long value. Its hash shows a difference that is in the part left out."""
    if len(text) <= MAX_LETTERS:
        return text
    return f"{text[:MAX_LETTERS]}... (SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:8]})"


def _processes(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"process {numbers[0]}"
    named = ", ".join(map(str, numbers[:MAX_NAMED])) + (", ..." if len(numbers) > MAX_NAMED else "")
    return f"{len(numbers)} processes ({named})"


def check_shared(folder: Path) -> None:
    """Checks that `folder`, which the first process has made, is the same folder for all processes.

    Raises:
      UserError: on every process, if one of them does not see a file that the first has written.
    """
    if jax.process_count() == 1:
        return
    first = jax.process_index() == 0
    name = f".shared-{secrets.token_hex(8)}" if first else ""  # a new name, so no NFS client has cached its absence
    if first:
        (folder / name).touch()
    file = folder / _gather("name", name)[0]
    deadline = time.monotonic() + SHARED_SECONDS
    while not (seen := file.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [i for i, sees in enumerate(_gather("shared", str(seen))) if sees != "True"]
    if first:
        file.unlink()
    if blind:
        raise UserError(
            f"{folder} is not one folder for all: {_processes(blind)} cannot see there what process 0 wrote "
            f"{SHARED_SECONDS} s before. Take a folder of a file system that all hosts share."
        )


def per_host() -> int:
    """Returns the number of processes of this run on this host, including this one. All processes must call it."""
    if jax.process_count() == 1:
        return 1
    host = np.uint32(zlib.crc32(socket.gethostname().encode()))
    return int(np.sum(multihost_utils.process_allgather(host) == host))


def all_say(value: bool) -> bool:
    """Returns whether the value is true on every process. All processes must call it."""
    return value if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.bool_(value))))


# Ending --------------------------------------------------------------------------------------------


def end(code: int, message: str, error: BaseException | None = None) -> None:
    """Ends this process and all others after a failure. With a single process it returns at once.

    If another process has failed before, this failure most likely follows from it, and the other's reason is printed.
    The ends of `with` blocks and Python's exit handlers do not run, since they may wait for the other processes.

    Args:
      code: exit code of all processes.
      message: what this process prints: 'error: ...', or a traceback.
      error: the exception of a traceback; the others print its last line. It may come from the death of another
        process, for which JAX has no exception type, so dead processes are looked for first.
    """
    if not _is_several():
        return
    _ending.acquire()
    reason, dead = message.removeprefix("error: ").strip() or "nobody reads its output", []
    if error is not None:  # JAX adds notes, which come after the error itself
        reason = traceback.format_exception_only(error)[0].strip()
    if error is not None and _word() is None and (dead := _standing_still()):
        code, reason = TRY_AGAIN, _died(dead, STILL_SECONDS)
        message = f"error: {reason}"
    _tell(code, reason)
    word = _word()
    if word is None or word[1] == jax.process_index() or word[2] == reason:
        _say(message)
    else:
        code = word[0]
        _say(_of_another(*word[1:]))
    _leave(code, dead=len(dead))


def _standing_still() -> list[int]:
    """Returns the other processes that give no sign of life for `STILL_SECONDS` from now."""
    still = set(range(_client_state().num_processes)) - {_client_state().process_id}
    deadline = time.monotonic() + STILL_SECONDS
    try:
        before = dict(_client().key_value_dir_get(_SIGN))
        while still and time.monotonic() < deadline:
            time.sleep(0.1)
            now = dict(_client().key_value_dir_get(_SIGN))
            still = {i for i in still if before.get(f"{_SIGN}/{i}") == now.get(f"{_SIGN}/{i}")}
    except Exception:  # the coordinator has gone, and another thread ends this process
        return []
    return sorted(still)


def interrupted(number: int, frame: FrameType | None = None) -> NoReturn:
    """Handles Ctrl-C before the first step: ends this process, and tells the others to end."""
    signal.signal(number, signals.stop_at_once)  # for a second Ctrl-C
    _tell(128 + number, "it was interrupted")
    _say("\ninterrupted")
    _leave(128 + number)


def leave() -> None:
    """Waits until all processes have finished, or one fails. Call it before a successful exit."""
    if _is_several():
        _gather("done", "")
        _watching.stop()


def watch(silent_seconds: float = SILENT_SECONDS) -> None:
    """Starts threads that end this process when another has failed, or has given no sign of life for so long."""
    if _is_several():
        _watching.start(silent_seconds)
        signal.signal(signal.SIGINT, interrupted)


class _Watch:
    """The threads that give signs of life, and look for those of other processes and for their failures."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._code: int | None = None
        self._threads: list[threading.Thread] = []

    def start(self, silent_seconds: float) -> None:
        self._silent_seconds, self._heard = silent_seconds, time.monotonic()
        bodies = [self._run]
        if _client_state().process_id != 0:
            bodies.append(self._watch_first)
            self._catch_abort()
        self._threads = [threading.Thread(target=body, daemon=True) for body in bodies]
        for thread in self._threads:
            thread.start()
        atexit.register(self.stop)  # Python must not end while a thread is in native code

    def stop(self) -> None:
        self.ignore()
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def ignore(self, code: int | None = None) -> None:
        """Whatever ends from now on is no failure. With `code` this process ends with it, whatever it meets there."""
        self._code = code
        self._stopped.set()

    def _run(self) -> None:
        me, signs = _client_state().process_id, Signs(_client_state().num_processes, self._silent_seconds)
        for number in range(2**62):
            try:
                _client().key_value_set(f"{_SIGN}/{me}", str(number), allow_overwrite=True)
                self._heard = time.monotonic()
                if me == 0 and (silent := signs.silent(dict(_client().key_value_dir_get(_SIGN)), time.monotonic())):
                    _ending.acquire()
                    _tell(TRY_AGAIN, _died(silent, self._silent_seconds))
                    _say(f"error: {_died(silent, self._silent_seconds)}")
                    _leave(TRY_AGAIN, dead=len(silent))
                word = _word()
            except Exception:  # the coordinator cannot be reached, which is for `_watch_first`
                word = None
            if word is not None and word[1] != me:
                _ending.acquire()
                _say(_of_another(*word[1:]))
                _leave(word[0])
            if self._stopped.wait(LOOK_SECONDS):
                return

    def _watch_first(self) -> None:
        """Ends this process when process 0 has gone, and with it the coordinator.

        JAX notices it at the same moment. It prints a stack trace and aborts, which takes a tenth of a second, and
        does not say which process it was. So this thread keeps a connection to the coordinator's port that is never
        used: the system closes it when process 0 ends. gRPC too closes it, after two minutes; then a new one is opened.
        """
        host, _, port = _client_state().coordinator_address.rpartition(":")
        while not self._stopped.is_set():
            try:
                with socket.create_connection((host.strip("[]"), int(port)), timeout=1) as line:
                    while not self._stopped.is_set():
                        if time.monotonic() - self._heard > self._silent_seconds:
                            self._end_without_first(_died([0], self._silent_seconds))
                        with self._waiting(), contextlib.suppress(TimeoutError):
                            if not line.recv(1024):
                                break
            except ConnectionRefusedError:
                self._end_without_first(_gone())
            except OSError:  # closed at this moment, or the network is down
                if time.monotonic() - self._heard > self._silent_seconds:
                    self._end_without_first(_died([0], self._silent_seconds))
                with self._waiting():
                    self._stopped.wait(0.5)  # without a route, connecting fails at once

    def _catch_abort(self) -> None:
        """Sets what happens on SIGABRT: JAX aborts this process when process 0 has gone, and may see it first.

        Python's own handlers would come too late: it runs them between two of its instructions, and abort() does not
        return. So this one is C's, and runs in the thread that aborts. An abort of another reason takes its course.
        """

        def aborted(number: int) -> None:
            if self._code is not None:  # process 0 has left before this one
                os._exit(self._code)
            if (reason := self._without_first()) is not None:
                self._end_without_first(reason)

        self._aborted = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)  # it must live as long as it may be called
        ctypes.CDLL(None).signal(signal.SIGABRT, self._aborted)

    def _without_first(self) -> str | None:
        """Returns why this process must end, if process 0 has gone or stands still."""
        host, _, port = _client_state().coordinator_address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
        except ConnectionRefusedError:
            return _gone()
        except OSError:
            pass
        silence = time.monotonic() - self._heard
        return _died([0], round(silence)) if silence > STILL_SECONDS else None

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Around a wait of a second at most. If it took far longer, process 0 may have stood still as well."""
        begin = time.monotonic()
        try:
            yield
        finally:
            if (now := time.monotonic()) - begin > AWAY_LOOKS * LOOK_SECONDS:
                self._heard = now

    def _end_without_first(self, reason: str) -> None:
        """Ends this process at once, without the lock: who has it cannot reach the others either."""
        if self._stopped.is_set():
            return
        _say(f"error: {reason}")
        os._exit(TRY_AGAIN)


class Signs:
    """When each process gave its last sign of life, by this process's clock."""

    def __init__(self, num_processes: int, silent_seconds: float) -> None:
        self._last: dict[int, tuple[str | None, float]] = {}
        self._num_processes, self._silent_seconds = num_processes, silent_seconds
        self._looked: float | None = None

    def silent(self, signs: Mapping[str, str], now: float) -> list[int]:
        """Returns the processes whose sign has not changed for too long. Call it every `LOOK_SECONDS`.

        After a pause of `AWAY_LOOKS` looks it begins anew: all hosts may have been suspended together.
        """
        if self._looked is not None and now - self._looked > AWAY_LOOKS * LOOK_SECONDS:
            self._last.clear()
        self._looked = now
        by_process = {int(key.rpartition("/")[2]): sign for key, sign in signs.items()}
        for process in range(self._num_processes):
            sign = by_process.get(process)
            if process not in self._last or self._last[process][0] != sign:
                self._last[process] = (sign, now)
        return [process for process, (_, since) in self._last.items() if now - since > self._silent_seconds]


_watching = _Watch()
_ending = threading.Lock()  # never released: if two threads find that the run must end, one of them prints it


def _of_another(process: int, reason: str) -> str:
    return f"error: process {process} has failed, and ends all: {reason}"


def _died(silent: list[int], seconds: float) -> str:
    return (
        f"nothing has been heard of {_processes(silent)} for {seconds:g} s: killed, or the machine or the "
        "network is down; see what was said there last. The same command on all goes on from the last checkpoint."
    )


def _gone() -> str:
    return (
        "process 0 has gone: killed, or its machine is down; see what was said there last. The same command on all "
        "goes on from the last checkpoint."
    )


def _tell(code: int, reason: str) -> None:
    with contextlib.suppress(Exception):  # another process was first, or the coordinator has gone
        _client().key_value_set(_WORD, json.dumps([code, _client_state().process_id, reason]))


def _word() -> tuple[int, int, str] | None:
    try:
        return tuple(json.loads(_client().key_value_try_get(_WORD)))
    except Exception:  # nobody has failed; JAX has no exception type for a missing key
        return None


def _leave(code: int, dead: int = 0) -> NoReturn:
    """Ends the process when all but the dead have heard. Python's and JAX's own exit would wait for the dead."""
    state = _client_state()
    _watching.ignore(code)
    deadline = time.monotonic() + FAREWELL_SECONDS
    with contextlib.suppress(Exception):
        _client().key_value_set(f"{_HEARD}/{state.process_id}", "", allow_overwrite=True)
        while len(_client().key_value_dir_get(_HEARD)) < state.num_processes - dead and time.monotonic() < deadline:
            time.sleep(0.1)
    if state.process_id == 0:
        time.sleep(1)  # the coordinator ends with this process, which aborts processes that still ask it
    with contextlib.suppress(Exception):  # the reader of a pipe may have gone
        sys.stdout.flush()
    os._exit(code)


def _say(text: str) -> None:
    behind_bar = "\x1b[?25h\n" if os.isatty(2) else ""  # show the cursor that the progress bar hides; leave its line
    with contextlib.suppress(OSError):  # nobody reads it, and this process must end all the same
        os.write(2, f"{behind_bar}{text}\n".encode(errors="backslashreplace"))


# JAX's key-value store -----------------------------------------------------------------------------


def _gather(name: str, value: str) -> list[str]:
    """Returns the values of all processes and waits for them. Each process must call it."""
    state = _client_state()
    _client().key_value_set(f"xception_flax/{name}/{state.process_id}", value)
    # JAX's count, not this process's own --num-processes, which is one of the values to compare.
    while len(found := _client().key_value_dir_get(f"xception_flax/{name}")) < jax.process_count():
        time.sleep(0.05)
    return [value for _, value in sorted(found, key=lambda item: int(item[0].rpartition("/")[2]))]


def _is_several() -> bool:
    return jax.distributed.is_initialized() and _client_state().num_processes > 1


def _client_state() -> Any:
    # JAX's key-value store has no public API; Orbax uses the same private one.
    from jax._src import distributed

    return distributed.global_state


def _client() -> Any:
    return _client_state().client
