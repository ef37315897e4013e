"""Adds up JUnit files: names what failed, ends with 'N passed, N failed[, N skipped]'.

Usage: summary.py FILE...   A file that is missing or unreadable counts as one failure. Exit status 1 if
anything failed or nothing ran.
"""

import sys
import xml.etree.ElementTree as ElementTree


def outcomes(path):
    """Yields (test name, "passed" | "failed" | "skipped")."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        yield f"{path} ({error})", "failed"
        return
    for case in root.iter("testcase"):
        name = "::".join(filter(None, (case.get("classname"), case.get("name"))))
        if case.find("failure") is not None or case.find("error") is not None:
            yield name, "failed"
        elif case.find("skipped") is not None or case.get("status") in ("notrun", "disabled"):
            yield name, "skipped"
        else:
            yield name, "passed"


def main():
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for path in sys.argv[1:]:
        for name, outcome in outcomes(path):
            counts[outcome] += 1
            if outcome == "failed":
                print(f"failed: {name}")
    line = f"{counts['passed']} passed, {counts['failed']} failed"
    if counts["skipped"]:
        line += f", {counts['skipped']} skipped"
    print(line)
    return 1 if counts["failed"] or not counts["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
