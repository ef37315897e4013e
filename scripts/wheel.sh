#!/usr/bin/env bash
# Builds the wheel into dist/; with --install also installs it into build/venv.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh python
rm -rf build/wheel
build/venv/bin/pip wheel . --quiet --disable-pip-version-check --no-deps --no-build-isolation \
  --wheel-dir build/wheel
mkdir -p dist
cp build/wheel/*.whl dist/
ls -l build/wheel/*.whl
if [ "${1:-}" = --install ]; then
  build/venv/bin/pip install --quiet --disable-pip-version-check --no-deps --force-reinstall \
    build/wheel/*.whl
fi
