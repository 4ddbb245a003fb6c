"""`authz-server`: what operators see. `serve` itself is tested in test_server.py, as a process."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from support.process import ServerProcess, init_policy
from typer.testing import CliRunner

from authz_server.cli.authz_server import app
from authz_server.demo.processes import free_port
from authz_server.demo.valkey import Valkey
from authz_server.settings import Settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a test sets is set."""
    for variable in [name for name in os.environ if name.upper().startswith("AUTHZ_")]:
        monkeypatch.delenv(variable)


def run(*words: str, **environ: str) -> Any:
    return CliRunner().invoke(app, words, env=environ)


@pytest.mark.parametrize(
    "words",
    [["--help"], ["serve", "--help"], ["check-config", "--help"], ["print-config", "--help"], ["probe", "--help"]],
)
def test_help(words: list[str]) -> None:
    result = run(*words)
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert re.fullmatch(r"authz-server \S+, hot path: (python|compiled)\n", result.output)


class TestCheckConfig:
    def test_good_settings(self, tmp_path: Path) -> None:
        path = tmp_path / "authz.yaml"
        path.write_text("unknown_tenant: hash\n")
        result = run("check-config", "--config", str(path))
        assert (result.exit_code, result.output) == (0, "OK\n")

    def test_every_problem_on_standard_error(self, tmp_path: Path) -> None:
        path = tmp_path / "authz.yaml"
        path.write_text("unknown_tenant: hsh\nlisten: 1\n")
        result = run("check-config", "--config", str(path), AUTHZ_DRAIN_SECONDS="soon")
        assert result.exit_code == 2
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 3

    def test_a_file_that_is_not_there(self) -> None:
        result = run("check-config", AUTHZ_CONFIG="/nowhere.yaml")
        assert result.exit_code == 2
        assert result.stderr == "/nowhere.yaml: cannot be read: No such file or directory\n"

    def test_what_only_the_store_can_tell(self) -> None:
        """redis-py reads options of the URL; what it refuses is told here, not when the server starts."""
        result = run("check-config", AUTHZ_REDIS_URL="redis://:s3cret@valkey/0?no_such_option=1")
        assert result.exit_code == 2
        assert result.stderr.startswith("AUTHZ_REDIS_URL: ")
        assert "s3cret" not in result.stderr


class TestPrintConfig:
    def test_can_be_fed_back(self, tmp_path: Path) -> None:
        environ = {"AUTHZ_TRUSTED_PEERS": "10.0.0.0/8,::1", "AUTHZ_DENIED_STATUS": "blocked=404"}
        first = run("print-config", **environ)
        assert first.exit_code == 0
        path = tmp_path / "authz.yaml"
        path.write_text(first.stdout)
        second = run("print-config", "--config", str(path))
        assert second.exit_code == 0
        values = yaml.safe_load(first.stdout)
        assert yaml.safe_load(second.stdout) == values
        assert list(values) == list(Settings.model_fields)
        assert values["trusted_peers"] == ["10.0.0.0/8", "::1/128"]
        assert values["denied_status"] == {"blocked": 404}

    def test_says_where_each_comes_from(self, tmp_path: Path) -> None:
        path = tmp_path / "authz.yaml"
        path.write_text("show_reason: true\n")
        lines = run("print-config", "--config", str(path), AUTHZ_LOG_LEVEL="debug").stdout.splitlines()
        assert f"show_reason: true  # {path}:1" in lines
        assert 'log_level: "debug"  # AUTHZ_LOG_LEVEL' in lines
        assert 'log_format: "auto"  # default' in lines

    @pytest.mark.parametrize(
        "environ",
        [
            {"AUTHZ_REDIS_URL": "redis://ann:s3cret@valkey:6379/0"},
            {"AUTHZ_REDIS_PASSWORD": "s3cret"},
            {"AUTHZ_REDIS_URL": "rediss://:s3cret@valkey:6379/0?ssl_cert_reqs=none"},
        ],
        ids=["url", "password", "url-without-user"],
    )
    def test_hides_secrets(self, environ: dict[str, str]) -> None:
        output = run("print-config", **environ).output
        assert "s3cret" not in output
        assert "***" in output

    def test_hidden_secrets_are_not_taken_for_passwords(self, tmp_path: Path) -> None:
        path = tmp_path / "authz.yaml"
        path.write_text(run("print-config", AUTHZ_REDIS_PASSWORD="s3cret").stdout)
        result = run("check-config", "--config", str(path))
        assert result.exit_code == 2
        assert "put the password itself there" in result.stderr


@pytest.mark.parametrize("command", ["serve", "check-config", "print-config"])
def test_bad_settings_are_no_traceback(command: str) -> None:
    result = run(command, AUTHZ_LISTEN="x")
    assert result.exit_code == 2
    assert result.stderr.startswith("AUTHZ_LISTEN: 'x' is not where to listen")
    assert isinstance(result.exception, SystemExit)


class TestProbe:
    def test_halves_of_mutual_tls(self) -> None:
        result = run("probe", "127.0.0.1:1", "--tls-ca", "ca", "--tls-key", "key")
        assert result.exit_code == 2
        assert "go together" in result.output

    def test_a_file_that_is_not_there(self) -> None:
        result = run("probe", "127.0.0.1:1", "--tls-ca", "/nowhere.pem")
        assert (result.exit_code, result.stdout) == (1, "")
        assert "'/nowhere.pem' cannot be read: No such file or directory" in result.stderr

    @pytest.mark.integration
    def test_nobody_listens(self) -> None:
        result = run("probe", f"127.0.0.1:{free_port()}", "--timeout", "0.2")
        assert (result.exit_code, result.stdout) == (1, "")
        assert "DEADLINE_EXCEEDED" in result.stderr or "UNAVAILABLE" in result.stderr

    @pytest.mark.integration
    def test_a_server_before_and_after_it_has_a_policy(self, own_valkey: Valkey, tmp_path: Path) -> None:
        with ServerProcess(tmp_path, {"AUTHZ_REDIS_URL": own_valkey.url}) as server:
            result = run("probe", server.grpc)
            assert (result.exit_code, "not ready" in result.stderr) == (1, True)
            init_policy(own_valkey.url)
            server.wait_ready()
            result = run("probe", server.grpc)
            assert (result.exit_code, result.stdout) == (0, f"{server.grpc}: ready; 192.0.2.1 is allowed (allowed)\n")
            result = run("probe", server.grpc, "--client-address", "nobody")
            assert (result.exit_code, "denied (invalid_client_address)" in result.stdout) == (0, True)

    @pytest.mark.integration
    def test_mutual_tls(self, own_valkey: Valkey, tmp_path: Path) -> None:
        ca = trustme.CA()
        server_certificate, client_certificate = ca.issue_cert("127.0.0.1"), ca.issue_cert("client.example")
        paths = {}
        for name, blob in (
            ("ca", ca.cert_pem),
            ("server", server_certificate.private_key_and_cert_chain_pem),
            ("client", client_certificate.private_key_and_cert_chain_pem),
        ):
            paths[name] = str(tmp_path / f"{name}.pem")
            blob.write_to_path(paths[name])
        init_policy(own_valkey.url)
        environ = {
            "AUTHZ_REDIS_URL": own_valkey.url,
            "AUTHZ_TLS_CERTIFICATE": paths["server"],
            "AUTHZ_TLS_KEY": paths["server"],
            "AUTHZ_TLS_CLIENT_CA": paths["ca"],
        }
        with ServerProcess(tmp_path, environ) as server:
            server.wait_ready()
            own = ("--tls-certificate", paths["client"], "--tls-key", paths["client"])
            assert run("probe", server.grpc, "--tls-ca", paths["ca"], *own).exit_code == 0
            assert run("probe", server.grpc, "--tls-ca", paths["ca"], "--timeout", "1").exit_code == 1
