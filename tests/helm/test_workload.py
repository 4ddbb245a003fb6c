"""workload.yaml: the server's pods, how they come, are spread, and leave."""

from typing import Any

import pytest
from support.helm import CI, RELEASE, render, render_file


def test_a_deployment_that_never_has_fewer_pods_than_it_should() -> None:
    workload = render().one("workload.yaml")
    assert (workload["kind"], workload["spec"]["replicas"]) == ("Deployment", 3)
    assert workload["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


def test_a_stateful_set_with_a_volume_for_each_pod() -> None:
    found = render_file(CI["persistence"])
    workload = found.one("workload.yaml")
    assert workload["kind"] == "StatefulSet"
    assert workload["spec"]["podManagementPolicy"] == "Parallel"
    assert workload["spec"]["serviceName"] == found.one("service.yaml")["metadata"]["name"]
    (claim,) = workload["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["storageClassName"] == "fast"
    assert claim["spec"]["resources"]["requests"]["storage"] == "2Gi"
    assert "state" not in [volume["name"] for volume in found.pod()["volumes"]]


def test_the_state_directory_is_an_empty_dir_of_limited_size() -> None:
    found = render({"snapshotFile": {"sizeLimit": "64Mi"}})
    assert {"name": "state", "emptyDir": {"sizeLimit": "64Mi"}} in found.pod()["volumes"]
    assert {"name": "state", "mountPath": "/var/lib/authz-server"} in found.container()["volumeMounts"]
    assert found.settings()["snapshot_file"].startswith("/var/lib/authz-server/")


def test_without_a_snapshot_file_no_place_for_one() -> None:
    found = render({"snapshotFile": {"enabled": False}})
    assert "state" not in {volume["name"] for volume in found.pod()["volumes"]}
    assert "state" not in {mount["name"] for mount in found.container()["volumeMounts"]}
    assert "snapshot_file" not in found.settings()


def test_the_selector_matches_the_pods_and_never_the_others() -> None:
    found = render({"evaluation": {"enabled": True}, "redis": {}})
    selector = found.one("workload.yaml")["spec"]["selector"]["matchLabels"]
    assert selector.items() <= found.one("workload.yaml")["spec"]["template"]["metadata"]["labels"].items()
    others = [found.one("init.yaml")["spec"]["template"], found.of("evaluation.yaml")[0]["spec"]["template"]]
    for template in [*others, found.of("tests/check.yaml")[1]]:
        assert not selector.items() <= template["metadata"]["labels"].items()


@pytest.mark.parametrize(
    ("image", "reference"),
    [
        ({}, "authz-server:0.1.0"),
        ({"tag": "1.2.3"}, "authz-server:1.2.3"),
        ({"repository": "r.example/a", "tag": "1", "digest": "sha256:" + "0" * 64}, "r.example/a@sha256:" + "0" * 64),
    ],
)
def test_image(image: dict[str, str], reference: str) -> None:
    assert render({"image": image}).container()["image"] == reference


class TestLeaving:
    """SIGTERM, not ready, answering on, finishing, gone; and only then the sidecar and the kill."""

    @pytest.mark.parametrize("drain", [{}, {"seconds": 60, "graceSeconds": 30}, {"terminationGracePeriodSeconds": 120}])
    def test_order(self, drain: dict[str, int]) -> None:
        found = render({"drain": drain})
        settings, template = found.settings(), found.one("workload.yaml")["spec"]["template"]
        leaving = settings["drain_seconds"] + settings["grace_seconds"]
        assert settings["drain_seconds"] > drain.get("endpointPropagationSeconds", 10)
        proxy = template["metadata"]["annotations"]["proxy.istio.io/config"]
        sidecar = int(proxy.partition("terminationDrainDuration: ")[2].partition("s")[0])
        assert leaving < sidecar < template["spec"]["terminationGracePeriodSeconds"]

    def test_without_a_sidecar_nothing_is_said_to_one(self) -> None:
        template = render({"istio": {"enabled": False}}).one("workload.yaml")["spec"]["template"]
        assert not [name for name in template["metadata"]["labels"] if "istio" in name]
        assert not [name for name in template["metadata"]["annotations"] if "istio" in name]


class TestProbes:
    def test_ready_by_grpc_alive_by_http(self) -> None:
        container = render().container()
        assert container["readinessProbe"]["grpc"] == {"port": 9000}
        for probe in ("livenessProbe", "startupProbe"):
            assert container[probe]["httpGet"] == {"path": "/livez", "port": "http-admin"}

    def test_ready_by_http_when_grpc_has_tls(self) -> None:
        container = render_file(CI["own-tls"]).container()
        assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http-admin"}

    def test_ports(self) -> None:
        found = render_file(CI["placement"])
        assert [port["containerPort"] for port in found.container()["ports"]] == [9443, 9444]
        assert found.container()["readinessProbe"]["grpc"] == {"port": 9443}
        assert (found.settings()["listen"], found.settings()["admin_listen"]) == ("[::]:9443", "[::]:9444")


class TestSpread:
    def test_over_zones_and_hosts(self) -> None:
        found = render()
        constraints = found.pod()["topologySpreadConstraints"]
        assert {constraint["topologyKey"] for constraint in constraints} == {
            "topology.kubernetes.io/zone",
            "kubernetes.io/hostname",
        }
        selector = found.one("workload.yaml")["spec"]["selector"]
        assert all(constraint["labelSelector"] == selector for constraint in constraints)

    def test_switched_off(self) -> None:
        assert "topologySpreadConstraints" not in render({"spread": {"zones": "", "hosts": ""}}).pod()

    def test_one_of_two(self) -> None:
        (constraint,) = render({"spread": {"zones": ""}}).pod()["topologySpreadConstraints"]
        assert constraint["topologyKey"] == "kubernetes.io/hostname"


def test_a_changed_setting_replaces_the_pods() -> None:
    def checksum(values: dict[str, Any]) -> str:
        template = render(values).one("workload.yaml")["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/settings"])

    assert checksum({}) == checksum({"image": {"tag": "2"}})
    assert checksum({}) != checksum({"settings": {"show_reason": True}})


class TestRedis:
    def test_password_and_authorities_are_files(self) -> None:
        found = render_file(CI["redis-tls-acl"])
        env = found.env()
        assert env["AUTHZ_REDIS_URL"] == "rediss://redis.data.svc.cluster.local:6380/0"
        assert env["AUTHZ_REDIS_TLS_CA"] == "/etc/authz-server/redis-ca/ca.crt"
        assert env["AUTHZ_REDIS_TLS_KEY"] == "/etc/authz-server/redis-client/tls.key"
        assert env["AUTHZ_REDIS_PASSWORD_FILE"] == "/etc/authz-server/redis/password"
        assert (env["AUTHZ_REDIS_USERNAME"], env["AUTHZ_REDIS_PREFIX"]) == ("authz-server", "prod")
        volumes = {volume["name"]: volume.get("secret") for volume in found.pod()["volumes"]}
        assert volumes["redis-password"]["items"] == [{"key": "acl-password", "path": "password"}]
        assert volumes["redis-password"]["defaultMode"] == 0o440
        mounts = {mount["name"]: mount for mount in found.container()["volumeMounts"]}
        assert mounts["redis-password"]["mountPath"] == "/etc/authz-server/redis"
        assert mounts["redis-ca"]["readOnly"] is True

    def test_sentinels(self) -> None:
        found = render_file(CI["redis-sentinel"])
        env = found.env()
        assert "AUTHZ_REDIS_URL" not in env
        assert env["AUTHZ_REDIS_SENTINELS"].split(",") == [f"sentinel-{number}.data:26379" for number in range(3)]
        assert (env["AUTHZ_REDIS_SENTINEL_PRIMARY"], env["AUTHZ_REDIS_DATABASE"]) == ("policy", "2")
        assert env["AUTHZ_REDIS_SENTINEL_USERNAME"] == "watcher"
        assert env["AUTHZ_REDIS_TLS"] == "true"
        volumes = {volume["name"]: volume.get("secret") for volume in found.pod()["volumes"]}
        assert volumes["sentinel-password"]["items"] == [{"key": "sentinel-password", "path": "password"}]
        mounts = {mount["name"]: mount["mountPath"] for mount in found.container()["volumeMounts"]}
        assert env["AUTHZ_REDIS_SENTINEL_PASSWORD_FILE"] == f"{mounts['sentinel-password']}/password"

    def test_a_cluster(self) -> None:
        env = render_file(CI["redis-cluster"]).env()
        assert "AUTHZ_REDIS_URL" not in env
        assert env["AUTHZ_REDIS_CLUSTER"] == "redis-0.data:7000,redis-1.data:7000,redis-2.data:7001"


def test_own_tls_is_mounted_where_the_settings_say() -> None:
    found = render_file(CI["own-tls"])
    settings = found.settings()
    assert settings["tls_certificate"] == "/etc/authz-server/tls/tls.crt"
    assert settings["tls_key"] == "/etc/authz-server/tls/tls.key"
    assert settings["tls_client_ca"] == "/etc/authz-server/tls/ca.crt"
    assert {"name": "tls", "mountPath": "/etc/authz-server/tls", "readOnly": True} in found.container()["volumeMounts"]


def test_placement() -> None:
    found = render_file(CI["placement"])
    workload, pod = found.one("workload.yaml"), found.pod()
    assert workload["metadata"]["annotations"]["example.com/owner"] == "edge"
    template = workload["spec"]["template"]["metadata"]
    assert template["labels"]["example.com/tier"] == "edge"
    assert template["annotations"]["example.com/note"] == "hello"
    assert pod["priorityClassName"] == "system-cluster-critical"
    assert pod["nodeSelector"] == {"kubernetes.io/arch": "amd64"}
    assert pod["tolerations"] == [{"key": "edge", "operator": "Exists"}]
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert "nodeAffinity" in pod["affinity"]
    assert pod["serviceAccountName"] == "edge"
    assert found.container()["resources"]["limits"] == {"memory": "4Gi"}
    assert all(thing["metadata"]["labels"]["example.com/cost-center"] == "42" for _, thing in found.objects)


def test_each_pod_reports_under_its_own_name() -> None:
    (name,) = [variable for variable in render().container()["env"] if "valueFrom" in variable]
    assert name == {"name": "AUTHZ_REPLICA_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}


@pytest.mark.parametrize(
    ("release", "values", "name"),
    [
        (RELEASE, {}, "authz-server"),
        ("edge", {}, "edge-authz-server"),
        ("edge", {"nameOverride": "lock"}, "edge-lock"),
        ("edge", {"fullnameOverride": "lock"}, "lock"),
        ("e" * 53, {}, "e" * 50),
    ],
)
def test_names(release: str, values: dict[str, Any], name: str) -> None:
    assert render(values, name=release).one("workload.yaml")["metadata"]["name"] == name
