"""The little of a Kubernetes API server that Helm needs to install and to uninstall, for tests of what Helm does.

Objects are kept, and nothing is done about them, but that every Job is complete at once.
"""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

Object = dict[str, Any]

RESOURCES = {
    "v1": ("ConfigMap", "Namespace", "Pod", "Secret", "Service", "ServiceAccount"),
    "apps/v1": ("Deployment", "StatefulSet"),
    "autoscaling/v2": ("HorizontalPodAutoscaler",),
    "batch/v1": ("CronJob", "Job"),
    "monitoring.coreos.com/v1": ("PrometheusRule", "ServiceMonitor"),
    "networking.istio.io/v1": ("DestinationRule",),
    "networking.istio.io/v1alpha3": ("EnvoyFilter",),
    "networking.k8s.io/v1": ("NetworkPolicy",),
    "policy/v1": ("PodDisruptionBudget",),
    "security.istio.io/v1": ("AuthorizationPolicy", "PeerAuthentication"),
}
"""API version -> the kinds that it has."""

_COMPLETE = {
    "conditions": [{"type": "Complete", "status": "True"}],
    "succeeded": 1,
    "startTime": "2026-01-01T00:00:00Z",
}


def _plural(kind: str) -> str:
    lower = kind.lower()
    return lower[:-1] + "ies" if lower.endswith("y") else lower + "s"


class ApiServer:
    """Serves on a port of the loopback that the system chose, within a `with` block."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str, str]] = []
        """What was changed, in order: created or deleted, kind, name."""
        self._objects: dict[str, Object] = {}
        self._version = 0
        self._changed = threading.Condition()  # re-entrant
        self._events: list[tuple[int, str, str, Object]] = []
        self._closing = False
        server = self

        class Handler(_Handler):
            api = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"http://127.0.0.1:{self._http.server_port}"

    def objects(self, kind: str | None = None) -> list[Object]:
        """What there is, of a kind or at all."""
        with self._changed:
            return [thing for thing in self._objects.values() if kind in (None, thing["kind"])]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def get(self, path: str) -> Object | None:
        """Return an object, or None."""
        with self._changed:
            return self._objects.get(path)

    def list(self, collection: str) -> Object:
        """Return the objects below a path."""
        with self._changed:
            items = [thing for path, thing in self._objects.items() if _below(path, collection)]
            return {"kind": "List", "apiVersion": "v1", "metadata": self._list_metadata(), "items": items}

    def put(self, path: str, thing: Object) -> Object:
        """Create an object, or write it anew."""
        with self._changed:
            new = path not in self._objects
            self._version += 1
            metadata = {"uid": f"uid-{self._version}", "creationTimestamp": "2026-01-01T00:00:00Z", "generation": 1}
            thing["metadata"] = metadata | thing["metadata"] | {"resourceVersion": str(self._version)}
            if thing["kind"] == "Job":
                thing["status"] = _COMPLETE
            self._objects[path] = thing
            self._note("ADDED" if new else "MODIFIED", path, thing)
            if new:
                self.log.append(("created", thing["kind"], thing["metadata"]["name"]))
            return thing

    def delete(self, path: str) -> Object | None:
        """Delete an object, and return it."""
        with self._changed:
            thing = self._objects.pop(path, None)
            if thing is not None:
                self._version += 1
                self._note("DELETED", path, thing)
                self.log.append(("deleted", thing["kind"], thing["metadata"]["name"]))
            return thing

    def watch(self, collection: str, since: int | None) -> Iterator[Object | None]:
        """Yield what changes below a path; None now and then, while nothing does.

        `since` a version of the whole; None begins with all that there is, and says where that ends.
        """
        if since is None:
            with self._changed:
                found = self.list(collection)
                since = self._version
            for thing in found["items"]:
                yield {"type": "ADDED", "object": thing}
            yield {"type": "BOOKMARK", "object": self._bookmark(collection, since)}
        while True:
            with self._changed:
                if self._closing:
                    return
                found = [event for event in self._events if event[0] > since and _below(event[2], collection)]
                if not found:
                    self._changed.wait(0.2)
            for version, what, _, thing in found:
                since = version
                yield {"type": what, "object": thing}
            if not found:
                yield None

    def _note(self, what: str, path: str, thing: Object) -> None:
        self._events.append((self._version, what, path, thing))
        self._changed.notify_all()

    def _bookmark(self, collection: str, version: int) -> Object:
        (api, kind), *_ = [
            (api, kind)
            for api, kinds in RESOURCES.items()
            for kind in kinds
            if collection.startswith(f"/{_root(api)}/") and collection.endswith(f"/{_plural(kind)}")
        ]
        metadata = {"resourceVersion": str(version), "annotations": {"k8s.io/initial-events-end": "true"}}
        return {"kind": kind, "apiVersion": api, "metadata": metadata}

    def _list_metadata(self) -> Object:
        return {"resourceVersion": str(self._version)}


def _below(path: str, collection: str) -> bool:
    """Whether an object is of a collection: of one namespace, or of all."""
    if path.rpartition("/")[0] == collection:
        return True
    root, _, plural = collection.rpartition("/")
    return path.startswith(f"{root}/namespaces/") and path.split("/")[-2] == plural


class _Handler(BaseHTTPRequestHandler):
    api: ApiServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - named so by the standard library
        """Say nothing."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        discovered = _discovery(url.path)
        query = parse_qs(url.query)
        if discovered is not None:
            self._answer(200, discovered)
        elif (thing := self.api.get(url.path)) is not None:
            self._answer(200, thing)
        elif query.get("watch"):
            since = None if query.get("sendInitialEvents") else int(query.get("resourceVersion", ["0"])[0])
            self._watch(url.path, since)
        elif url.path.rpartition("/")[2] in _COLLECTIONS:
            self._answer(200, self.api.list(url.path))
        else:
            self._answer(404, _status(404, "NotFound"))

    def do_POST(self) -> None:
        thing = self._body()
        path = f"{urlsplit(self.path).path}/{thing['metadata']['name']}"
        if self.api.get(path) is not None:
            self._answer(409, _status(409, "AlreadyExists"))
        else:
            self._answer(201, self.api.put(path, thing))

    def do_PUT(self) -> None:
        self._answer(200, self.api.put(urlsplit(self.path).path, self._body()))

    do_PATCH = do_PUT  # noqa: N815 - as above; Helm applies whole objects

    def do_DELETE(self) -> None:
        self._body()
        thing = self.api.delete(urlsplit(self.path).path)
        self._answer(200 if thing else 404, thing or _status(404, "NotFound"))

    def _watch(self, collection: str, since: int | None) -> None:
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        try:
            for event in self.api.watch(collection, since):
                if event is not None:
                    line = json.dumps(event).encode() + b"\n"
                    self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
                    self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
        except OSError:  # whoever watched is gone
            self.close_connection = True

    def _body(self) -> Object:
        text = self.rfile.read(int(self.headers.get("content-length") or 0))
        loaded: Object = json.loads(text) if text else {}
        return loaded

    def _answer(self, status: int, body: Object) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


_COLLECTIONS = {_plural(kind) for kinds in RESOURCES.values() for kind in kinds}


def _status(code: int, reason: str) -> Object:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": reason,
        "message": reason,
        "code": code,
    }


def _root(version: str) -> str:
    return f"apis/{version}" if "/" in version else f"api/{version}"


def _openapi(version: str, kinds: tuple[str, ...]) -> Object:
    """Say that the server validates fields by itself, so that Helm does not."""
    group, _, number = version.rpartition("/")
    operations = {
        f"/{_root(version)}/{_plural(kind)}/{{name}}": {
            "patch": {
                "parameters": [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}],
                "responses": {},
                "x-kubernetes-group-version-kind": {"group": group, "version": number, "kind": kind},
            }
        }
        for kind in kinds
    }
    return {"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "v1"}, "paths": operations}


def _discovery(path: str) -> Object | None:
    """What API versions and kinds there are."""
    groups: dict[str, list[str]] = {}
    for version in RESOURCES:
        if "/" in version:
            groups.setdefault(version.partition("/")[0], []).append(version)
    if path == "/version":
        return {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
    if path == "/openapi/v3":
        return {"paths": {root: {"serverRelativeURL": f"/openapi/v3/{root}"} for root in map(_root, RESOURCES)}}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        listed = [
            {
                "name": group,
                "versions": [{"groupVersion": version, "version": version.partition("/")[2]} for version in versions],
                "preferredVersion": {"groupVersion": versions[0], "version": versions[0].partition("/")[2]},
            }
            for group, versions in groups.items()
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    for version, kinds in RESOURCES.items():
        if path == f"/openapi/v3/{_root(version)}":
            return _openapi(version, kinds)
        if path == f"/{_root(version)}":
            verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
            resources = [
                {
                    "name": _plural(kind),
                    "singularName": kind.lower(),
                    "namespaced": kind != "Namespace",
                    "kind": kind,
                    "verbs": verbs,
                }
                for kind in kinds
            ]
            return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}
    return None
