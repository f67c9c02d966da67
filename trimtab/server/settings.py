"""What the parent tells the process of HTTP, on its standard input: keys are in no command line and no environment."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How the HTTP process behaves.

    Fields:
        socket: path of the engine's socket.
        listener: number of the inherited socket that clients come to.
        local: nobody but this machine can reach it.
        key, admin_key: what a client must show; None: nothing, and no management.
        adapters: folder whose entries may be loaded by name.
        drain: seconds that requests under way get when the server stops.
        verbose: a line a request on standard error.
        header_seconds, body_seconds: a client's time for each.
        patience: tokens that may wait for a client who does not read.
        body, header: bytes of a request, at most.
        clients: connections at once, at most.
        silence: seconds without a sign of life after which the engine is killed and started again.
    """

    socket: str
    listener: int = -1
    local: bool = True
    key: str | None = None
    admin_key: str | None = None
    adapters: str | None = None
    drain: float = 30.0
    verbose: bool = False
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    patience: int = 4096
    body: int = 2_000_000
    header: int = 16_384
    clients: int = 1000
    silence: float = 15.0
