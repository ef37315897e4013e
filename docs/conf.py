"""Sphinx configuration: the Markdown pages of this folder, and the header through Doxygen (`make docs`)."""

import pathlib
import re
import subprocess

root = pathlib.Path(__file__).resolve().parent.parent
xml = root / "build" / "doxygen"

header = (root / "include/flashkda/flashkda.h").read_text(encoding="utf-8")
parts = dict(re.findall(r"#define FKDA_VERSION_(MAJOR|MINOR|PATCH) (\d+)", header))

project = "FlashKDA"
author = "FlashKDA contributors"
release = "{MAJOR}.{MINOR}.{PATCH}".format(**parts)

xml.mkdir(parents=True, exist_ok=True)
subprocess.run(
    ["doxygen", "-"],
    input=f"""
        PROJECT_NAME = FlashKDA
        INPUT = {root}/include/flashkda/flashkda.h
        OUTPUT_DIRECTORY = {xml}
        GENERATE_XML = YES
        GENERATE_HTML = NO
        GENERATE_LATEX = NO
        OPTIMIZE_OUTPUT_FOR_C = YES
        EXTRACT_ALL = YES
        MACRO_EXPANSION = YES
        EXPAND_ONLY_PREDEF = YES
        PREDEFINED = FKDA_API=
        QUIET = YES
        WARNINGS = NO
    """,
    text=True,
    check=True,
)

extensions = ["breathe", "myst_parser"]
breathe_projects = {"flashkda": str(xml / "xml")}
breathe_default_project = "flashkda"
breathe_domain_by_extension = {"h": "c"}
html_theme = "furo"
html_title = f"FlashKDA {release}"
exclude_patterns = ["requirements.txt"]
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
# Pages link to files of the repository that are no pages here (README.md, the header); an enum and its
# typedef have one name.
suppress_warnings = ["myst.xref_missing", "myst.header", "duplicate_declaration"]
