"""The engine's sign of life: a file whose time moves on for as long as the loop that serves goes round.

A thread touches it, so that a long step is no silence. It stops where the loop has not come round for longer than any
step can take; and a process that is stopped has no threads that run. Whoever keeps watch looks at nothing else.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

BEAT = 0.5  # seconds from one sign to the next
LONGEST = 120.0  # seconds that a step may take, at least
TIMES = 20.0  # how many times as long as the largest step took when it was tried a step may take


def beat_of(socket: Path) -> Path:
    """Where the engine of a socket gives its sign.

    >>> beat_of(Path("/tmp/a/engine"))
    PosixPath('/tmp/a/engine.beat')
    """
    return socket.with_suffix(".beat")


class Pulse:
    """Begins to give the sign.

    Args:
        path: the file.
        longest: seconds that may lie between two turns of the loop.
    """

    def __init__(self, path: Path, longest: float = LONGEST) -> None:
        self._path, self._longest, self._turned = path, longest, time.monotonic()
        path.touch(mode=0o600)
        threading.Thread(target=self._beat, daemon=True).start()

    def turn(self) -> None:
        """The loop has come round."""
        self._turned = time.monotonic()

    def _beat(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # nobody listens any more
            while True:
                if time.monotonic() - self._turned < self._longest:
                    os.utime(self._path)
                time.sleep(BEAT)


class Ear:
    """Listens for the sign of a child. Time in which the listener itself was held up does not count.

    Args:
        path: the file.
        silence: seconds without a sign after which the child counts as hung; before its first sign, it does not.
    """

    def __init__(self, path: Path, silence: float) -> None:
        self._path, self.silence = path, silence
        self.forget()

    def forget(self) -> None:
        """A new child begins."""
        self._path.unlink(missing_ok=True)
        self._last, self._quiet, self._looked = 0, 0.0, time.monotonic()

    def hung(self) -> bool:
        """Whether it has been silent for too long; to be asked at least once a second."""
        now = time.monotonic()
        self._quiet, self._looked = self._quiet + min(now - self._looked, 1.0), now
        beat = self._path.stat().st_mtime_ns if self._path.exists() else 0
        if beat != self._last or not beat:
            self._last, self._quiet = beat, 0.0
        return self._quiet > self.silence
