"""Where peers reach this node's transfer engine: an IP address, which the engine puts into its session.

Mooncake starts on whatever address it is given, and says nothing (tried: 192.0.2.7, fe80::1). What is wrong with one
would show far away and late, as peers that can read from nobody here. So it is looked at before the node opens: what
no peer can reach is refused, and what looks wrong and may be meant, behind a NAT or a tunnel, is warned of.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

from app.settings import Settings, ip_of
from shm.errors import InvalidInput
from transfer.client.engine_lease import is_own_address

Ip = ipaddress.IPv4Address | ipaddress.IPv6Address

DISCARD_PORT = 9  # a datagram socket that is connected only picks its route: nothing is sent
ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}  # of no host: behind the default route


def data_host(settings: Settings) -> str:
    """The address that peers are told: --data-host, or that of --listen, or this host's on the way to its peers.

    Sends nothing. Raises InvalidInput for one that no peer could reach.
    """
    host = _chosen(settings)
    _refuse_unreachable(settings, ipaddress.ip_address(host))
    return host


def warnings(settings: Settings, host: str) -> Iterator[str]:
    """What looks wrong with `host`, this node's data address, as sentences that say what to do."""
    ip, elsewhere = ipaddress.ip_address(host), _peers_elsewhere(settings)
    if not is_own_address(host):
        yield (
            f"--data-host {host} is not an address of this host: unless something translates it, peers cannot read "
            "from this node; give one that `ip address` shows"
        )
    if settings.address.is_loopback and elsewhere:
        yield (
            f"--listen {settings.listen} cannot be reached from other hosts, and {', '.join(elsewhere)} is on another: "
            "give --listen an address of this host that it can reach"
        )
    elif ip.is_loopback and not settings.address.is_loopback:
        yield (
            f"peers are told to read from {host}, which only this host can reach, while --listen {settings.listen} is "
            "for others too: give --data-host IP before there are nodes on other hosts"
        )
    strangers = [node for node, peer in _peer_ips(settings) if peer.version != ip.version and not peer.is_loopback]
    if strangers:
        yield (
            f"this node's data address {host} is IPv{ip.version}, and {', '.join(strangers)} is at an address of the "
            "other kind: the transfer engine speaks one of the two, so give all nodes a --data-host of the same kind"
        )


def _chosen(settings: Settings) -> str:
    if settings.data_host:
        return settings.data_host
    ip = ip_of(settings.address.host)
    if ip is None:
        return _resolve(settings.address.host)
    if not ip.is_unspecified:
        return str(ip)
    return _outward(settings, prefer_ipv6=ip.version == 6)


def _resolve(host: str) -> str:
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise InvalidInput(f"--listen: {host!r} has no address here ({error}): give --data-host IP") from error


def _outward(settings: Settings, *, prefer_ipv6: bool) -> str:
    """This host's address on the way to its peers, or else on its default route; loopback where it has neither."""
    for _, peer in _peer_ips(settings):
        if not peer.is_loopback and (found := _towards(str(peer))):
            return found
    families = (socket.AF_INET6, socket.AF_INET) if prefer_ipv6 else (socket.AF_INET, socket.AF_INET6)
    for family in families:
        if found := _towards(ELSEWHERE[family]):
            return found
    if elsewhere := _peers_elsewhere(settings):
        raise InvalidInput(
            f"--listen {settings.listen}: this host has no default route and no address towards "
            f"{', '.join(elsewhere)}, so it is not known where peers could read from: give --data-host IP"
        )
    return "::1" if prefer_ipv6 and socket.has_ipv6 else "127.0.0.1"


def _towards(host: str) -> str | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, DISCARD_PORT))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _refuse_unreachable(settings: Settings, ip: Ip) -> None:
    if ip.version == 6 and ip.is_link_local:
        raise InvalidInput(
            f"{ip} is a link-local address, of use only with the name of an interface, which peers cannot be told: "
            "give --data-host a global or unique local one"
        )
    elsewhere = _peers_elsewhere(settings)
    if ip.is_loopback and elsewhere and not settings.address.is_loopback:
        raise InvalidInput(
            f"peers would be told to read from {ip}, which only this host can reach, and {', '.join(elsewhere)} is on "
            "another: give --data-host an address of this host that they can reach"
        )


def _peer_ips(settings: Settings) -> Iterator[tuple[str, Ip]]:
    """Peers whose URL has an address; names are not looked up, since a name server may take its time."""
    for node, url in settings.peers.items():
        if (ip := ip_of(urlsplit(url).hostname or "")) is not None:
            yield node, ip


def _peers_elsewhere(settings: Settings) -> list[str]:
    """Peers on other hosts, by their URLs: those with a name are taken for such."""
    here = {node for node, ip in _peer_ips(settings) if ip.is_loopback or is_own_address(str(ip))}
    named_here = {node for node, url in settings.peers.items() if urlsplit(url).hostname == "localhost"}
    return [node for node in settings.peers if node not in here | named_here]
