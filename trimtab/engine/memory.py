"""Memory of this process: what is free, and that what is freed is kept for the next use."""

from __future__ import annotations

import contextlib
import ctypes

FRUGAL = 1 << 20  # bytes from which on a block goes back to the system when it is freed, where memory is short


def keep_freed_memory(largest: int | None = None) -> None:
    """Have the C library keep what is freed: where the same sizes are asked for again and again, pages that go back to
    the system have to be fetched and cleared anew, which can take as long as the work. It holds for the whole process;
    a library without these switches is left as it is.

    Args:
        largest: blocks of more bytes go back all the same, and so does what exceeds four of them; None: nothing does.
    """
    trim_threshold, top_pad, mmap_threshold, mmap_max = -1, -2, -3, -4
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        if largest is None:
            mallopt(mmap_max, 0)
            mallopt(trim_threshold, (1 << 31) - 1)
            mallopt(top_pad, 1 << 26)
        else:
            mallopt(mmap_max, 1 << 16)
            mallopt(mmap_threshold, largest)
            mallopt(trim_threshold, 4 * largest)


def give_back_freed_memory() -> None:
    """Have the C library give back to the system what was freed and lies idle, once."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_bytes() -> int | None:
    """Memory that can be had without swapping, or None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
