import socket
from pathlib import Path

import pytest

from app.settings import PEERS_MAX, Address, Settings, flag, load_settings, parse_address, parse_url
from shm.errors import InvalidInput

B = "node-b=http://127.0.0.1:8471"
C = "node-c=https://[::1]:8472/"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in Settings.model_fields:
        monkeypatch.delenv(f"HOTSPARE_{field.upper()}", raising=False)


def refused(overrides: dict[str, object], config: Path | None = None) -> str:
    with pytest.raises(InvalidInput) as caught:
        load_settings(config, overrides)
    return str(caught.value)


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hotspare.toml"
    path.write_text(text)
    return path


# -- defaults and precedence -------------------------------------------------------------------------------------


def test_the_defaults_need_nothing() -> None:
    settings = load_settings(None, {})
    assert settings == Settings()
    assert settings.address == Address("127.0.0.1", 8470)
    assert (settings.node_id, settings.namespace) == (socket.gethostname(), "default")
    assert (settings.include, settings.fill, settings.transport) == ("experts", "auto", "tcp")
    assert (settings.replica_count, settings.node_ids) == (1, (socket.gethostname(),))


def test_defaults_alone_read_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTSPARE_REPLICAS", "not a number")
    assert Settings().replicas is None


def test_the_command_line_wins_over_the_environment_over_the_file_over_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toml(tmp_path, 'model = "file"\nnode_id = "file"\nnamespace = "file"\n')
    monkeypatch.setenv("HOTSPARE_MODEL", "environment")
    monkeypatch.setenv("HOTSPARE_NODE_ID", "environment")
    settings = load_settings(config, {"model": "command", "transport": None, "peers": []})
    assert (settings.model, settings.node_id, settings.namespace) == ("command", "environment", "file")
    assert settings.transport == "tcp"


def test_every_option_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "model": "org/model-33", "checkpoint": "/m", "node_id": "a", "listen": "0.0.0.0:0", "data_host": "10.3.3.3",
        "peers": f"{B}, {C}", "replicas": "3", "include": "all", "fill": "peer", "namespace": "n", "transport": "rdma",
        "scrub_rate": "33MB", "token": "s3cret", "insecure": "true",
    }  # fmt: skip
    assert set(given) == set(Settings.model_fields)
    for field, value in given.items():
        monkeypatch.setenv(f"HOTSPARE_{field.upper()}", value)
    settings = load_settings(None, {})
    assert settings.model_dump(exclude={"token"}) == {
        "model": "org/model-33", "checkpoint": Path("/m"), "node_id": "a", "listen": "0.0.0.0:0",
        "data_host": "10.3.3.3", "peers": {"node-b": "http://127.0.0.1:8471", "node-c": "https://[::1]:8472"},
        "replicas": 3, "include": "all", "fill": "peer", "namespace": "n", "transport": "rdma",
        "scrub_rate": 33_000_000, "insecure": True,
    }  # fmt: skip
    assert settings.token is not None
    assert settings.token.get_secret_value() == "s3cret"
    assert "s3cret" not in repr(settings)


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTSPARE_TOKEN", "")
    assert load_settings(None, {}).token is None


@pytest.mark.parametrize(
    "text",
    [
        f'peers = ["{B}", "{C}"]',
        '[peers]\nnode-b = "http://127.0.0.1:8471"\nnode-c = "https://[::1]:8472/"',
    ],
)
def test_the_file_gives_peers_as_a_list_or_a_table(tmp_path: Path, text: str) -> None:
    settings = load_settings(toml(tmp_path, text), {"node_id": "node-a"})
    assert settings.peers == {"node-b": "http://127.0.0.1:8471", "node-c": "https://[::1]:8472"}
    assert settings.node_ids == ("node-a", "node-b", "node-c")


# -- derived values ----------------------------------------------------------------------------------------------


def test_replicas_default_to_two_where_there_are_two_nodes() -> None:
    assert load_settings(None, {"peers": [B]}).replica_count == 2
    assert load_settings(None, {"peers": [B, C]}).replica_count == 2
    assert load_settings(None, {"peers": [B, C], "replicas": 3}).replica_count == 3


def test_a_node_without_a_model_says_so() -> None:
    with pytest.raises(InvalidInput, match="--model NAME"):
        Settings().require_model()
    assert Settings(model="m").require_model() == "m"


# -- addresses and URLs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:8470", ("127.0.0.1", 8470)), ("[::1]:0", ("::1", 0)), ("node-a.lan:65535", ("node-a.lan", 65535))],
)
def test_an_address_reads_and_writes_the_same(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address
    assert str(parse_address(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "8470", ":8470", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "::1:8470", "[::1]", "[host]:1", "a b:1",
     "http://a:1", "[127.0.0.1]:1", "a:-1"],
)  # fmt: skip
def test_what_is_not_an_address_is_refused(text: str) -> None:
    assert refused({"listen": text}).startswith("--listen: ")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.3.3", "[::1]", "localhost"])
def test_loopback_needs_no_token(host: str) -> None:
    assert load_settings(None, {"listen": f"{host}:1"}).address.is_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "10.3.3.3", "node-a"])
def test_another_address_needs_a_token_or_insecure(host: str) -> None:
    message = refused({"listen": f"{host}:1"})
    assert "HOTSPARE_TOKEN" in message
    assert "--insecure" in message
    assert load_settings(None, {"listen": f"{host}:1", "token": "t"}).token
    assert load_settings(None, {"listen": f"{host}:1", "insecure": True}).insecure


@pytest.mark.parametrize(
    "url",
    ["ftp://a:1", "a:1", "http://", "http://a:65536", "http://a:1?x=3", "http://a:1#x", "http://u:p@a:1",
     "http://a b:1", "file:///x", "http://[::1:1", "http://a:0"],
)  # fmt: skip
def test_what_is_not_a_nodes_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="http://HOST:PORT"):
        parse_url(url)


# -- one line a problem, in the words of whoever gave it -----------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model": "x" * 300}, ("--model: ", "300 characters")),
        ({"model": ""}, ("--model: ", "0 characters")),
        ({"node_id": " a"}, ("--node-id: ", "node name")),
        ({"namespace": "a\n"}, ("--namespace: ",)),
        ({"include": "some"}, ("--include: ", "'experts' or 'all'")),
        ({"fill": "warm"}, ("--fill: ", "'auto', 'disk', 'peer' or 'none'")),
        ({"transport": "udp"}, ("--transport: ", "'tcp' or 'rdma'")),
        ({"replicas": 0}, ("--replicas: ", "greater than or equal to 1")),
        ({"replicas": 3, "peers": [B]}, ("--replicas 3", "2 are known", "1 given by --peer")),
        ({"peers": ["node-b"]}, ("--peer: ", "'node-b' is not ID=URL")),
        ({"peers": ["=http://a:1"]}, ("--peer: ", "is not ID=URL")),
        ({"peers": [B, "node-b=http://127.0.0.1:9999"]}, ("--peer: ", "'node-b' is given twice")),
        ({"peers": [B, "node-d=http://127.0.0.1:8471/"]}, ("--peer: ", "two peers")),
        ({"peers": [f"n{i}=http://a:{i + 1}" for i in range(PEERS_MAX + 1)]}, ("--peer: ", "1024 peers: at most 1023")),
        ({"peers": 3}, ("--peer: ", "not a list")),
        ({"node_id": "node-b", "peers": [B]}, ("--peer node-b", "own --node-id")),
        ({"data_host": "node-a"}, ("--data-host: ", "IP address")),
        ({"data_host": "0.0.0.0"}, ("--data-host: ", "IP address")),
        ({"token": "a b"}, ("--token: ", "without spaces")),
        ({"fill": "disk"}, ("--fill disk", "--checkpoint")),
        ({"fill": "peer"}, ("--fill peer", "--peer ID=URL")),
    ],
)  # fmt: skip
def test_a_bad_option_is_refused_in_the_words_of_the_command_line(
    overrides: dict[str, object], words: tuple[str, ...]
) -> None:
    message = refused(overrides)
    assert message.count("\n") == 0
    for word in words:
        assert word in message


def test_each_of_several_problems_has_its_line() -> None:
    assert len(refused({"model": "", "fill": "warm", "listen": "x"}).splitlines()) == 3
    assert len(refused({"listen": "0.0.0.0:1", "replicas": 3, "fill": "peer"}).splitlines()) == 3


def test_a_problem_names_the_variable_or_the_file_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toml(tmp_path, 'replicas = "many"\n')
    monkeypatch.setenv("HOTSPARE_PEERS", "node-b")
    lines = refused({}, config).splitlines()
    assert any(line.startswith("HOTSPARE_PEERS: ") for line in lines)
    assert any(line.startswith(f"replicas in {config}: ") for line in lines)


def test_a_token_that_is_refused_is_not_shown() -> None:
    assert "my secret" not in refused({"token": "my secret"})


@pytest.mark.parametrize(
    ("key", "hint"), [("replica", "'replicas'"), ("node-id", "'node_id'"), ("zzz", "the keys are model, checkpoint")]
)
def test_an_unknown_key_of_the_file_is_an_error_with_a_suggestion(tmp_path: Path, key: str, hint: str) -> None:
    message = refused({}, toml(tmp_path, f"{key} = 3\n"))
    assert f"no option '{key}'" in message
    assert hint in message


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    assert "No such file" in refused({}, tmp_path / "none.toml")
    assert "not TOML" in refused({}, toml(tmp_path, "model ="))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "not TOML" in refused({}, tmp_path / "binary")


def test_flags_are_the_fields_but_for_peers() -> None:
    assert [flag(f) for f in ("node_id", "peers", "fill")] == ["--node-id", "--peer", "--fill"]
