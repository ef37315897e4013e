#!/usr/bin/env bash
# Lists the project's C files.
set -euo pipefail
cd "$(dirname "$0")/.."
find include src tools tests fuzz examples bench python -name '*.[ch]' -type f | sort
