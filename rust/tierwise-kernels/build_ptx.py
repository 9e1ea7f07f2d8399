"""Compiles src/cuda/kernels.cu to src/cuda/kernels.ptx with NVRTC; needs no GPU and no CUDA toolkit.

Usage: python build_ptx.py [--check] [path to libnvrtc.so]

NVRTC is looked for in the installed `nvidia` wheels (torch brings them), else where the loader finds it. `--check` writes nothing and
fails if the committed PTX is not what this NVRTC makes of the source.
"""

import ctypes
import re
import sys
from pathlib import Path

CUDA = Path(__file__).parent / "src" / "cuda"
OPTIONS = ("--gpu-architecture=compute_80", "--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false", "--std=c++17")
# The kernels use nothing newer than PTX 7.0; 8.0 is what every driver since CUDA 12.0 loads.
PTX_VERSION = "8.0"


def find_nvrtc() -> str:
    """Path of an NVRTC from the installed `nvidia` wheels, else the name the loader knows it by."""
    for folder in map(Path, sys.path):
        for path in sorted(folder.glob("nvidia/**/libnvrtc.so.*")):
            return str(path)
    return "libnvrtc.so"


def build(library: str) -> str:
    """The PTX of kernels.cu, compiled by the NVRTC at `library`."""
    nvrtc = ctypes.CDLL(library)
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(name: str, *args: object) -> int:
        return int(getattr(nvrtc, name)(*args))

    def checked(name: str, *args: object) -> None:
        if code := call(name, *args):
            raise SystemExit(f"{name}: {nvrtc.nvrtcGetErrorString(code).decode()}")

    def text(name: str) -> str:
        size = ctypes.c_size_t()
        checked(f"{name}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        checked(name, program, buffer)
        return buffer.value.decode()

    program = ctypes.c_void_p()
    source = (CUDA / "kernels.cu").read_bytes()
    checked("nvrtcCreateProgram", ctypes.byref(program), source, b"kernels.cu", 0, None, None)
    options = (ctypes.c_char_p * len(OPTIONS))(*(option.encode() for option in OPTIONS))
    code = call("nvrtcCompileProgram", program, len(OPTIONS), options)
    if log := text("nvrtcGetProgramLog").strip():
        print(log, file=sys.stderr)
    if code:
        raise SystemExit(f"nvrtcCompileProgram: {nvrtc.nvrtcGetErrorString(code).decode()}")
    return text("nvrtcGetPTX")


def tidy(ptx: str) -> str:
    """The PTX without the compiler's build number, with the version that old drivers load."""
    ptx = re.sub(r"\A(?://.*\n|\n)*", "", ptx)
    ptx = re.sub(r"^\.version .*$", f".version {PTX_VERSION}", ptx, count=1, flags=re.MULTILINE)
    ptx = re.sub(r"[ \t]+$", "", ptx, flags=re.MULTILINE)
    return f"// Made from kernels.cu by build_ptx.py: {' '.join(OPTIONS)}\n{ptx.strip()}\n"


def main() -> None:
    """Writes or checks kernels.ptx."""
    arguments = sys.argv[1:]
    check = "--check" in arguments
    libraries = [argument for argument in arguments if argument != "--check"]
    ptx = tidy(build(libraries[0] if libraries else find_nvrtc()))
    target = CUDA / "kernels.ptx"
    if not check:
        target.write_text(ptx)
    elif target.read_text() != ptx:
        raise SystemExit(f"{target} is out of date: run build_ptx.py")


if __name__ == "__main__":
    main()
