#!/usr/bin/env bash
# The performance tables of the documents are what bench/table.py makes of the recorded results, and it
# notices where one is not.
# Usage: test_tables.sh SOURCE_DIR BUILD_DIR PYTHON
set -euo pipefail
source=$1 work=$2/test_tables python=$3
ls "$source"/bench/results/cpu-*.json >/dev/null 2>&1 || { echo "no record yet: skipped"; exit 77; }
fail() { echo "FAILED: $*"; exit 1; }

"$python" "$source/bench/table.py" --check || fail "a table is not what the records say"

rm -rf "$work" && mkdir -p "$work/bench" "$work/docs"
cp -r "$source/bench/results" "$work/bench/"
cp -r "$source/docs/kernels" "$work/docs/"
cp "$source/README.md" "$work/"
changed=$("$python" - "$work" <<'END'
import json, pathlib, sys
path = sorted((pathlib.Path(sys.argv[1]) / "bench/results").glob("cpu-*.json"))[0]
record = json.loads(path.read_text())
for row in record["rows"]:
    row["ms"] *= 2
path.write_text(json.dumps(record))
print(path.name)
END
)
if "$python" "$source/bench/table.py" --check --root "$work" >/dev/null; then
  fail "other times in $changed, and --check passes"
fi
"$python" "$source/bench/table.py" --root "$work" >/dev/null
"$python" "$source/bench/table.py" --check --root "$work" >/dev/null || fail "tables just written differ"

# Gradients of two rows of the backend table: each has its page.
cp "$work/docs/kernels/backward_portable.md" "$work/before.md"
rows=$("$python" - "$work" <<'END'
import json, pathlib, sys
for path in (pathlib.Path(sys.argv[1]) / "bench/results").glob("backward-h*.json"):
    record = json.loads(path.read_text())
    portable = [row for row in record["rows"] if row["backend"] == "portable"]
    assert portable
    record["rows"] = portable + [{**row, "backend": "sm90", "backward_ms": 7.89} for row in portable]
    path.write_text(json.dumps(record))
    print(len(portable))
END
)
"$python" "$source/bench/table.py" --root "$work" >/dev/null
cmp "$work/before.md" "$work/docs/kernels/backward_portable.md" || fail "rows of sm90 on portable's page"
grep -q "| portable's |" "$work/docs/kernels/backward_sm90.md" || fail "nothing beside portable's"
[ "$(grep -c '| 7.89 |' "$work/docs/kernels/backward_sm90.md")" = "$rows" ] || fail "rows of sm90 are missing"
echo "tables: ok"
