#!/bin/sh
# Checks for what the build needs and pip cannot bring: Python 3.11 or newer with venv and headers, a C++20 compiler.
# Writes no file. The first thing that is missing is named in one line, with the commands that install it; exit code 2.
#
# usage: check_build_tools.sh [PYTHON]        CXX names the compiler, as for CMake

python=${1:-python3}
case ${python##*/} in
    python3.[0-9]*) package=${python##*/} ;;
    *) package=python3 ;;
esac

missing() { # what is missing, packages of Debian, packages of Fedora, command on macOS
    echo "error: $1. Debian: sudo apt install $2; Fedora: sudo dnf install $3; macOS: $4" >&2
    exit 2
}

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    missing "no Python runs as '$python' (PYTHON= names another)" \
        'python3 python3-venv python3-dev' 'python3 python3-devel' 'brew install python'
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    missing "'$python' is Python $version, 3.11 or newer is needed (PYTHON= names another)" \
        'python3 python3-venv python3-dev' 'python3 python3-devel' 'brew install python'
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    missing "'$python' has no venv module" "$package-venv" python3 'brew install python'
"$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
    missing "'$python' has no header files (Python.h)" "$package-dev" "$package-devel" 'brew install python'

# CMake's own order where CXX is not set.
for compiler in "${CXX:-}" c++ g++ clang++; do
    # shellcheck disable=SC2086  # CXX may hold a launcher or options
    [ -z "$compiler" ] || ! command -v ${compiler%% *} >/dev/null || break
    [ -z "${CXX:-}" ] || missing "the C++ compiler '$CXX' of CXX is not there" g++ gcc-c++ 'xcode-select --install'
    compiler=
done
[ -n "$compiler" ] || missing 'no C++ compiler' g++ gcc-c++ 'xcode-select --install'
# shellcheck disable=SC2086
printf '#include <bit>\n#include <concepts>\n#include <span>\nint main() { return std::popcount(0u); }\n' |
    $compiler -std=c++20 -fsyntax-only -x c++ - >/dev/null 2>&1 ||
    missing "the C++ compiler '$compiler' cannot do C++20 (CXX= names another)" g++ gcc-c++ 'xcode-select --install'
