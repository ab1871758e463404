"""Choose the network interface of process groups between nodes."""

import os
import socket

import psutil


def interface_towards(address: str) -> str:
    """Return the network interface through which this machine reaches an IP address.

    Raises:
        OSError: there is no route to it.
    """
    family, kind, _, _, where = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(where)  # on a datagram socket this looks up the route and sends nothing
        own = probe.getsockname()[0]
    interfaces = psutil.net_if_addrs().items()
    return next(
        name for name, addresses in interfaces if own in (each.address for each in addresses)
    )


def use_interface(name: str | None, head: str) -> None:
    """Set the network interface of later process groups: the host name may stand for loopback.

    name: None keeps GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; those not set become the interface
    towards `head`.
    """
    # "=": exact name, else NCCL treats it as prefix
    prefixes = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "="}
    unset = [variable for variable in prefixes if name or variable not in os.environ]
    if unset:
        interface = name or interface_towards(head)
        os.environ.update({variable: prefixes[variable] + interface for variable in unset})
