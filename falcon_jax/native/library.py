"""The compiled kernels: made on this machine, for this machine, and known to XLA once loaded."""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

import jax
import jaxlib

from falcon_jax.wording import reason

TARGETS = ("FalconPointwiseDepthwise", "FalconConvolution", "FalconMaxPool", "FalconAlongAxis")
_SOURCE = pathlib.Path(__file__).with_name("convolution.cc")
_OPTIONS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared")


def library_path() -> pathlib.Path:
    """Return where the kernels for this source, jaxlib and processor stand, built or not."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "falcon_jax" / f"convolution-{_digest()}.so"


@functools.cache
def _digest() -> str:
    parts = (_SOURCE.read_bytes(), jaxlib.__version__.encode(), _processor().encode())
    return hashlib.blake2b(b"\0".join(parts), digest_size=8).hexdigest()


def is_built() -> bool:
    """Return whether `build` has compiled the kernels of this version for this machine.

    Returns:
        Whether the library stands in the user's cache; nothing is loaded.

    >>> isinstance(is_built(), bool)
    True
    """
    return library_path().is_file()


def build(*, compiler: str | None = None) -> pathlib.Path:
    """Compile the kernels for this machine; `falcon_jax.deploy` uses them from then on.

    They go to the user's cache (``$XDG_CACHE_HOME`` or ``~/.cache``); it takes half a minute. A new
    version of jaxlib or another processor asks for them to be built anew.

    Args:
        compiler: of C++17, such as ``g++`` or ``clang++``; ``$CXX`` or the first of these that is
            found, if not given.

    Returns:
        The library's path.

    Raises:
        ValueError: if there is no compiler, or it fails; the message has what it said.
    """
    path = library_path()
    found = _compiler(compiler)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = pathlib.Path(folder) / path.name
        include = f"-I{jax.ffi.include_dir()}"
        command = [found, *_OPTIONS, _TUNED, include, str(_SOURCE), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{found} could not compile the kernels: {done.stderr[-2000:]}")
        made.replace(path)
    return path


def load() -> bool:
    """Make the kernels known to XLA, if they are built; return whether they are.

    Raises:
        ValueError: if the library that was built cannot be loaded.
    """
    if not is_built():
        return False
    _register(_digest())
    return True


def serve() -> bool:
    """Return whether arrays are computed on a CPU for which the kernels are built."""
    return jax.default_backend() == "cpu" and load()


def multiplies_bfloat16() -> bool:
    """Return whether the kernels are built and this processor multiplies bfloat16 by tiles."""
    return load() and _register(_digest())


@functools.cache
def _register(digest: str) -> bool:
    """Make the kernels of this digest known: once in a process, wherever their library stands.

    Returns whether they take weights in bfloat16.
    """
    path = library_path()
    try:
        library = ctypes.cdll.LoadLibrary(str(path))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be loaded: {reason(error)}; remove it, or build it anew by `python -m "
            "falcon_jax build`."
        ) from error
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    has_tiles = library.FalconHasTiles
    has_tiles.restype = ctypes.c_bool
    return has_tiles()


_TUNED = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"


def _compiler(name: str | None) -> str:
    names = [name] if name else [os.environ.get("CXX") or "", "g++", "clang++", "c++"]
    for candidate in names:
        if candidate and shutil.which(candidate):
            return candidate
    looked = ", ".join(candidate for candidate in names if candidate)
    raise ValueError(
        f"no C++ compiler was found; looked for {looked}. Install one, or name it: "
        "`python -m falcon_jax build --compiler PATH`. Without it, models run in plain JAX."
    )


def _processor() -> str:
    """Return what tells processors with other instructions apart."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    known = ("flags", "Features", "model name")
    return "".join(dict.fromkeys(line for line in lines if line.startswith(known)))
