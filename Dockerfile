# syntax=docker/dockerfile:1
# Two stages: the first has pip and compilers' leftovers, the second only Python and what is installed.
ARG PYTHON_VERSION=3.13

FROM python:${PYTHON_VERSION}-slim AS build
WORKDIR /src
COPY requirements.txt requirements-build.txt ./
# The virtual environment is made at the path where it will run, because its scripts name that path.
RUN python -m venv /opt/authz-server \
 && /opt/authz-server/bin/pip install --no-cache-dir --require-hashes -r requirements.txt \
 && python -m venv /opt/build \
 && /opt/build/bin/pip install --no-cache-dir --require-hashes -r requirements-build.txt
COPY pyproject.toml README.md LICENSE ./
COPY authz_server authz_server
RUN /opt/build/bin/python -m hatchling build --target wheel --directory /tmp/dist \
 && /opt/authz-server/bin/pip install --no-cache-dir --no-deps --no-index /tmp/dist/*.whl \
 && /opt/authz-server/bin/pip uninstall --yes pip \
 && /opt/authz-server/bin/python -m compileall -q /opt/authz-server/lib

FROM python:${PYTHON_VERSION}-slim
COPY --from=build /opt/authz-server /opt/authz-server
# Nothing is written at run time, so a read-only root filesystem works; bytecode was compiled above.
ENV PATH=/opt/authz-server/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# A number, so that Kubernetes can check runAsNonRoot without reading /etc/passwd.
USER 65532:65532
EXPOSE 9000 9001
STOPSIGNAL SIGTERM
ENTRYPOINT ["authz-server"]
CMD ["serve"]
