#!/bin/sh
# What the image's build stage runs (Dockerfile), and the tests without Docker:
#
#   build.sh compiler              a C compiler from Debian, where there is none
#   build.sh wheel FOLDER          this package as FOLDER/dist/*.whl, its hot path compiled (also `make compiled`)
#   build.sh dependencies PREFIX   the locked dependencies into a new virtual environment at PREFIX
#   build.sh package PREFIX        that wheel into it; then everything that only builds goes
#
# From the folder that holds requirements*.txt, and for a wheel the sources. PREFIX is where it will run, because the
# scripts in it name that path. PYTHON may name another interpreter than python3, by its whole path.
set -eu
step=$1 prefix=${2:-}
build=$prefix.build
pip="-m pip --disable-pip-version-check --no-input --quiet"

# wheel PYTHON FOLDER. From a copy: what mypyc makes it leaves beside the sources, where it would be imported in their
# place ever after.
wheel() {
    mkdir -p "$2/source"
    cp -R authz_server pyproject.toml README.md LICENSE "$2/source"
    (cd "$2/source" && HATCH_BUILD_HOOK_ENABLE_MYPYC=true "$1" -m hatchling build --target wheel --directory ../dist)
}

case $step in
compiler)
    command -v cc >/dev/null || {
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends gcc libc6-dev >/dev/null
    }
    ;;
wheel)
    wheel "${PYTHON:-python3}" "$prefix"
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
    wheel "$build/bin/python" "$build"
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
    echo "$0: $step is neither compiler, wheel, dependencies nor package" >&2
    exit 2
    ;;
esac
