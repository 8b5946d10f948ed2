"""Builds the optional C++ extension fiun_fast._cpu; all else about the package is in pyproject.toml.

FIUN_FAST_CPU=0 leaves it out, FIUN_FAST_CPU=1 makes a failure to build it an error (for wheels). Without either, a
machine with no C++ compiler gets a package that works on the reference backend, and `fiun-fast doctor` says so.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CHOICE = os.environ.get("FIUN_FAST_CPU", "")

# The bits of each step are part of the contract: no contraction to fused multiply-adds, nothing of fast-math even if
# CXXFLAGS ask for it. The last two -fno change no result; they let the compiler vectorise what has selects.
ARITHMETIC = ["-fno-fast-math", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
GNU = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-pthread", *ARITHMETIC]
MSVC = ["/std:c++17", "/O2", "/fp:precise", "/EHsc"]
WINDOWS = sys.platform == "win32"


class BuildCpu(build_ext):
    """Says plainly what the package can do when the extension cannot be built."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link, or warn."""
        try:
            super().build_extension(ext)
        except Exception as error:
            if CHOICE == "1":
                raise
            self.warn(
                f"{ext.name} could not be built ({error}); fiun_fast works without it, on the slower reference backend. "
                "To have it, install a C++17 compiler (g++ or clang++) and install fiun_fast again."
            )


def extensions() -> list[Extension]:
    """The CPU extension, unless it is not wanted or pybind11 is missing."""
    if CHOICE == "0":
        return []
    try:
        import pybind11
    except ImportError:
        if CHOICE == "1":
            raise
        print("fiun_fast: pybind11 is not installed, so the cpu backend is left out", file=sys.stderr)
        return []
    root = Path(__file__).parent
    return [
        Extension(
            "fiun_fast._cpu",
            sources=sorted(str(path.relative_to(root)) for path in (root / "csrc" / "cpu").glob("*.cpp")),
            depends=sorted(str(path.relative_to(root)) for path in (root / "csrc").rglob("*.h")),
            include_dirs=[pybind11.get_include()],
            extra_compile_args=MSVC if WINDOWS else GNU,
            extra_link_args=[] if WINDOWS else ["-pthread"],
            language="c++",
            optional=CHOICE != "1",
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildCpu})
