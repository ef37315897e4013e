"""The package alone: no torch, no NumPy, the right version, nothing but libc needed."""

import importlib.metadata
import pathlib
import re
import subprocess

import flash_kda

BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "numpy", "ml_dtypes"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
"""


def test_import_without_torch_or_numpy(run_python):
    printed = run_python(
        BLOCK
        + """
import flash_kda
assert "torch" not in sys.modules and "numpy" not in sys.modules
assert flash_kda.get_num_threads() >= 1
assert flash_kda.backends()[-1][:2] == ("reference", True)
assert flash_kda.get_workspace_size(100, 2) > 0
try:
    flash_kda.fwd(*[[1.0]] * 5, None, [1.0], None, None, None)
except TypeError as e:
    print(e)
"""
    )
    assert printed == "q: list, expected a tensor (torch, NumPy or DLPack)"


def test_import_does_not_import_them(run_python):
    assert (
        run_python("import flash_kda, sys; print('torch' in sys.modules, 'numpy' in sys.modules)")
        == "False False"
    )


def test_works_without_either(run_python):
    """A buffer that speaks only DLPack, in an interpreter that has neither library."""
    printed = run_python(
        BLOCK
        + """
import ctypes, flash_kda
class Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
                ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
                ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
                ("ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]
new = ctypes.pythonapi.PyCapsule_New
new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
class Buffer:
    def __init__(self, *shape, value=0.5):
        n = 1
        for x in shape: n *= x
        self.values = (ctypes.c_float * n)(*[value] * n)
        self.shape = (ctypes.c_int64 * len(shape))(*shape)
        self.tensor = Tensor(ctypes.addressof(self.values), 1, 0, len(shape), 2, 32, 1, self.shape, None, 0, None, None)
    def __dlpack_device__(self): return (1, 0)
    def __dlpack__(self, max_version=None): return new(ctypes.addressof(self.tensor), b"dltensor", None)
q, k, v, g = (Buffer(1, 3, 1, 8) for _ in range(4))
out = Buffer(1, 3, 1, 8, value=float("nan"))
flash_kda.fwd(q, k, v, g, Buffer(1, 3, 1), None, out, None, None, None)
print(all(0 < x < 1 for x in out.values))
"""
    )
    assert printed == "True"


def test_version_is_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+", flash_kda.__version__)
    header = pathlib.Path(__file__).parents[2] / "include/flashkda/flashkda.h"
    parts = re.findall(r"#define FKDA_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header.read_text())
    assert flash_kda.__version__ == ".".join(parts)
    try:
        installed = importlib.metadata.version("flash-kda")
    except importlib.metadata.PackageNotFoundError:
        return  # run from a build tree
    assert installed == flash_kda.__version__


def test_needs_only_libc():
    """Both binaries of the package name nothing but libc's parts (and each other)."""
    directory = pathlib.Path(flash_kda.__file__).parent
    binaries = [*directory.glob("*.so*")]
    assert [b.name for b in binaries if b.name.startswith("_C")] == ["_C.abi3.so"]
    for binary in binaries:
        listed = subprocess.run(
            ["readelf", "-d", binary], capture_output=True, text=True, check=True
        )
        needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", listed.stdout))
        # Sanitized builds of the tree also name their run-time library.
        needed = {n for n in needed if not re.match(r"lib(asan|ubsan|tsan|gcov)", n)}
        assert {re.sub(r"\.so.*", "", n) for n in needed} <= {
            "libc", "libm", "libpthread", "libflashkda", "ld-linux-x86-64", "ld-linux-aarch64",
        }, binary  # fmt: skip
