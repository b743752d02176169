"""Where processes listen."""

from __future__ import annotations

import ipaddress

import psutil


def reached_from_outside(process: int) -> list[str]:
    """What a process and all that it has started listen on, but for loopback."""
    root = psutil.Process(process)
    found = []
    for one in [root, *root.children(recursive=True)]:
        for link in one.net_connections("inet"):
            address = link.laddr.ip.removeprefix("::ffff:")
            if link.status == psutil.CONN_LISTEN and not ipaddress.ip_address(address).is_loopback:
                found.append(f"{' '.join(one.cmdline())[:80]}: {address}:{link.laddr.port}")
    return found
