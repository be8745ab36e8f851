"""Hosts for two workers: network namespaces, or this machine twice."""

import contextlib
import dataclasses
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence

__all__ = ["Host", "limit", "loopback_hosts", "sent", "two_hosts"]


@dataclasses.dataclass(frozen=True)
class Host:
    """The host of a worker.

    Attributes:
        address: The address at which the other worker reaches it.
        interface: The network interface between the two.
        prefix: Words before a command, to run it on this host.
        apart: Whether only the workers use the interface, so that its
            bandwidth can be limited. Otherwise it is loopback, which counts
            the bytes of both.
    """

    address: str
    interface: str
    prefix: tuple[str, ...]
    apart: bool


def loopback_hosts() -> list[Host]:
    """Returns this machine twice."""
    return [Host("localhost", "lo", (), apart=False)] * 2


@contextlib.contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Creates two connected hosts, and removes them at the end.

    They are network namespaces, connected by a pair of virtual Ethernet
    devices. iproute2 creates them, which needs root.

    Yields:
        The hosts.

    Raises:
        OSError: The machine does not allow it; the message says why.
    """
    if shutil.which("ip") is None or shutil.which("tc") is None:
        raise OSError("the commands ip and tc (iproute2) are missing")
    names = [f"rigl-keras-{os.getpid()}-{i}" for i in range(2)]
    with contextlib.ExitStack() as stack:
        for name in names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
        first, second = names
        _ip(
            *("-n", first, "link", "add", "worker", "type", "veth"),
            *("peer", "name", "worker", "netns", second),
        )
        hosts = []
        for i, name in enumerate(names):
            # From the addresses that are reserved for benchmarks (RFC 2544).
            address = f"198.18.0.{i + 1}"
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "worker")
            for device in ("lo", "worker"):
                _ip("-n", name, "link", "set", device, "up")
            prefix = ("ip", "netns", "exec", name)
            hosts.append(Host(address, "worker", prefix, apart=True))
        yield hosts


def limit(interface: str, gigabits: float) -> None:
    """Limits the bandwidth at which this host sends.

    Args:
        interface: Interface of this host, which nothing else uses.
        gigabits: Bandwidth in Gbit/s.
    """
    _run(
        ["tc", "qdisc", "replace", "dev", interface, "root", "tbf"]
        + ["rate", f"{round(1e6 * gigabits)}kbit"]
        + ["burst", "128kb", "latency", "50ms"]
    )


def sent(interface: str) -> int:
    """Returns the bytes that an interface of this host has sent so far."""
    with open("/proc/self/net/dev") as table:
        for line in table:
            name, _, counts = line.partition(":")
            if name.strip() == interface:
                return int(counts.split()[8])
    raise OSError(f"/proc/net/dev has no interface {interface!r}")


def _ip(*arguments):
    _run(["ip", *arguments])


def _run(command: Sequence[str]):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
