"""Settings: what the environment and files may say, and what is said back when they may not.

Adding a file to settings/good or settings/bad (with its .expected) adds a case.
"""

import json
import os
from pathlib import Path

import pytest
import trustme
import yaml

from authz_server.ext_authz.check_response import ResponseOptions
from authz_server.policy.addresses import Network, parse_network
from authz_server.policy.reasons import Reason
from authz_server.policy.snapshot import DecisionOptions, MissingClientAddress, MissingTenant, UnknownTenant
from authz_server.policy.tenant import parse_tenant_source
from authz_server.settings import Settings, SettingsError, load_settings, parse_listen
from authz_server.store.address import RedisAddress, RedisTls

FIXTURES = Path(__file__).parent / "settings"
GOOD = sorted((FIXTURES / "good").glob("*.yaml"))
BAD = sorted((FIXTURES / "bad").glob("*.yaml"))

ADDRESS = "redis://valkey:6379/0"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a test sets is set."""
    for variable in [name for name in os.environ if name.upper().startswith("AUTHZ_")]:
        monkeypatch.delenv(variable)


def problems(config_path: Path | None = None) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings(config_path)
    return caught.value.problems


def load(monkeypatch: pytest.MonkeyPatch, **environ: str) -> Settings:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return load_settings()


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_good_files_load(path: Path) -> None:
    load_settings(path)


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_bad_files_name_every_problem(path: Path) -> None:
    expected = path.with_suffix(".expected").read_text()
    assert [line.replace(str(path), path.name) for line in problems(path)] == expected.splitlines()


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_no_message_holds_a_secret(path: Path) -> None:
    said = "\n".join(problems(path))
    assert "s3cret" not in said
    assert "1234567" not in said


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_what_is_shown_can_be_loaded_again(path: Path, tmp_path: Path) -> None:
    shown = {name: value for name, (value, _) in load_settings(path).shown().items()}
    hidden = {"redis_password": "", "redis_sentinel_password": ""}
    if "***" in shown["redis_url"]:
        hidden["redis_url"] = ADDRESS
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(shown | hidden))
    assert {name: value for name, (value, _) in load_settings(again).shown().items()} == shown | hidden


def test_a_good_file_says_everything_but_files_and_passwords() -> None:
    """So that a new setting gets its place in it."""
    good = ("everything", "sentinels", "cluster")
    written = set().union(*(yaml.safe_load((FIXTURES / "good" / f"{name}.yaml").read_text()) for name in good))
    files = {"tls_certificate", "tls_key", "tls_client_ca", "redis_password_file", "redis_sentinel_password_file"}
    files |= {"snapshot_file", "redis_tls_ca", "redis_tls_certificate", "redis_tls_key"}
    assert written | files | {"redis_password", "redis_sentinel_password"} == set(Settings.model_fields)


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def test_defaults_are_those_of_the_rooms(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings()
    default = DecisionOptions(tenant_sources=(parse_tenant_source("header:x-tenant-id"),))
    assert settings.decision_options() == default
    response = ResponseOptions()
    assert settings.routing_header == response.routing_header
    assert settings.tenant_header == response.tenant_header
    assert settings.retry_after_seconds == response.retry_after_seconds
    assert settings.show_reason == response.show_reason


def test_decision_options_hold_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(
        monkeypatch,
        AUTHZ_TRUSTED_PEERS="10.0.0.0/8, ::1",
        AUTHZ_MISSING_CLIENT_ADDRESS="peer",
        AUTHZ_TENANT_FROM="query:t,path:/t/{tenant}/",
        AUTHZ_UNKNOWN_TENANT="hash",
        AUTHZ_MISSING_TENANT="deny",
        AUTHZ_FOLD_PATH_CASE="false",
    )
    assert settings.decision_options() == DecisionOptions(
        trusted_peers=(parse_network("10.0.0.0/8"), parse_network("::1")),
        missing_client_address=MissingClientAddress.PEER,
        tenant_sources=(parse_tenant_source("query:t"), parse_tenant_source("path:/t/{tenant}/")),
        unknown_tenant=UnknownTenant.HASH,
        missing_tenant=MissingTenant.DENY,
        fold_path_case=False,
    )


def test_the_environment_beats_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "authz.yaml"
    path.write_text("unknown_tenant: deny\ndenied_status: {blocked: 404, tenant_held: 500}\nretry_after_seconds: 7\n")
    monkeypatch.setenv("AUTHZ_CONFIG", str(path))
    settings = load(monkeypatch, AUTHZ_UNKNOWN_TENANT="hash", AUTHZ_DENIED_STATUS="blocked=410")
    assert settings.unknown_tenant is UnknownTenant.HASH
    assert settings.denied_status == {Reason.BLOCKED: 410}
    shown = settings.shown()
    assert shown["unknown_tenant"] == ("hash", "AUTHZ_UNKNOWN_TENANT")
    assert shown["retry_after_seconds"] == (7, f"{path}:3")
    assert shown["listen"] == ("0.0.0.0:9000", "default")


def test_the_option_beats_the_variable_that_names_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTHZ_CONFIG", "/nowhere.yaml")
    assert problems() == ["/nowhere.yaml: cannot be read: No such file or directory"]
    load_settings(FIXTURES / "good" / "empty.yaml")


def test_problems_of_file_and_environment_come_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "authz.yaml"
    path.write_text("unknown_tenant: perhaps\n")
    monkeypatch.setenv("AUTHZ_TRUSTED_PEERS", "10.0.0.0/33")
    monkeypatch.setenv("AUTHZ_TRUSTED_PEER", "10.0.0.0/8")
    assert problems(path) == [
        "AUTHZ_TRUSTED_PEER: there is no such setting; did you mean AUTHZ_TRUSTED_PEERS?",
        "AUTHZ_TRUSTED_PEERS: '10.0.0.0/33': the prefix length must be at most 32",
        f"{path}:1: unknown_tenant: 'perhaps': input should be 'none', 'hash' or 'deny'",
    ]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AUTHZ_SERVICE_HOST", "10.0.0.1"),
        ("AUTHZ_SERVER_SERVICE_HOST", "10.0.0.1"),
        ("AUTHZ_SERVER_SERVICE_PORT", "9000"),
        ("AUTHZ_SERVER_SERVICE_PORT_GRPC", "9000"),
        ("AUTHZ_PORT", "tcp://10.0.0.1:9000"),
        ("AUTHZ_SERVER_PORT_9000_TCP", "tcp://10.0.0.1:9000"),
        ("AUTHZ_SERVER_PORT_9000_TCP_PROTO", "tcp"),
        ("AUTHZ_SERVER_PORT_9000_TCP_ADDR", "10.0.0.1"),
    ],
)
def test_kubernetes_own_variables_are_not_settings(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    load(monkeypatch, **{variable: value})


@pytest.mark.parametrize("variable", ["AUTHZ_PORT", "AUTHZ_LISTEN_PORT", "AUTHZ_ADMIN_PORT"])
def test_what_only_looks_like_kubernetes_own_is_a_mistake(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "9000")
    (problem,) = problems()
    assert problem.startswith(f"{variable}: there is no such setting")


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("AUTHZ_TRUSTED_PEERS", "", ()),
        ("AUTHZ_TRUSTED_PEERS", " 192.0.2.1 ,", (Network(4, 0xC0000201, 32),)),
        ("AUTHZ_TRUSTED_PEERS", "::ffff:192.0.2.1", (Network(4, 0xC0000201, 32),)),
        ("AUTHZ_TENANT_FROM", "", ()),
        ("AUTHZ_DENIED_STATUS", "", {}),
        ("AUTHZ_DENIED_STATUS", " blocked = 404 ", {Reason.BLOCKED: 404}),
        ("AUTHZ_MAX_SNAPSHOT_AGE_SECONDS", "", None),
        ("AUTHZ_MAX_SNAPSHOT_AGE_SECONDS", "1.5", 1.5),
        ("AUTHZ_TLS_CERTIFICATE", "", None),
        ("AUTHZ_SHOW_REASON", "yes", True),
        ("AUTHZ_MAX_REQUEST_BYTES", "8388608", 8388608),
        ("AUTHZ_LISTEN", "[::]:0", "[::]:0"),
        ("authz_log_level", "debug", "debug"),
    ],
)
def test_values_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: object
) -> None:
    settings = load(monkeypatch, **{variable: value})
    assert getattr(settings, variable.lower().removeprefix("authz_")) == expected


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("AUTHZ_LISTEN", "", "'' is not where to listen: write host:port, such as 0.0.0.0:9000 or [::]:9000"),
        ("AUTHZ_DENIED_STATUS", "blocked", "'blocked' is not REASON=STATUS, such as blocked=404"),
        ("AUTHZ_DENIED_STATUS", "blocked=404,blocked=403", "'blocked' is there twice"),
        ("AUTHZ_MAX_REQUEST_BYTES", "8388609", "'8388609': input should be less than or equal to 8388608"),
        ("AUTHZ_MAX_SNAPSHOT_AGE_SECONDS", "nan", "'nan': input should be a finite number"),
        ("AUTHZ_ROUTING_HEADER", ":path", "':path' is not a header name of a-z, 0-9 and at most four single hyphens"),
        (
            "AUTHZ_ROUTING_HEADER",
            "x-tenant-id",
            None,  # the two settings that lean on it are named instead
        ),
        (
            "AUTHZ_REDIS_PREFIX",
            "{authz}",
            "'{authz}' is not a key prefix: use 1 to 63 letters, digits, '.', '_', ':', '-'",
        ),
        ("AUTHZ_REDIS_URL", "valkey:6379", "must begin with redis:// (rediss:// for TLS, unix:// for a socket)"),
        ("AUTHZ_REDIS_URL", "redis:///0", "names no host: write redis://host:port/database"),
        ("AUTHZ_REDIS_URL", "redis://h/zero", "what follows the host must be a database number, such as /0"),
        ("AUTHZ_REDIS_URL", "unix://", "a unix:// URL names the socket's path, such as unix:///run/valkey.sock"),
        (
            "AUTHZ_REDIS_URL",
            "redis://:s3c:ret@h:p/0",
            "the port is not a number from 0 to 65535 (or a ':', '/' or '@' is not escaped)",
        ),
        (
            "AUTHZ_REDIS_URL",
            "redis://h/0?password=s3cret",
            "write user and password before the host (user:password@host) or as settings, not as ?...",
        ),
    ],
)
def test_bad_values_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str | None
) -> None:
    monkeypatch.setenv(variable, value)
    if message is None:
        assert [line.partition(":")[0] for line in problems()] == ["AUTHZ_TENANT_HEADER", "AUTHZ_TENANT_FROM"]
    else:
        assert problems() == [f"{variable}: {message}"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.0.0.0:9000", ("0.0.0.0", 9000)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:65535", ("::1", 65535)),
        ("::1:9000", None),
        ("[::1]", None),
        ("9000", None),
        (":9000", None),
        ("host:", None),
        ("host:65536", None),
        ("host:-1", None),
        ("host:90000000000000", None),
        ("host:٩", None),
    ],
)
def test_parse_listen(text: str, expected: tuple[str, int] | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match=r"write host:port|into brackets"):
            parse_listen(text)
    else:
        assert parse_listen(text) == expected


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "redis://valkey:6379/0"),
        ({"AUTHZ_REDIS_PASSWORD": "a/b@c"}, "redis://:a%2Fb%40c@valkey:6379/0"),
        ({"AUTHZ_REDIS_USERNAME": "ann", "AUTHZ_REDIS_PASSWORD": "x"}, "redis://ann:x@valkey:6379/0"),
        ({"AUTHZ_REDIS_URL": "redis://an%3An@valkey", "AUTHZ_REDIS_PASSWORD": "x"}, "redis://an%3An:x@valkey"),
        ({"AUTHZ_REDIS_URL": "redis://ann:p%40w@valkey"}, "redis://ann:p%40w@valkey"),
        ({"AUTHZ_REDIS_URL": "redis://:p%40w@valkey", "AUTHZ_REDIS_USERNAME": "ann"}, "redis://ann:p%40w@valkey"),
        ({"AUTHZ_REDIS_URL": "unix:///run/v.sock?db=1", "AUTHZ_REDIS_PASSWORD": "x"}, "unix://:x@/run/v.sock?db=1"),
    ],
    ids=["none", "escaped", "user", "user-in-url", "all-in-url", "password-in-url", "socket"],
)
def test_store_url(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], expected: str) -> None:
    assert load(monkeypatch, **{"AUTHZ_REDIS_URL": ADDRESS} | environ).store_address().url == expected


def test_the_password_may_be_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("s3cret\n")
    settings = load(monkeypatch, AUTHZ_REDIS_URL=ADDRESS, AUTHZ_REDIS_PASSWORD_FILE=str(path))
    assert settings.store_address().url == "redis://:s3cret@valkey:6379/0"


def test_sentinels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("of-sentinels\n")
    settings = load(
        monkeypatch,
        AUTHZ_REDIS_SENTINELS="s1:26379, [::1]:26380",
        AUTHZ_REDIS_SENTINEL_PRIMARY="policy",
        AUTHZ_REDIS_SENTINEL_USERNAME="watcher",
        AUTHZ_REDIS_SENTINEL_PASSWORD_FILE=str(path),
        AUTHZ_REDIS_USERNAME="ann",
        AUTHZ_REDIS_PASSWORD="of-the-store",
        AUTHZ_REDIS_DATABASE="3",
        AUTHZ_REDIS_TLS="true",
    )
    assert settings.store_address() == RedisAddress(
        sentinels=(("s1", 26379), ("::1", 26380)),
        primary="policy",
        database=3,
        username="ann",
        password="of-the-store",
        sentinel_username="watcher",
        sentinel_password="of-sentinels",
        tls=RedisTls(),
    )


def test_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, AUTHZ_REDIS_CLUSTER="n1:6379,n2:6379", AUTHZ_REDIS_PASSWORD="x")
    assert settings.store_address() == RedisAddress(cluster=(("n1", 6379), ("n2", 6379)), password="x")


def test_nothing_that_is_shown_holds_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(monkeypatch, AUTHZ_REDIS_URL="redis://ann:s3cret@valkey:6379/0")
    assert first.shown()["redis_url"][0] == "redis://ann:***@valkey:6379/0"
    second = load(monkeypatch, AUTHZ_REDIS_URL=ADDRESS, AUTHZ_REDIS_PASSWORD="s3cret")
    assert second.shown()["redis_password"] == ("***", "AUTHZ_REDIS_PASSWORD")
    third = load(
        monkeypatch,
        AUTHZ_REDIS_URL="redis://127.0.0.1:6379/0",
        AUTHZ_REDIS_SENTINELS="s1:26379",
        AUTHZ_REDIS_SENTINEL_PASSWORD="s3cret",
    )
    assert "s3cret" not in repr(third.store_address()) + str(third.store_address())
    for settings in (first, second, third):
        assert "s3cret" not in repr(settings) + str(settings) + json.dumps(settings.shown())


def test_whatever_loads_is_what_the_wire_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two modules do not know each other, so each checks statuses; they must agree."""
    for status in range(300, 700):
        monkeypatch.setenv("AUTHZ_DENIED_STATUS", f"blocked={status}")
        try:
            ResponseOptions(denied_status={Reason.BLOCKED: status})
        except ValueError:
            assert problems()
        else:
            assert load_settings().denied_status == {Reason.BLOCKED: status}


class TestTls:
    @pytest.fixture
    def files(self, tmp_path: Path) -> dict[str, str]:
        ca = trustme.CA()
        ca.cert_pem.write_to_path(tmp_path / "ca.crt")
        for name in ("one", "two"):
            issued = ca.issue_cert("authz.example.com")
            issued.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.crt")
            issued.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        return {path.name: str(path) for path in tmp_path.iterdir()}

    def test_certificate_key_and_client_ca(self, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
        load(
            monkeypatch,
            AUTHZ_TLS_CERTIFICATE=files["one.crt"],
            AUTHZ_TLS_KEY=files["one.key"],
            AUTHZ_TLS_CLIENT_CA=files["ca.crt"],
        )

    @pytest.mark.parametrize(
        ("given", "named", "message"),
        [
            ({"CERTIFICATE": "one.crt"}, "AUTHZ_TLS_KEY", "needs its key"),
            ({"KEY": "one.key"}, "AUTHZ_TLS_KEY", "needs tls_certificate"),
            ({"CERTIFICATE": "one.crt", "KEY": "two.key"}, "AUTHZ_TLS_KEY", "is not the key of"),
            ({"CERTIFICATE": "one.key", "KEY": "one.key"}, "AUTHZ_TLS_KEY", "one of them is not PEM"),
            ({"CLIENT_CA": "ca.crt"}, "AUTHZ_TLS_CLIENT_CA", "needs tls_certificate and tls_key"),
            (
                {"CERTIFICATE": "one.crt", "KEY": "one.key", "CLIENT_CA": "two.key"},
                "AUTHZ_TLS_CLIENT_CA",
                "holds no PEM certificate",
            ),
        ],
        ids=["no-key", "no-certificate", "another-key", "no-pem", "ca-alone", "ca-no-pem"],
    )
    def test_files_that_do_not_fit(
        self, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], given: dict[str, str], named: str, message: str
    ) -> None:
        for name, file_name in given.items():
            monkeypatch.setenv(f"AUTHZ_TLS_{name}", files[file_name])
        (problem,) = problems()
        assert problem.startswith(f"{named}: ")
        assert message in problem


def test_a_mistyped_variable_is_a_problem_in_any_letter_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("authz_trusted_peer", "10.0.0.0/8")
    assert problems() == ["authz_trusted_peer: there is no such setting; did you mean AUTHZ_TRUSTED_PEERS?"]
