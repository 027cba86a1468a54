"""The history of a run again, as TensorBoard events."""

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore[missing-module-attribute]
from tensorboardX.proto.summary_pb2 import Summary  # pyrefly: ignore[missing-module-attribute]

from xception_flax.host.files import file_errors
from xception_flax.text.errors import UserError


class Events:
    """A file of TensorBoard events, written by the thread that adds them.

    tensorboardX's own `SummaryWriter` writes in a thread of its own, which dies when the disk is full. Its queue then
    fills, and the run waits for ever.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        """Begins a file in `folder`. It makes TensorBoard ignore older events of steps after `start_step`.

        Raises:
          UserError: it cannot be written; `add` raises it too.
        """
        now = time.time()
        # Absolute, since tensorboardX may take the beginning of a relative name for a protocol.
        self._path = folder.absolute() / f"events.out.tfevents.{now:.0f}.{socket.gethostname()}.{os.getpid()}"
        with file_errors(self._path, "written"):
            folder.mkdir(exist_ok=True)
            self._file = RecordWriter(str(self._path))
        try:
            self._write(
                Event(wall_time=now, file_version="brain.Event:2"),
                Event(wall_time=now, step=start_step + 1, session_log=SessionLog(status=SessionLog.START)),
            )
        except UserError:
            with contextlib.suppress(OSError):  # closing writes what is left, which fails again
                self.close()
            raise

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a step, by name."""
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._file.close()

    def _write(self, *events: Event) -> None:
        with file_errors(self._path, "written"):
            for event in events:
                self._file.write(event.SerializeToString())
            self._file.flush()
