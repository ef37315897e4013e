"""Makes the summary of scripts/gpu_check.sh from its logs. Exit status 1 if anything failed or did not run.

Usage: gpu_summary.py --backends NAME,... --commit C --sanitized N --python NAME,... LOGS SUMMARY.json
"""

import argparse
import collections
import datetime
import json
import pathlib
import platform
import re
import sys
import xml.etree.ElementTree as ElementTree

from flash_kda import env

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Why a CUDA backend may skip a case. The contract has these sizes and dtypes; what `sm90` is not made for,
# `portable` runs.
MAY_SKIP = {
    "": (
        "K, V, expected each 64 or 128",
        "q, k, v(, out)?: float(16|32), expected bfloat16",
        "checkpoint_state: float16, expected bfloat16 or float32",
        "has kernels for prefill, decode and backward only",
    ),
    "sm90": (
        "has kernels for prefill and backward only",
        "(g|d_out|d_v): float32, expected bfloat16",
        "d_out: absent, expected bfloat16",
        r"\w+: stride of \w+ is .* bytes, expected a multiple of 16, less than 2\^40",
        r"\w+: data 0x\w+, expected a multiple of 16",
    ),
}


def read_device(path):
    names = ("name", "driver", "sm", "memory", "sm_max", "memory_max")
    row = dict(zip(names, (x.strip() for x in path.read_text().splitlines()[0].split(","))))
    clocks = {n: int(row[n]) if row.get(n, "").isdigit() else None for n in names[2:]}
    return row.get("name"), row.get("driver"), clocks


def reason_of(message):
    """Why a case was skipped, in words that many cases share."""
    reason = re.sub(r'^backend: ".*?" cannot run this call: ', "", message)
    return re.sub(r"K = \d+, V = \d+", "K, V", reason)


def may_skip(backend, reason):
    return any(re.fullmatch(x, reason) for x in MAY_SKIP[""] + MAY_SKIP.get(backend, ()))


def read_check(path, backend):
    """The table's outcome on a backend; a run that ended early has no JSON that can be read."""
    check = json.loads(path.read_text())
    reasons, verdicts = collections.Counter(), collections.Counter()
    failures = []
    for case in check["cases"]:
        (result,) = (x for x in case["results"] if x["backend"] == backend)
        verdicts[result["verdict"]] += 1
        if result["verdict"] == "skip":
            reason = reason_of(result["message"])
            if not may_skip(backend, reason):
                failures.append(f"{case['name']}: skipped on {backend}: {reason}")
            reason = re.sub(r"^\w+: (stride of) \w+ is .* bytes,", r"\1 a dimension:", reason)
            reasons[re.sub(r"^\w+: data 0x\w+", "data", reason)] += 1
        if result["verdict"] == "fail":
            failures.append(f"{case['name']} on {backend}: {result['message']}")
    errors = [
        {"range": r["range"], "out": r["half_out"], "state": r["half_state"]}
        for r in check["ranges"]
        if r["backend"] == backend
    ]
    return {
        "cases": len(check["cases"]),
        "passed": verdicts["pass"],
        "failed": verdicts["fail"],
        "skipped": verdicts["skip"],
        "skipped_because": dict(reasons),
        "failures": failures,
        "errors_by_gate": errors,
    }


def read_python(path):
    root = ElementTree.parse(path).getroot()
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    reasons, failures, properties = collections.Counter(), [], {}
    for test in root.iter("testcase"):
        bad = test.find("failure") is not None or test.find("error") is not None
        skipped = test.find("skipped")
        outcome = "failed" if bad else "skipped" if skipped is not None else "passed"
        counts[outcome] += 1
        if bad:
            failures.append(test.get("name"))
        elif skipped is not None:
            reasons[" ".join(skipped.get("message", "").split())] += 1
        for x in test.iter("property"):
            properties[x.get("name")] = float(x.get("value"))
    return {**counts, "skipped_because": dict(reasons), "failures": failures, **properties}


def added(parts):
    """The outcomes of several runs of pytest as one."""
    total = {"passed": 0, "failed": 0, "skipped": 0, "skipped_because": {}, "failures": []}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, dict):
                sums = collections.Counter(total[key])
                sums.update(value)
                total[key] = dict(sums)
            elif key in total:
                total[key] = total[key] + value
            else:
                total[key] = value
    return total


def read_sanitizer(logs, tool, sanitized, backends):
    """(number of errors or None if the tool did not finish, what went wrong)

    The last backend runs every case; the others may leave some to it.
    """
    text = (logs / f"{tool}.log").read_text()
    found = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", text)
    if not found:
        return None, "no summary"
    errors = sum(int(a or b) for a, b in found)
    check = json.loads((logs / f"{tool}.json").read_text())
    for backend in backends:
        passed = [
            result["verdict"] == "pass" or result["verdict"] == "skip" and backend != backends[-1]
            for case in check["cases"]
            for result in case["results"]
            if result["backend"] == backend
        ]
        if passed.count(True) != sanitized:
            return errors, f"{passed.count(True)} cases passed on {backend}, expected {sanitized}"
    status = (logs / f"{tool}.status").read_text().strip()
    return errors, "" if status == "0" and not errors else f"{errors} errors, status {status}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--backends", required=True)
    parser.add_argument("--commit", default="")
    parser.add_argument("--sanitized", type=int, required=True)
    parser.add_argument("--python", required=True, help="names of pytest's reports")
    parser.add_argument("logs", type=pathlib.Path)
    parser.add_argument("summary", type=pathlib.Path)
    options = parser.parse_args()
    logs, problems, backends = options.logs, [], options.backends.split(",")

    def attempt(what, function, *arguments, default):
        try:
            return function(*arguments)
        except (OSError, ValueError, KeyError, IndexError, ElementTree.ParseError) as error:
            problems.append(f"{what}: {type(error).__name__}: {error}")
            return default

    nothing = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    device, driver, clocks = attempt(
        "device", read_device, logs / "device.csv", default=(None, None, {})
    )
    tables = {
        backend: attempt(
            f"case table on {backend}",
            read_check,
            logs / "check.json",
            backend,
            default={"cases": 0, **nothing},
        )
        for backend in backends
    }
    suites = {
        name: attempt(name, read_python, logs / f"{name}.xml", default=nothing)
        for name in options.python.split(",")
    }
    python = added(suites.values())
    sanitizers = {}
    for tool in TOOLS:
        sanitizers[tool], problem = attempt(
            tool, read_sanitizer, logs, tool, options.sanitized, backends, default=(None, "")
        )
        if problem:
            problems.append(f"{tool}: {problem}")
    parts = [(f"case table on {backend}", table) for backend, table in tables.items()]
    parts += suites.items()
    for what, counts in parts:
        problems += [f"{what}: {name}" for name in counts["failures"]]
        if not counts["passed"]:
            problems.append(f"{what}: nothing passed")
    summary = {
        "commit": options.commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "driver": driver,
        "clocks_mhz": clocks,
        **{
            key: sum(table[key] for table in tables.values())
            for key in ("cases", "passed", "failed", "skipped")
        },
        "backends": tables,
        "sanitizers": sanitizers,
        "sanitized_cases": options.sanitized,
        "python": {**python, "packages": {"python": platform.python_version(), **env.packages()}},
    }
    options.summary.write_text(json.dumps(summary, indent=1) + "\n")
    for problem in problems:
        print(f"failed: {problem}")
    for what, counts in parts:
        print(
            f"{what}: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped"
        )
    for reason, n in python["skipped_because"].items():
        print(f"  {n} skipped: {reason}")
    versions = summary["python"]["packages"].items()
    print("with " + ", ".join(f"{name} {version}" for name, version in versions if version))
    print("without " + (", ".join(name for name, version in versions if not version) or "nothing"))
    print("sanitizers: " + ", ".join(f"{tool} {n}" for tool, n in sanitizers.items()))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
