"""init.yaml, evaluation.yaml and tests/check.yaml: what runs beside the server."""

import shlex
from typing import Any

import pytest
from support.helm import CI, Object, plain_env, render, render_file
from typer.testing import CliRunner

from authz_server.cli import authz_server, authzctl
from authz_server.cli.failures import NoStoreError, NotSoundError


def container(template: Object) -> Object:
    (found,) = template["spec"]["containers"]
    return dict(found)


class TestInit:
    def test_a_hook_before_the_installation(self) -> None:
        job = render().one("init.yaml")
        assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install"
        # It runs before any other object of the release is there.
        pod = job["spec"]["template"]["spec"]
        assert "serviceAccountName" not in pod
        assert not [volume for volume in pod.get("volumes", []) if "configMap" in volume]

    def test_with_the_server_s_redis(self) -> None:
        found = render({"redis": {"url": "redis://h/0", "username": "authz", "existingSecret": "authz-redis"}})
        job = container(found.one("init.yaml")["spec"]["template"])
        env = plain_env(job)
        assert env.pop("AUTHZCTL_ACTOR") == "helm/authz-server"
        server = found.env()
        assert env == {name: value for name, value in server.items() if name.startswith("AUTHZ_REDIS_")}
        assert job["volumeMounts"]
        assert secrets(found.one("init.yaml")["spec"]["template"])["redis-password"]["secretName"] == "authz-redis"

    def test_with_the_chart_s_own_valkey_no_hook(self) -> None:
        """A hook would wait for a Valkey that comes after it; a Job cannot be changed, so each revision has its own."""
        names = [render_file(CI["evaluation"]).one("init.yaml")["metadata"]["name"]]
        values = {"evaluation": {"enabled": True}, "redis": {}}
        names.append(render(values, revision=2, is_upgrade=True).one("init.yaml")["metadata"]["name"])
        assert names == ["authz-server-init-1", "authz-server-init-2"]
        assert "annotations" not in render(values).one("init.yaml")["metadata"]

    def test_switched_off(self) -> None:
        assert render({"init": {"enabled": False}}).of("init.yaml") == []


def secrets(template: Object) -> dict[str, Any]:
    return {volume["name"]: volume["secret"] for volume in template["spec"]["volumes"] if "secret" in volume}


def test_jobs_have_a_user_of_their_own_in_the_same_redis() -> None:
    """The server's may not write (acl/users.acl)."""
    found = render_file(CI["redis-tls-acl"])
    server = {name: value for name, value in found.env().items() if name.startswith("AUTHZ_REDIS_")}
    assert server["AUTHZ_REDIS_USERNAME"] == "authz-server"
    assert secrets(found.one("workload.yaml")["spec"]["template"])["redis-password"]["secretName"] == "authz-redis"
    templates = [found.one("init.yaml")["spec"]["template"]]
    templates += [job["spec"]["jobTemplate"]["spec"]["template"] for job in found.of("cronjobs.yaml")]
    assert len(templates) == 3
    for template in templates:
        env = plain_env(container(template))
        assert (server | {"AUTHZ_REDIS_USERNAME": "authz-admin"}).items() <= env.items()
        mounted = secrets(template)
        assert mounted["redis-password"]["secretName"] == "authz-redis-admin"
        assert mounted["redis-password"]["items"] == [{"key": "password", "path": "password"}]
        assert mounted.keys() == {"redis-password", "redis-ca", "redis-client"}


def cron_container(cronjob: Object) -> Object:
    return container(cronjob["spec"]["jobTemplate"]["spec"]["template"])


class TestCronJobs:
    def test_by_default_and_one_at_a_time(self) -> None:
        jobs = render().of("cronjobs.yaml")
        assert [job["metadata"]["name"] for job in jobs] == ["authz-server-cleanup", "authz-server-reconcile"]
        assert {job["spec"]["concurrencyPolicy"] for job in jobs} == {"Forbid"}

    def test_cleanup(self) -> None:
        job, _ = render({"cleanup": {"olderThan": "2d"}}).of("cronjobs.yaml")
        assert cron_container(job)["args"] == ["cleanup", "--older-than", "2d"]
        assert job["spec"]["schedule"] == "23 3 * * *"

    def test_reconcile_fails_at_once_on_what_it_finds(self) -> None:
        """And is tried again when it could not look: exit codes of `authzctl reconcile`."""
        (job,) = render({"cleanup": {"enabled": False}}).of("cronjobs.yaml")
        assert cron_container(job)["args"] == ["reconcile"]
        spec = job["spec"]["jobTemplate"]["spec"]
        assert spec["podFailurePolicy"]["rules"] == [
            {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [NotSoundError.exit_code]}}
        ]
        assert NoStoreError.exit_code != NotSoundError.exit_code
        assert spec["template"]["spec"]["restartPolicy"] == "Never", "a pod failure policy needs it"
        assert spec["backoffLimit"] > 0

    def test_switched_off(self) -> None:
        assert render({"cleanup": {"enabled": False}, "reconcile": {"enabled": False}}).of("cronjobs.yaml") == []

    def test_with_the_server_s_redis(self) -> None:
        found = render_file(CI["redis-sentinel"])
        env = {name: value for name, value in found.env().items() if name.startswith("AUTHZ_REDIS_")}
        for job in found.of("cronjobs.yaml"):
            assert env.items() <= plain_env(cron_container(job)).items()
            assert plain_env(cron_container(job))["AUTHZ_HISTORY_EVENTS"] == "50000"
            assert plain_env(cron_container(job))["AUTHZ_HISTORY_DAYS"] == "90"
            labels = job["spec"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"]
            assert labels["app.kubernetes.io/component"] == "authzctl", "which a network policy lets out to Redis"


def commands() -> list[Any]:
    found = render_file(CI["own-tls"])
    init = container(found.one("init.yaml")["spec"]["template"])
    check = container(found.of("tests/check.yaml")[1])
    return [
        pytest.param(init["command"], init["args"], authzctl.app, id="init"),
        *(
            pytest.param(job["command"], job["args"], authzctl.app, id=job["args"][0])
            for job in map(cron_container, found.of("cronjobs.yaml"))
        ),
        pytest.param(["authz-server"], found.container()["args"], authz_server.app, id="serve"),
        pytest.param(["authz-server"], check["args"], authz_server.app, id="test"),
    ]


@pytest.mark.parametrize(("command", "args", "app"), commands())
def test_commands_exist_with_these_options(command: list[str], args: list[str], app: Any) -> None:
    """The command lines themselves read what the chart writes; `--help` after it keeps them from acting."""
    assert command in (["authzctl"], ["authz-server"])
    result = CliRunner().invoke(app, [*args, "--help"])
    assert result.exit_code == 0, shlex.join([*command, *args])


class TestEvaluation:
    def test_off_by_default(self) -> None:
        assert render().of("evaluation.yaml") == []

    def test_the_server_uses_it(self) -> None:
        found = render_file(CI["evaluation"])
        deployment, service = found.of("evaluation.yaml")
        env = found.env()
        assert env["AUTHZ_REDIS_URL"] == f"redis://{service['metadata']['name']}:6379/0"
        assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
        assert deployment["spec"]["replicas"] == 1

    def test_a_full_memory_refuses_writes(self) -> None:
        args = shlex.join(container(render_file(CI["evaluation"]).of("evaluation.yaml")[0]["spec"]["template"])["args"])
        assert "--maxmemory-policy noeviction" in args
        assert "--maxmemory 48mb" in args


class TestHelmTest:
    def test_it_asks_the_service_under_its_own_identity(self) -> None:
        found = render()
        account, pod = found.of("tests/check.yaml")
        assert {thing["metadata"]["annotations"]["helm.sh/hook"] for thing in (account, pod)} == {"test"}
        assert container(pod)["args"] == ["probe", "authz-server.authz-system.svc.cluster.local:9000"]
        principal = f"cluster.local/ns/authz-system/sa/{pod['spec']['serviceAccountName']}"
        assert pod["spec"]["serviceAccountName"] == account["metadata"]["name"]
        allowed = found.of("istio/callers.yaml")[0]["spec"]["rules"][0]["from"][0]["source"]["principals"]
        assert principal in allowed

    def test_its_sidecar_does_not_keep_it_alive(self) -> None:
        pod = render().of("tests/check.yaml")[1]["metadata"]
        assert pod["labels"]["sidecar.istio.io/inject"] == "true"
        assert pod["annotations"]["sidecar.istio.io/nativeSidecar"] == "true"

    def test_with_the_server_s_own_tls(self) -> None:
        pod = render_file(CI["own-tls"]).of("tests/check.yaml")[1]
        assert pod["metadata"]["labels"]["sidecar.istio.io/inject"] == "false"
        assert "--tls-ca=/etc/authz-server/tls/ca.crt" in container(pod)["args"]
        volumes = {volume["name"]: volume["secret"] for volume in pod["spec"]["volumes"]}
        assert [item["key"] for item in volumes["tls-ca"]["items"]] == ["ca.crt"], "not the server's key"
        assert volumes["tls-client"]["secretName"] == "authz-test-tls"

    def test_switched_off(self) -> None:
        found = render({"tests": {"enabled": False}})
        assert found.of("tests/check.yaml") == []
        principals = found.of("istio/callers.yaml")[0]["spec"]["rules"][0]["from"][0]["source"]["principals"]
        assert principals == ["cluster.local/ns/istio-ingress/sa/istio-ingress"]


def test_extra_objects() -> None:
    from_map, from_text = render_file(CI["extra-objects"]).of("extraobjects.yaml")
    assert from_map["metadata"] == {"name": "authz-server-extra", "namespace": "authz-system"}
    assert (from_text["metadata"]["name"], from_text["data"]) == ("authz-server-text", {"replicas": "3"})
