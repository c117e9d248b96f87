"""What a node is told: the options of `hotspare serve`, from the command line, the environment and a TOML file.

The command line wins over HOTSPARE_* variables, they win over the file, and the file over the defaults.
`Settings()` is the defaults and reads nothing; `load_settings` reads.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from shm.errors import InvalidInput
from shm.manifest import check_name

ENVIRONMENT_PREFIX = "HOTSPARE_"
DEFAULT_LISTEN = "127.0.0.1:8470"
DEFAULT_REPLICAS = 2
PEERS_MAX = 1023
TOKEN_CHARS_MAX = 1024


class Address(NamedTuple):
    """A host, name or IP without brackets, and a TCP port; port 0 asks for any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        ip = ip_of(self.host)
        return ip.is_loopback if ip else self.host.lower() == "localhost"


def ip_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that a text is; None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def parse_address(text: str) -> Address:
    """Read HOST:PORT, with an IPv6 host in brackets; raises InvalidInput."""
    match = re.fullmatch(r"(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^:\[\]\s/]+)):(?P<port>\d{1,5})", text)
    if not match or int(match["port"]) > 65535:
        raise InvalidInput(f"{text!r} is not HOST:PORT: write 127.0.0.1:8470, or [::1]:8470 for IPv6; port 0 to 65535")
    if match["v6"] and not isinstance(ip_of(match["v6"]), ipaddress.IPv6Address):
        raise InvalidInput(f"{match['v6']!r} is not an IPv6 address: only those stand in brackets")
    return Address(match["v6"] or match["host"], int(match["port"]))


def parse_url(text: str) -> str:
    """A node's base URL without a slash at its end; raises InvalidInput."""
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a bad port or bracket
        usable = False
    if not usable or parts.query or parts.fragment or "@" in parts.netloc or re.search(r"\s", text):
        raise InvalidInput(f"{text!r} is not a node's URL: write http://HOST:PORT or https://HOST:PORT")
    return text.rstrip("/")


def _peer_pairs(value: object) -> list[tuple[str, str]]:
    """ID and URL of each peer, from a table, a list of ID=URL, or such a list in one string (commas or spaces)."""
    if isinstance(value, Mapping):
        return [(str(node), str(url)) for node, url in value.items()]
    entries = re.split(r"[,\s]+", value.strip(", \t\n")) if isinstance(value, str) else value
    if not isinstance(entries, list | tuple):
        raise InvalidInput(f"{value!r} is not a list of ID=URL")
    pairs = [str(entry).partition("=") for entry in entries]
    for node, _, url in pairs:
        if not node or not url:
            raise InvalidInput(f"{node + url!r} is not ID=URL: write node-b=http://HOST:PORT")
    return [(node, url) for node, _, url in pairs]


class Settings(BaseModel):
    """The options of one node. Frozen; every field is within its limits."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)

    model: str | None = None
    checkpoint: Path | None = None
    node_id: str = Field(default_factory=socket.gethostname)
    listen: str = DEFAULT_LISTEN
    data_host: str | None = None
    peers: dict[str, str] = Field(default_factory=dict)
    replicas: int | None = Field(default=None, ge=1)
    include: Literal["experts", "all"] = "experts"
    fill: Literal["auto", "disk", "peer", "none"] = "auto"
    namespace: str = "default"
    transport: Literal["tcp", "rdma"] = "tcp"
    scrub_rate: ByteSize | None = Field(default=None, ge=1)
    token: SecretStr | None = None
    insecure: bool = False

    # -- derived ---------------------------------------------------------------------------------------------

    @property
    def address(self) -> Address:
        """Where the control plane listens."""
        return parse_address(self.listen)

    @property
    def node_ids(self) -> tuple[str, ...]:
        """This node and its peers, in ascending order: the same on every node."""
        return tuple(sorted((self.node_id, *self.peers)))

    @property
    def replica_count(self) -> int:
        """Copies of every block, this node's included."""
        return self.replicas or min(DEFAULT_REPLICAS, 1 + len(self.peers))

    def require_model(self) -> str:
        """The model's name; raises InvalidInput where none was given."""
        if self.model is None:
            raise InvalidInput("no model: give --model NAME, the same on every node")
        return self.model

    # -- limits ----------------------------------------------------------------------------------------------

    @field_validator("model", "node_id", "namespace")
    @classmethod
    def _name(cls, value: str | None, info: Any) -> str | None:
        return value if value is None else check_name(info.field_name.removesuffix("_id"), value)

    @field_validator("listen")
    @classmethod
    def _listen(cls, value: str) -> str:
        return str(parse_address(value))

    @field_validator("data_host")
    @classmethod
    def _data_host(cls, value: str | None) -> str | None:
        ip = None if value is None else ip_of(value)
        if value is not None and (ip is None or ip.is_unspecified):
            raise InvalidInput(f"{value!r} is not an IP address that peers can reach: write one of this host's")
        return value

    @field_validator("peers", mode="before")
    @classmethod
    def _peers(cls, value: object) -> dict[str, str]:
        pairs = _peer_pairs(value)
        if len(pairs) > PEERS_MAX:
            raise InvalidInput(f"{len(pairs)} peers: at most {PEERS_MAX}")
        peers: dict[str, str] = {}
        for node, text in pairs:
            url = parse_url(text)
            if check_name("node", node) in peers:
                raise InvalidInput(f"peer {node!r} is given twice: each node once")
            if url in peers.values():
                raise InvalidInput(f"{url} is given for two peers: each node has its own")
            peers[node] = url
        return peers

    @field_validator("token")
    @classmethod
    def _token(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not re.fullmatch(rf"[!-~]{{1,{TOKEN_CHARS_MAX}}}", value.get_secret_value()):
            raise InvalidInput(f"a token is 1 to {TOKEN_CHARS_MAX} visible ASCII characters without spaces")
        return value

    @model_validator(mode="after")
    def _agree(self) -> Settings:
        faults = list(self._contradictions())
        if faults:
            raise InvalidInput("\n".join(faults))
        return self

    def _contradictions(self) -> list[str]:
        nodes = 1 + len(self.peers)
        checks = (
            (self.node_id in self.peers,
             f"--peer {self.node_id}=…: that is this node's own --node-id: name the others only"),
            (self.replicas is not None and self.replicas > nodes,
             f"--replicas {self.replicas} needs as many nodes, and {nodes} {'is' if nodes == 1 else 'are'} known "
             f"(this one and {nodes - 1} given by --peer): lower it, or name more peers"),
            (not self.address.is_loopback and self.token is None and not self.insecure,
             f"--listen {self.listen} can be reached from other hosts: set HOTSPARE_TOKEN, the same on every node, "
             "or say --insecure to let everyone in"),
            (self.fill == "disk" and self.checkpoint is None, "--fill disk: give --checkpoint DIR too"),
            (self.fill == "peer" and not self.peers, "--fill peer: give at least one --peer ID=URL too"),
        )  # fmt: skip
        return [message for wrong, message in checks if wrong]


def flag(field: str) -> str:
    """The option's name on the command line."""
    return "--peer" if field == "peers" else "--" + field.replace("_", "-")


def _read_toml(config: Path) -> dict[str, Any]:
    try:
        document = tomllib.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"--config {config}: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise InvalidInput(f"--config {config}: not TOML: {error}") from error
    unknown = sorted(set(document) - set(Settings.model_fields))
    if unknown:
        raise InvalidInput("\n".join(f"--config {config}: {_unknown_key(key)}" for key in unknown))
    return document


def _unknown_key(key: str) -> str:
    near = difflib.get_close_matches(key.replace("-", "_"), Settings.model_fields, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(Settings.model_fields)}"
    return f"there is no option {key!r}: {hint}"


def _read_environment() -> dict[str, str]:
    """The options that HOTSPARE_* variables set; an empty variable is one that is not set."""
    values = {field: os.environ.get(ENVIRONMENT_PREFIX + field.upper()) for field in Settings.model_fields}
    return {field: value for field, value in values.items() if value}


def load_settings(config: Path | None, overrides: Mapping[str, object]) -> Settings:
    """Read the TOML file `config`, the environment, and `overrides`: what the command line gave, by field.

    An override of None or an empty list was not given. Raises InvalidInput, one line a problem, naming the flag,
    variable or file that each bad value came from.
    """
    unknown = set(overrides) - set(Settings.model_fields)
    if unknown:
        raise InvalidInput("\n".join(_unknown_key(key) for key in sorted(unknown)))
    given = {field: value for field, value in overrides.items() if value is not None and value != [] and value != ()}
    document = {} if config is None else _read_toml(config)
    environment = _read_environment()
    origins = (
        {field: f"{field} in {config}" for field in document}
        | {field: ENVIRONMENT_PREFIX + field.upper() for field in environment}
        | {field: flag(field) for field in given}
    )
    try:
        return Settings.model_validate(document | environment | given)
    except ValidationError as error:
        raise InvalidInput("\n".join(_explain(error, origins))) from None


def _explain(error: ValidationError, origins: Mapping[str, str]) -> list[str]:
    lines = []
    for fault in error.errors(include_url=False, include_input=False):
        field = str(fault["loc"][0]) if fault["loc"] else ""
        cause = fault.get("ctx", {}).get("error")
        message = str(cause) if cause is not None else fault["msg"][:1].lower() + fault["msg"][1:]
        lines.append(f"{origins.get(field, flag(field))}: {message}" if field else message)
    return lines
