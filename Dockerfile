# syntax=docker/dockerfile:1
# Two stages: the first has what builds, the second only Python and what is installed.
ARG PYTHON_VERSION=3.13

FROM python:${PYTHON_VERSION}-slim AS build
WORKDIR /src
COPY image/build.sh image/build.sh
RUN sh image/build.sh compiler
COPY requirements.txt requirements.txt
RUN sh image/build.sh dependencies /opt/authz-server
COPY requirements-build.txt pyproject.toml README.md LICENSE ./
COPY authz_server authz_server
RUN sh image/build.sh package /opt/authz-server

FROM python:${PYTHON_VERSION}-slim
# The base image's own pip, and the copy of it for new virtual environments.
RUN pip uninstall --yes --root-user-action ignore pip \
 && rm -rf "$(python -c 'import ensurepip, os; print(os.path.dirname(ensurepip.__file__))')"
COPY --from=build /opt/authz-server /opt/authz-server
# Nothing is written at run time, so a read-only root filesystem works.
ENV PATH=/opt/authz-server/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# A number, so that Kubernetes can check runAsNonRoot without reading /etc/passwd.
USER 65532:65532
EXPOSE 9000 9001
STOPSIGNAL SIGTERM
ENTRYPOINT ["authz-server"]
CMD ["serve"]
