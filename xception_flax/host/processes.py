"""Several processes as one run: all begin alike, and where one ends all do, each with the reason.

A process that waits for another in a collective would wait for ever, and JAX ends it after minutes with no word of
what was the matter. So the processes talk beside the program, through the key-value store of JAX's coordinator, which
is there from before the first device to the end. With one process nothing here does anything.
"""

import atexit
import contextlib
import hashlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import jax

from xception_flax.host import signals
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import differing

START_SECONDS = 300  # that a process waits for the others; JAX's own default
JAX_START_SECONDS = START_SECONDS + 30  # JAX ends the process with a stack in place of a sentence: it must come later
LOOK_SECONDS = 2  # between two looks at what the others say, and two signs of life
STILL_SECONDS = 10  # without one a process counts as dead where its death is what an error here looks like
SILENT_SECONDS = 75  # without a sign of life a process counts as dead; JAX itself takes 100 and says it in a stack
FAREWELL_SECONDS = 15  # that a process which ends waits for the others to hear of it
SHARED_SECONDS = 30  # that a new folder may take to be seen by all: so long NFS may say that there is none

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "simplejpeg", "pillow")
SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")

MAX_NAMED = 5  # differences in an error message
MAX_LETTERS = 80  # of each value

_EACH_HOST = (
    "Start the same command on every host, with --coordinator each with its own --process-id; see what is said there."
)
_WORD, _SIGN, _HEARD = (f"xception_flax/{name}" for name in ("word", "sign", "heard"))


# Beginning -----------------------------------------------------------------------------------------


def connect(coordinator: str, num_processes: int, process_id: int) -> None:
    """Joins the processes of a run; to be called before JAX touches a device.

    Where they do not come within `START_SECONDS`, the process ends with code 2 and a sentence.

    Args:
      coordinator: `HOST:PORT` of process 0.

    Raises:
      ValueError: numbers or an address that cannot be, or an address that process 0 cannot listen on.
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
        jax.distributed.initialize(coordinator, num_processes, process_id, initialization_timeout=JAX_START_SECONDS)
    watch()


def connect_cluster() -> None:
    """Joins the processes that the cluster (TPU pod, Slurm) says there are; otherwise as `connect`.

    Raises:
      ValueError: JAX finds no cluster here.
    """
    with _bounded(lambda: f"this process has waited {START_SECONDS} s for the others of the cluster. {_EACH_HOST}"):
        try:
            jax.distributed.initialize(initialization_timeout=JAX_START_SECONDS)
        except ValueError as error:  # of JAX's kinds of clusters it is none, or one that is not set up
            raise UserError(
                f"--distributed finds no cluster (TPU pod, Slurm) here: {str(error).rstrip('.')}. Leave it out on "
                "one machine, or give --coordinator, --num-processes and --process-id."
            ) from None
    watch()


@contextlib.contextmanager
def _bounded(reason: Callable[[], str]) -> Iterator[None]:
    """Ends the process with a sentence where what is within takes longer than `START_SECONDS`."""

    def give_up() -> None:
        _say(f"error: {reason()}")
        os._exit(2)

    timer = threading.Timer(START_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _cannot_listen(port: int) -> str | None:
    """Why, or None. JAX would say it in a stack. Bound and not listened on, so that nobody connects to this look."""
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


# Alike ---------------------------------------------------------------------------------------------


def agree(what: str, values: Callable[[], Mapping[str, Any]]) -> None:
    """Compares values over all processes, each of which must call it.

    Args:
      what: name of the comparison; each is made once.
      values: returns JSON values that must be equal, by the name that a message gives them; with one process it is
        not called.

    Raises:
      ValueError: on every process, where a value differs; it names what differs, and on which process.
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
    """What computes, for `agree`: this code, the libraries that a result depends on, flags and devices."""
    code = hashlib.sha256()
    package = Path(__file__).parents[1]
    for file in sorted([*package.rglob("*.py"), package.parent / "train.py"]):
        if file.is_file():
            code.update(f"{file.relative_to(package.parent)}\0".encode() + file.read_bytes())
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
    except metadata.PackageNotFoundError:  # a nightly build has a name of its own
        return "none of that name"


def differences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Says of each value that differs what it is where: 'seed is 0 on process 0, 1 on process 1'. A row a process."""
    said = []
    for name in differing(rows):
        found: dict[str, list[int]] = {}
        for process, row in enumerate(rows):
            found.setdefault(json.dumps(row[name], sort_keys=True) if name in row else "missing", []).append(process)
        values = [f"{_shortened(value)} on {_processes(where)}" for value, where in found.items()]
        said.append(f"{name} is {', '.join(values)}")
    return said


def _shortened(text: str) -> str:
    """Long values differ somewhere: what is left out of one is in its hash."""
    if len(text) <= MAX_LETTERS:
        return text
    return f"{text[:MAX_LETTERS]}... (SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:8]})"


def _processes(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"process {numbers[0]}"
    named = ", ".join(map(str, numbers[:MAX_NAMED])) + (", ..." if len(numbers) > MAX_NAMED else "")
    return f"{len(numbers)} processes ({named})"


def check_shared(folder: Path) -> None:
    """Compares whether `folder`, which the first process has made, is one and the same for all.

    Raises:
      ValueError: on every process, where some process does not see there what the first has written.
    """
    if jax.process_count() == 1:
        return
    first = jax.process_index() == 0
    name = f".shared-{secrets.token_hex(8)}" if first else ""  # no client of NFS can remember that it is not there
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


# Ending --------------------------------------------------------------------------------------------


def end(code: int, message: str, error: BaseException | None = None) -> None:
    """Ends this process and all others where one of several fails; returns where there is one only.

    Where another has failed before, this is most likely what came of it, and the other's reason is the one that is
    said. Nothing that stands on a `with` or at Python's exit is done any more: it may wait for the others.

    Args:
      code: exit code of all of them.
      message: what this process says: 'error: ...', or a traceback.
      error: of a traceback, which the others say in short. It may be what another's death looks like from here: JAX
        has no type of its own for that, so that a death is looked for first.
    """
    if not _is_several():
        return
    _ending.acquire()
    reason, dead = message.removeprefix("error: ").strip() or "nobody reads its output", []
    if error is not None:  # JAX adds notes to errors, which come behind the error itself
        reason = traceback.format_exception_only(error)[0].strip()
    if error is not None and _word() is None and (dead := _standing_still()):
        code, reason = 2, _died(dead, STILL_SECONDS)
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
    """The other processes that give no sign of life while this one looks for `STILL_SECONDS`."""
    still = set(range(_client_state().num_processes)) - {_client_state().process_id}
    deadline = time.monotonic() + STILL_SECONDS
    try:
        before = dict(_client().key_value_dir_get(_SIGN))
        while still and time.monotonic() < deadline:
            time.sleep(0.1)
            now = dict(_client().key_value_dir_get(_SIGN))
            still = {i for i in still if before.get(f"{_SIGN}/{i}") == now.get(f"{_SIGN}/{i}")}
    except Exception:  # the coordinator has gone, and JAX ends this process
        return []
    return sorted(still)


def interrupted(number: int, frame: FrameType | None = None) -> NoReturn:
    """Handles Ctrl-C before the first step: ends this process, and the others with a word of it."""
    signal.signal(number, signals.stop_at_once)  # where it comes again
    _tell(128 + number, "it was interrupted")
    _say("\ninterrupted")
    _leave(128 + number)


def leave() -> None:
    """Waits for all processes to have come to their end, or for one to fail; to be called before a good exit."""
    if _is_several():
        _gather("done", "")
        _watching.stop()


def watch() -> None:
    """Lets a thread look whether another process has failed or died, which then ends this one too."""
    if _is_several():
        _watching.start()
        signal.signal(signal.SIGINT, interrupted)


class _Watch:
    """The thread that gives signs of life, and looks for those of others and for their last words."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # Python must not end while the thread is in native code

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        me, signs = _client_state().process_id, Signs(_client_state().num_processes)
        for number in range(2**62):
            try:
                _client().key_value_set(f"{_SIGN}/{me}", str(number), allow_overwrite=True)
                if me == 0 and (silent := signs.silent(dict(_client().key_value_dir_get(_SIGN)), time.monotonic())):
                    _ending.acquire()
                    _tell(2, _died(silent, SILENT_SECONDS))
                    _say(f"error: {_died(silent, SILENT_SECONDS)}")
                    _leave(2, dead=len(silent))
                word = _word()
            except Exception:  # the coordinator cannot be reached: JAX ends the process where that lasts
                word = None
            if word is not None and word[1] != me:
                _ending.acquire()
                _say(_of_another(*word[1:]))
                _leave(word[0])
            if self._stopped.wait(LOOK_SECONDS):
                return


class Signs:
    """When each process has given its last sign of life, by the clock of the one that looks."""

    def __init__(self, num_processes: int) -> None:
        self._last: dict[int, tuple[str | None, float]] = {}
        self._num_processes = num_processes

    def silent(self, signs: Mapping[str, str], now: float) -> list[int]:
        """Returns the processes whose sign has not changed for too long."""
        by_process = {int(key.rpartition("/")[2]): sign for key, sign in signs.items()}
        for process in range(self._num_processes):
            sign = by_process.get(process)
            if process not in self._last or self._last[process][0] != sign:
                self._last[process] = (sign, now)
        return [process for process, (_, since) in self._last.items() if now - since > SILENT_SECONDS]


_watching = _Watch()
_ending = threading.Lock()  # never let go: of two threads that find an end one says it


def _of_another(process: int, reason: str) -> str:
    return f"error: process {process} has failed, and ends all: {reason}"


def _died(silent: list[int], seconds: float) -> str:
    return (
        f"nothing has been heard of {_processes(silent)} for {seconds:g} s: killed, or the machine or the "
        "network is down; see what was said there last. The same command on all goes on from the last checkpoint."
    )


def _tell(code: int, reason: str) -> None:
    with contextlib.suppress(Exception):  # another has told, or the coordinator has gone
        _client().key_value_set(_WORD, json.dumps([code, _client_state().process_id, reason]))


def _word() -> tuple[int, int, str] | None:
    try:
        return tuple(json.loads(_client().key_value_try_get(_WORD)))
    except Exception:  # not there, for which JAX has no type of its own
        return None


def _leave(code: int, dead: int = 0) -> NoReturn:
    """Ends the process when all but the dead have heard; Python's and JAX's own exit would wait for them."""
    state = _client_state()
    deadline = time.monotonic() + FAREWELL_SECONDS
    with contextlib.suppress(Exception):
        _client().key_value_set(f"{_HEARD}/{state.process_id}", "", allow_overwrite=True)
        while len(_client().key_value_dir_get(_HEARD)) < state.num_processes - dead and time.monotonic() < deadline:
            time.sleep(0.1)
    if state.process_id == 0:
        time.sleep(1)  # the coordinator is in this process: what it takes along aborts those that still ask it
    with contextlib.suppress(Exception):  # whoever reads it may have gone
        sys.stdout.flush()
    os._exit(code)


def _say(text: str) -> None:
    behind_bar = "\x1b[?25h\n" if os.isatty(2) else ""  # the progress bar hides the cursor, and leaves it on its line
    os.write(2, f"{behind_bar}{text}\n".encode(errors="backslashreplace"))


# JAX's key-value store -----------------------------------------------------------------------------


def _gather(name: str, value: str) -> list[str]:
    """Returns the values of all processes, each of which must call it; waits for them."""
    state = _client_state()
    _client().key_value_set(f"xception_flax/{name}/{state.process_id}", value)
    # Not as many as this process was told of: that is one of the things to be compared.
    while len(found := _client().key_value_dir_get(f"xception_flax/{name}")) < jax.process_count():
        time.sleep(0.05)
    return [value for _, value in sorted(found, key=lambda item: int(item[0].rpartition("/")[2]))]


def _is_several() -> bool:
    return jax.distributed.is_initialized() and _client_state().num_processes > 1


def _client_state() -> Any:
    # JAX has no public way to its key-value store; Orbax goes this one too.
    from jax._src import distributed

    return distributed.global_state


def _client() -> Any:
    return _client_state().client
