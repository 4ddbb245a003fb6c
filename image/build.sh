#!/bin/sh
# What the image's build stage runs (Dockerfile), and the tests without Docker:
#
#   build.sh compiler              a C compiler from Debian, where there is none
#   build.sh dependencies PREFIX   the locked dependencies into a new virtual environment at PREFIX
#   build.sh package PREFIX        this package into it, its hot path compiled; then everything that only builds goes
#
# From the folder that holds requirements*.txt, and for `package` the sources. PREFIX is where it will run, because the
# scripts in it name that path. PYTHON may name another interpreter than python3.
set -eu
step=$1 prefix=${2:-}
build=$prefix.build
pip="-m pip --disable-pip-version-check --no-input --quiet"

case $step in
compiler)
    command -v cc >/dev/null || {
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends gcc libc6-dev >/dev/null
    }
    ;;
dependencies)
    "${PYTHON:-python3}" -m venv "$prefix"
    # shellcheck disable=SC2086 - words, not one argument
    "$prefix/bin/python" $pip install --no-cache-dir --no-compile --require-hashes --only-binary :all: -r requirements.txt
    ;;
package)
    "${PYTHON:-python3}" -m venv --without-pip "$build"
    # shellcheck disable=SC2086
    "$prefix/bin/python" $pip --python "$build/bin/python" install --no-cache-dir --require-hashes --only-binary :all: -r requirements-build.txt
    # From a copy: what mypyc makes it leaves beside the sources, where it would be imported in their place ever after.
    mkdir "$build/source"
    cp -R authz_server pyproject.toml README.md LICENSE "$build/source"
    (cd "$build/source" && HATCH_BUILD_HOOK_ENABLE_MYPYC=true ../bin/python -m hatchling build --target wheel --directory ../dist)
    # shellcheck disable=SC2086
    "$prefix/bin/python" $pip install --no-cache-dir --no-compile --no-deps --no-index "$build"/dist/*.whl
    rm -rf "$build"
    # shellcheck disable=SC2086
    "$prefix/bin/python" $pip uninstall --yes pip
    "$prefix/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' | while read -r packages; do
        # Some Pythons put setuptools into a virtual environment beside pip.
        rm -rf "$packages"/setuptools* "$packages"/pkg_resources "$packages"/_distutils_hack "$packages"/distutils-precedence.pth
    done
    rm -f "$prefix"/bin/activate* "$prefix"/bin/Activate*
    # Nothing is written when it runs, so bytecode must be there. Unchecked: it depends on no file time.
    "$prefix/bin/python" -m compileall -q -j 0 --invalidation-mode unchecked-hash "$prefix/lib"
    ;;
*)
    echo "$0: $step is neither compiler, dependencies nor package" >&2
    exit 2
    ;;
esac
