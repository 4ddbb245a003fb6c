"""service.yaml and serviceaccount.yaml: how the server is found, and who it is."""

from support.helm import render


def test_gateways_speak_http2_to_it() -> None:
    grpc, admin = render().one("service.yaml")["spec"]["ports"]
    assert (grpc["name"], grpc["appProtocol"], grpc["port"], grpc["targetPort"]) == ("grpc", "grpc", 9000, "grpc")
    assert (admin["name"], admin["appProtocol"], admin["port"]) == ("http-admin", "http", 9001)


def test_it_selects_the_pods() -> None:
    found = render()
    selector = found.one("service.yaml")["spec"]["selector"]
    assert selector == found.one("workload.yaml")["spec"]["selector"]["matchLabels"]


def test_headless() -> None:
    assert "clusterIP" not in render().one("service.yaml")["spec"]
    assert render({"service": {"headless": True}}).one("service.yaml")["spec"]["clusterIP"] == "None"


def test_annotations() -> None:
    assert "annotations" not in render().one("service.yaml")["metadata"]
    found = render({"service": {"annotations": {"a": "b"}}, "serviceAccount": {"annotations": {"c": "d"}}})
    assert found.one("service.yaml")["metadata"]["annotations"] == {"a": "b"}
    assert found.one("serviceaccount.yaml")["metadata"]["annotations"] == {"c": "d"}


def test_the_account_has_no_token() -> None:
    found = render()
    assert found.one("serviceaccount.yaml")["automountServiceAccountToken"] is False
    assert found.pod()["serviceAccountName"] == found.one("serviceaccount.yaml")["metadata"]["name"]


def test_an_account_of_ones_own() -> None:
    found = render({"serviceAccount": {"create": False, "name": "mine"}})
    assert found.of("serviceaccount.yaml") == []
    assert found.pod()["serviceAccountName"] == "mine"
    assert render({"serviceAccount": {"create": False}}).pod()["serviceAccountName"] == "default"
