"""The one part of the build that pyproject.toml cannot say: the C kernels for CPUs.

They are optional: where no compiler is found the package installs without them and runs on PyTorch alone, which it says
once. The library uses no Python at all (it is called through ctypes), so an extension module is only the vehicle that
gets it compiled by `pip install`, into a wheel as well as in place for an editable install.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup

SOURCES = sorted(str(path) for path in Path("graftlm/kernels/native").glob("*.c"))

setup(
    ext_modules=[
        Extension(
            "graftlm.kernels.native._kernels",
            SOURCES,
            depends=sorted(
                str(path) for pattern in ("*.h", "*.inc") for path in Path("graftlm/kernels/native").glob(pattern)
            ),
            # Results are compared bit for bit: no compiler may fuse a product with the sum behind it.
            # Nobody reads errno or floating-point exceptions: without them square roots and comparisons become vector code.
            extra_compile_args=[
                "-std=c11",
                "-O3",
                "-g0",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-fvisibility=hidden",
            ],
            extra_link_args=["-pthread"] if sys.platform.startswith("linux") else [],
            optional=True,
        )
    ]
)
