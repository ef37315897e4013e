#!/usr/bin/env bash
# Sees to what a target needs and installs what is missing: into build/ where that is possible, otherwise
# with apt-get. Quick when all is there. Usage: scripts/setup.sh GROUP...
#   build   C compiler, CMake >= 3.25
#   test    cmocka, C++ compiler, pkg-config
#   python  build/venv: what builds the wheel, tests/python/requirements.txt
#   fla     build/fla/VERSION: the versions of flash-linear-attention that tests/python/test_fla.py runs with
#   lint    clang-format and clang-tidy 14      fuzz  clang and libFuzzer
#   abi     abidw and abidiff                   neon  aarch64 cross compiler, qemu, cmocka
#   coverage  gcovr (build/venv-tools)          docs  Doxygen, Sphinx (build/venv-docs)
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# apt_install PACKAGE...: as root, or through sudo where that asks for no password.
apt_install() {
  local as=()
  have apt-get || die "needs the Debian packages $* (or your system's own); no apt-get here"
  if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || die "needs the Debian packages: $*. Run as root: apt-get install $*"
    as=(sudo -n)
  fi
  say "installing with apt-get: $*"
  export DEBIAN_FRONTEND=noninteractive
  "${as[@]}" apt-get install -y --no-install-recommends "$@" >build/apt.log 2>&1 ||
    { "${as[@]}" apt-get update >build/apt.log 2>&1 &&
      "${as[@]}" apt-get install -y --no-install-recommends "$@" >>build/apt.log 2>&1; } ||
    { tail -n 20 build/apt.log >&2; die "apt-get install $* failed (build/apt.log)"; }
}

# need COMMAND PACKAGE: installs PACKAGE unless COMMAND is there.
need() { have "$1" || apt_install "$2"; }

setup_build() {
  if ! have cc && ! have gcc; then apt_install gcc libc6-dev; fi
  echo '#include <pthread.h>' | ${CC:-cc} -E - >/dev/null 2>&1 || apt_install libc6-dev
  need make make
  need cmake cmake
  local version
  version=$(cmake --version | sed -n '1s/[^0-9]*\([0-9]*\.[0-9]*\).*/\1/p')
  [ "$(printf '%s\n3.25\n' "$version" | sort -V | head -n 1)" = 3.25 ] ||
    die "CMake $version, expected 3.25 or newer"
}

# unpack_deb DIRECTORY ARCHITECTURE PACKAGE...: downloads packages and unpacks them below DIRECTORY, with
# apt lists of its own, so that neither root rights nor a foreign architecture on the system are needed.
unpack_deb() {
  local dir=$PWD/$1 arch=$2 host options deb
  shift 2
  host=$(dpkg --print-architecture)
  mkdir -p "$dir/apt/lists/partial" "$dir/apt/cache/archives/partial" "$dir/debs"
  options=(-q -o "APT::Architecture=$host" -o "APT::Architectures::=$host" -o "APT::Architectures::=$arch"
    -o "Dir::State::lists=$dir/apt/lists" -o "Dir::Cache=$dir/apt/cache" -o APT::Sandbox::User=)
  apt-get "${options[@]}" update >build/apt.log 2>&1 || return 1
  (cd "$dir/debs" && apt-get "${options[@]}" download "${@/%/:$arch}") >>build/apt.log 2>&1 || return 1
  for deb in "$dir"/debs/*.deb; do dpkg -x "$deb" "$dir/root"; done
  rm -rf "$dir/apt" "$dir/debs"
}

# cmocka_into DIRECTORY ARCHITECTURE: DIRECTORY/include and DIRECTORY/lib.
cmocka_into() {
  [ -e "$1/lib/libcmocka.so" ] && return
  say "unpacking cmocka ($2) into $1"
  rm -rf "$1" && mkdir -p "$1"
  unpack_deb "$1" "$2" libcmocka0 libcmocka-dev || { rm -rf "$1"; return 1; }
  ln -s root/usr/include "$1/include"
  mv "$1"/root/usr/lib/*-linux-gnu "$1/lib"
}

setup_test() {
  setup_build
  need g++ g++
  need pkg-config pkg-config
  if ! echo '#include <stddef.h>
#include <stdarg.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>' | ${CC:-cc} -E - >/dev/null 2>&1; then
    if have apt-get && have dpkg; then
      cmocka_into build/cmocka "$(dpkg --print-architecture)" || apt_install libcmocka-dev
    else
      die "cmocka not found: install it (Debian: libcmocka-dev)"
    fi
  fi
}

# make_venv DIRECTORY REQUIREMENTS...: made anew when the requirements or the interpreter change.
make_venv() {
  local dir=$1 python=${PYTHON:-python3} key
  shift
  have "$python" || apt_install python3
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "$("$python" --version 2>&1), expected Python 3.10 or newer (set PYTHON)"
  key=$( { "$python" -c 'import sys; print(sys.version, sys.prefix)'; cat "$@"; } | sha256sum)
  [ "$(cat "$dir/.key" 2>/dev/null)" = "$key" ] && return
  say "making $dir: $*"
  rm -rf "$dir"
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then apt_install python3-venv; fi
  "$python" -m venv "$dir"
  local requirements=()
  for file in "$@"; do requirements+=(-r "$file"); done
  "$dir/bin/pip" install --disable-pip-version-check --quiet "${requirements[@]}"
  echo "$key" >"$dir/.key"
}

setup_python() {
  setup_build
  make_venv build/venv scripts/requirements-wheel.txt tests/python/requirements.txt
  # The extension needs Python.h, which Debian keeps in a package of its own.
  local include
  include=$(build/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')
  [ -e "$include/Python.h" ] || apt_install python3-dev
}

setup_fla() {
  setup_python
  local version
  while read -r version; do
    [ -e "build/fla/$version" ] && continue
    say "unpacking fla-core $version into build/fla"
    rm -rf build/fla/part
    build/venv/bin/pip install --disable-pip-version-check --quiet --no-deps --target build/fla/part \
      "fla-core==$version"
    mv build/fla/part "build/fla/$version"
  done <tests/python/fla-versions.txt
}

setup_lint() {
  need clang-format-14 clang-format-14
  need clang-tidy-14 clang-tidy-14
}

setup_fuzz() {
  setup_build
  need clang clang
  scripts/has_libfuzzer.sh || apt_install libclang-rt-14-dev
}

setup_abi() {
  setup_build
  need abidw abigail-tools
}

setup_neon() {
  setup_build
  need aarch64-linux-gnu-gcc gcc-aarch64-linux-gnu
  [ -e /usr/aarch64-linux-gnu/include/stdio.h ] || apt_install libc6-dev-arm64-cross
  need qemu-aarch64 qemu-user
  cmocka_into build/arm64 arm64 || die "cmocka for arm64 cannot be downloaded (build/apt.log)"
}

setup_coverage() { make_venv build/venv-tools scripts/requirements-tools.txt; }

setup_docs() {
  need doxygen doxygen
  make_venv build/venv-docs docs/requirements.txt
}

[ $# -gt 0 ] || die "usage: scripts/setup.sh GROUP..."
for group in "$@"; do
  declare -F "setup_$group" >/dev/null || die "unknown group $group"
  "setup_$group"
done
