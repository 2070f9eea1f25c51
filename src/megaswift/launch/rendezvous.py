"""How the processes of one machine find each other: a store that listens on the loopback address only.

torch's own static rendezvous listens on every network interface. For several machines it is used as it is.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Any

LOOPBACK = "megaswift-loopback"


def register() -> str:
    """Make the rendezvous known to torch's launcher; returns its name."""
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    class Loopback(StaticTCPRendezvous):
        def get_backend(self) -> str:
            return LOOPBACK

        def next_rendezvous(self) -> Any:
            if self._store is None:
                listener = socket.create_server(("127.0.0.1", 0))
                self.master_addr, self.master_port = "127.0.0.1", listener.getsockname()[1]
                self._store = TCPStore(
                    self.master_addr, self.master_port, 1, True, self.timeout, master_listen_fd=listener.detach()
                )
            return super().next_rendezvous()

    def make(parameters: Any) -> Loopback:
        return Loopback("127.0.0.1", 0, 0, 1, parameters.run_id, 1800)

    with contextlib.suppress(ValueError):  # it is there already
        rendezvous_handler_registry.register(LOOPBACK, make)
    return LOOPBACK
