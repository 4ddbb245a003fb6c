"""What the practices' tests share: Envoys of three versions, pods, the authorization server; and the report."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send
from support.children import none_left
from support.envoys import ENVOY_VERSIONS
from support.gateway import AuthzServer, policy
from support.istio.platform import ALIKE, QUEUES, Launcher, Pods

from authz_server.demo.upstreams import Upstreams


@pytest.fixture(scope="module", autouse=True)
def no_child_left() -> Iterator[None]:
    """The module leaves no child process behind."""
    with none_left():
        yield


@pytest.fixture(scope="module", params=ENVOY_VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    """Envoy's version."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def running_pods() -> Iterator[Pods]:
    failing: set[str] = set()

    def around(name: str, pod: ASGIApp) -> ASGIApp:
        async def maybe_failing(scope: Scope, receive: Receive, send: Send) -> None:
            if name in failing and scope["type"] == "http":
                await send({"type": "http.response.start", "status": 500, "headers": [(b"x-served-by", name.encode())]})
                await send({"type": "http.response.body"})
            else:
                await pod(scope, receive, send)

        return maybe_failing

    with Upstreams((*QUEUES, *ALIKE), around=around) as upstreams:
        yield Pods(upstreams, failing)


@pytest.fixture
def pods(running_pods: Pods) -> Pods:
    """The pods, all well, with no arrivals yet."""
    running_pods.failing.clear()
    running_pods.upstreams.clear()
    return running_pods


@pytest.fixture(scope="module")
def authz() -> Iterator[AuthzServer]:
    """The authorization server, with a policy that lets everybody in."""
    with AuthzServer(policy()) as server:
        yield server
        assert server.faults == []


@pytest.fixture(scope="module")
def launcher(version: str, no_child_left: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Starts Envoys of the version."""
    with ExitStack() as stack:
        yield Launcher(version, lambda: tmp_path_factory.mktemp("endpoints"), stack)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Say in the report which practice was tried, which is a module here, on which version of Envoy."""
    report = yield
    if report.when == "call" or not report.passed:
        assert isinstance(item, pytest.Function)
        callspec = getattr(item, "callspec", None)
        version = "" if callspec is None else callspec.params.get("version", "")
        title = (item.module.__doc__ or item.module.__name__).strip().splitlines()[0]
        report.practice = [title, version]
    return report
