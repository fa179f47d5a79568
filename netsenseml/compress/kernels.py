"""The loops of ``loops`` as machine code: compiled once on a machine, kept in a file, and loaded
when this module is imported.

Numba takes most of a second to load, with what it keeps itself, and several to compile. So all that
it has made is one object file here, and a later process needs no more than LLVM's loader, which
takes some hundredths.

The loops run on one thread, without the interpreter's lock, and start no threads: a process that
has loaded them may fork.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import re
import secrets
import struct
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import llvmlite
import llvmlite.binding as llvm
import numpy as np

from netsenseml.compress import layout

Array: TypeAlias = np.ndarray[Any, Any]

_DIGEST_BYTES = 32
_PATIENCE_S = 60.0
"""So long a process waits for another one to compile; that may have been stopped."""


class Kernel:
    """A loop to call. It checks the types of arrays, and that they are contiguous; no more, such as
    that an index fits."""

    def __init__(self, address: int, signature: str) -> None:
        """signature: as Numba writes it, such as ``void(f4[::1], u4[:, ::1], i8)``."""
        self._run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
        found = re.findall(r"([iuf]\d)(\[.*?\])?", signature.partition("(")[2])
        self._parameters = [
            (np.dtype(kind), (dimensions.count(",") + 1) * bool(dimensions))
            for kind, dimensions in found
        ]
        # An array is its owner (twice, none), size, bytes of an element, address, and a size and a
        # stride for each dimension.
        places = [
            f"{5 + 2 * n}q" if n else "f4x" if kind == np.float32 else "q"
            for kind, n in self._parameters
        ]
        self._call = struct.Struct("=2q" + "".join(places))

    def __call__(self, *arguments: Any) -> int:
        places: list[Any] = [0, 0]
        for x, (kind, dimensions) in zip(arguments, self._parameters, strict=True):
            if not dimensions:
                places.append(x)
                continue
            if x.dtype != kind or x.ndim != dimensions or not x.flags.c_contiguous:
                raise TypeError(
                    f"not contiguous {kind} of {dimensions} dimensions: {x.dtype} {x.strides}"
                )
            address = ctypes.addressof(ctypes.c_char.from_buffer(x)) if x.size else 0
            places += (0, 0, x.size, kind.itemsize, address, *x.shape, *x.strides)
        call = ctypes.create_string_buffer(self._call.pack(*places), self._call.size)
        self._run(call)
        return int(_RESULT.unpack_from(call)[0])


_RESULT = struct.Struct("q")


def _load() -> dict[str, Kernel]:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    machine = target.create_target_machine(cpu=cpu, features=features, opt=3, jit=True)
    made_of = json.dumps(
        [machine.triple, cpu, features, _version("numba"), llvmlite.__version__, *_sources()]
    )
    name = f"netsenseml-kernels-{hashlib.blake2b(made_of.encode(), digest_size=8).hexdigest()}"
    signatures, code = kept(_directories(), name, machine)
    library = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
    for kernel in signatures:
        library.export_symbol(kernel)
    # On ARM the older linker may put code and its table of addresses too far apart.
    compiler = llvm.create_lljit_compiler(
        machine, use_jit_link=machine.triple.startswith(("aarch64", "arm64"))
    )
    found = library.link(compiler, "netsenseml")
    addresses = {kernel: found[kernel] for kernel in signatures}
    found.detach()  # they stay for ever: where a process ends, a thread may be in a kernel yet
    compiler.detach()
    return {
        kernel: Kernel(addresses[kernel], signature) for kernel, signature in signatures.items()
    }


def _sources() -> list[str]:
    """Digests of what the kernels are made of; where that cannot be read, as in a zip file, the
    version that stands for it."""
    try:
        paths = [Path(__file__).with_name(name) for name in ("kernels.py", "loops.py", "layout.py")]
        return [
            hashlib.blake2b(path.read_bytes(), digest_size=_DIGEST_BYTES).hexdigest()
            for path in paths
        ]
    except OSError:
        return [_version("netsenseml")]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # frozen, or run from a source tree
        return "unknown"


def _directories() -> list[Path]:
    """Where what was compiled may be kept: where Numba is told to, beside the modules, or in the
    user's cache."""
    told = [Path(given)] if (given := os.environ.get("NUMBA_CACHE_DIR")) else []
    found = [*told, Path(__file__).with_name("__pycache__")]
    with contextlib.suppress(RuntimeError):  # no home
        found.append(
            Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "netsenseml")
        )
    return found


def kept(directories: Sequence[Path], name: str, machine: Any) -> tuple[dict[str, str], bytes]:
    """What ``loops.build`` makes: from a file of the first directory that has it, or else compiled,
    and kept in the first one that can be written, if any can. Of processes that come at once, one
    compiles, and the others wait for it, but not for ever."""
    for directory in directories:
        if (found := _read(directory / name)) is not None:
            return found
    made = None
    for directory in directories:
        try:
            with _alone(directory):
                found = _read(directory / name)
                if found is None:
                    found = made = made or _compiled(machine)
                    _write(directory / name, made)
                return found
        except OSError:  # it cannot be written
            pass
    return made or _compiled(machine)


def _compiled(machine: Any) -> tuple[dict[str, str], bytes]:
    from netsenseml.compress import loops  # with Numba

    return loops.build(machine)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Raises OSError where nothing can be written."""
    directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK):
        raise PermissionError(directory)
    descriptor, began_s = os.open(directory, os.O_RDONLY), time.monotonic()
    try:
        while not _locked(descriptor) and time.monotonic() - began_s < _PATIENCE_S:
            time.sleep(0.02)
        yield
    finally:
        # a process that was forked off meanwhile has it open, too
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: more than one may compile
        pass
    return True


def _read(path: Path) -> tuple[dict[str, str], bytes] | None:
    """None if there is no such file, or not all of it."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, rest = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.blake2b(rest, digest_size=_DIGEST_BYTES).digest() != digest:
        return None
    signatures, _, code = rest.partition(b"\n")
    return json.loads(signatures), code


def _write(path: Path, made: tuple[dict[str, str], bytes]) -> None:
    signatures, code = made
    rest = json.dumps(signatures).encode() + b"\n" + code
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        draft.write_bytes(hashlib.blake2b(rest, digest_size=_DIGEST_BYTES).digest() + rest)
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


_kernels = _load()

select, kth_largest, keep_largest = (
    _kernels["select"],
    _kernels["kth_largest"],
    _kernels["keep_largest"],
)
scatter, scatter_add = _kernels["scatter"], _kernels["scatter_add"]
encode_positions, decode_positions = _kernels["encode_positions"], _kernels["decode_positions"]
decode_add_fp32 = _kernels["decode_add_fp32"]
encode_bf16, decode_add_bf16 = _kernels["encode_bf16"], _kernels["decode_add_bf16"]
encode_sign, decode_add_sign = _kernels["encode_sign"], _kernels["decode_add_sign"]
encode_levels = {
    (form, chance): _kernels[f"encode_levels_{form}_{chance}"]
    for form in layout.LEVELS
    for chance in (False, True)
}
decode_add_levels = {form: _kernels[f"decode_add_levels_{form}"] for form in layout.LEVELS}
