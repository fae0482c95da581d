"""Compile the kernels of `source.py` once per processor, keep the machine code, and hand out functions.

The kept file is a header in JSON and an object file, and begins with their digest. Its name holds a hash of this
package's code, of the compiler's version and of the processor. So a file that is stale, foreign or damaged is never
run: the kernels are compiled again. It lies in NUMBA_CACHE_DIR if that is set, else in `__pycache__` here. Where
neither can be written the kernels live in memory. A process that finds the file imports llvmlite, but not numba.
"""

import ctypes
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from phasegate.base.errors import UserError
from phasegate.base.files import write_atomic

HERE = Path(__file__).parent
PLACE = HERE / "__pycache__"
DIGEST = hashlib.sha256().digest_size  # bytes at the beginning of the file
C_TYPES: dict[str, Any] = {"int64": ctypes.c_int64, "float64": ctypes.c_double}  # all else is an address
Kernel = Callable[..., None]


class Kernels:
    """Hold the kernels as functions of addresses and numbers, named as in `source.py`."""

    def __init__(self, functions: dict[str, tuple[str, list[str]]], code: bytes) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
        # All sections in one piece of memory: an emulator may map pieces too far apart for 32-bit addresses.
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine, use_lmm=True)
        self._code = code  # which the engine reads in place
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        for name, (symbol, types) in functions.items():
            arguments = [C_TYPES.get(kind, ctypes.c_void_p) for kind in types]
            prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *arguments)
            setattr(self, name, self._without_result(prototype(self._engine.get_function_address(symbol))))

    def __getattr__(self, name: str) -> Kernel:
        raise AttributeError(f"there is no kernel {name!r}")

    @staticmethod
    def _without_result(function: Any) -> Kernel:
        """Hide the two pointers of numba's calling convention, to a result and to an exception: there is neither."""
        spare = ctypes.create_string_buffer(8)
        address = ctypes.addressof(spare)

        def call(*arguments: float, _keep: Any = spare) -> None:
            function(address, address, *arguments)

        return call


@cache
def kernels() -> Kernels:
    """Load the kernels, or compile them (some seconds) and keep them if a folder can be written."""
    _keep_memory()
    processor, features = target()
    places = [Path(place) for place in (os.environ.get("NUMBA_CACHE_DIR"), PLACE) if place]
    sources = b"".join(path.read_bytes() for path in sorted(HERE.glob("[!.]*.py")))
    key = repr((sources, processor, features, version("numba"), version("llvmlite"))).encode()
    name = f"kernels-{hashlib.sha256(key).hexdigest()[:20]}.bin"
    for place in places:
        with suppress(OSError, ValueError):
            return Kernels(*_unpack((place / name).read_bytes()))
    functions, code = _compile(processor, features)
    header = json.dumps(functions).encode()
    content = len(header).to_bytes(8, "little") + header + code
    for place in places:
        with suppress(UserError):
            write_atomic(place / name, hashlib.sha256(content).digest() + content)
            break
    return Kernels(functions, code)


def _keep_memory() -> None:
    """Make glibc keep what is freed: the gradients of every step would be fresh pages, which cost much."""
    with suppress(AttributeError):  # another library of C
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def target() -> tuple[str, str]:
    """Return the name and the features of the processor; PHASEGATE_VECTORS=avx2 leaves AVX-512 out."""
    found = llvm.get_host_cpu_features()
    if os.environ.get("PHASEGATE_VECTORS") == "avx2":
        found = llvm.FeatureMap({name: on and "avx512" not in name for name, on in found.items()})
        return "haswell", found.flatten()
    return llvm.get_host_cpu_name(), found.flatten()


def _unpack(content: bytes) -> tuple[dict[str, tuple[str, list[str]]], bytes]:
    """Return the functions and the object file of a kept file; ValueError unless it is whole."""
    digest, content = content[:DIGEST], content[DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("not a whole file of kernels")
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def _compile(processor: str, features: str) -> tuple[dict[str, tuple[str, list[str]]], bytes]:
    from numba import config

    config.CPU_NAME, config.CPU_FEATURES = processor, features  # type: ignore[attr-defined]
    from phasegate.model.kernels.source import compile_all

    return compile_all()
