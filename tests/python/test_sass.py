"""What the compiler made of the Hopper kernels, read from their machine code.

The build refuses register spills and serialised wgmma by what ptxas says. Here the instructions themselves are
looked at: tensor cores and copy engine are used, and nothing lies in local memory, arrays with a computed
index included, of which ptxas says nothing.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
KERNELS = pathlib.Path(os.environ.get("FLASHKDA_KERNELS", ROOT / "build/release/kernels"))
ENTRY_POINTS = (ROOT / "src/cuda/kernels/entry_points.txt").read_text().split()
WHEEL_BIN = pathlib.Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin"
NEEDED = {"HGMMA": "wgmma", "UTMALDG": "copies into shared memory"}
NEEDED_IN_PREFILL = {"UTMASTG": "copies out of shared memory"}
NEEDED_IN_PAIR = {"UBLKCP": "copies from block to block"}
FORBIDDEN = {"LDL": "loads from local memory", "STL": "stores to local memory"}


def parse(text):
    """{(architecture, entry point): [opcode, ...]} of what cuobjdump -sass prints."""
    functions, arch, opcodes = {}, None, None
    for line in text.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function : (\w+)", line):
            opcodes = functions.setdefault((arch, found[1]), [])
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", line):
            opcodes.append(found[1])
    return functions


def problems_of(entry, opcodes):
    needed = NEEDED | (NEEDED_IN_PREFILL if "_prefill_" in entry else {})
    needed |= NEEDED_IN_PAIR if "_pair" in entry else {}
    missing = [f"no {name} ({what})" for name, what in needed.items() if name not in opcodes]
    return missing + [
        f"{opcodes.count(name)} {name} ({what})" for name, what in FORBIDDEN.items() if name in opcodes
    ]


@pytest.fixture(scope="module")
def functions():
    fatbins = sorted((KERNELS / "sm90").glob("*.fatbin"))
    if not fatbins:
        pytest.skip(f"no kernels in {KERNELS}: built without nvcc")
    path = os.pathsep.join([str(WHEEL_BIN), os.environ.get("PATH", "")])
    tools = [shutil.which(name, path=path) for name in ("cuobjdump", "nvdisasm")]
    if not all(tools):
        pytest.skip("no cuobjdump and nvdisasm: tests/python/requirements.txt has them where NVIDIA does")
    found = {}
    for fatbin in fatbins:
        done = subprocess.run(
            [tools[0], "-sass", fatbin], capture_output=True, text=True, env={**os.environ, "PATH": path}
        )
        assert done.returncode == 0, done.stderr
        found |= parse(done.stdout)
    return found


def test_architecture(functions):
    """One copy of every entry point, for the one architecture that has these instructions."""
    listed = {name for name in ENTRY_POINTS if name.startswith("fkda_sm90_")}
    assert listed and set(functions) == {("sm_90a", name) for name in listed}


def test_instructions(functions):
    bad = {name: problems_of(name, opcodes) for (_, name), opcodes in functions.items()}
    assert not {name: problems for name, problems in bad.items() if problems}


LISTING = """
Fatbin elf code:
================
arch = sm_90a
\t\tFunction : fkda_sm90_prefill_a
        /*0000*/                   LDC R1, c[0x0][0x28] ;     /* 0x00000a00ff017b82 */
                                                              /* 0x000e640000000800 */
        /*0010*/              @!P0 UTMALDG.4D [UR8], [UR4] ;  /* 0x00000a00ff017b82 */
        /*0020*/             @UP1 UTMASTG.4D [UR8], [UR4] ;   /* 0x00000a00ff017b82 */
        /*0030*/                   HGMMA.64x32x16.F32.BF16 R24, R4, gdesc[UR4] ; /* 0x0 */
\t\tFunction : fkda_sm90_prefill_b
        /*0000*/              @P5 LDL.LU R2, [R1+0x4] ;       /* 0x00000a00ff017b82 */
"""


def test_listings_are_understood():
    functions = parse(LISTING)
    assert functions["sm_90a", "fkda_sm90_prefill_a"] == ["LDC", "UTMALDG", "UTMASTG", "HGMMA"]
    assert problems_of("fkda_sm90_prefill_a", functions["sm_90a", "fkda_sm90_prefill_a"]) == []
    assert len(problems_of("fkda_sm90_prefill_b", functions["sm_90a", "fkda_sm90_prefill_b"])) == 4
