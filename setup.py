"""Adds the native kernels to the build: compiled with g++ or clang++ where there is one, left out otherwise.

Everything else is in pyproject.toml. A wheel with the library fits any Python 3 of its platform (the library uses
neither Python's nor PyTorch's ABI); a wheel without it fits every platform.
"""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("native_build", HERE / "hymba" / "csrc" / "build.py")
native_build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(native_build)


class BuildNative(build_ext):
    """Builds the one library; a failure is a warning, since the package works on plain PyTorch too."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}{native_build.SUFFIX}"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            native_build.build(target, Path(self.build_temp).resolve())
        except RuntimeError as error:
            print(f"warning: hymba is installed without its native kernels and will be slower on a CPU: {error}")
            self.distribution.native_missing = True

    def copy_extensions_to_source(self) -> None:
        if not getattr(self.distribution, "native_missing", False):
            super().copy_extensions_to_source()


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        if getattr(self.distribution, "native_missing", False):
            self.root_is_pure = True
            platform = "any"
        return "py3", "none", platform


setup(
    ext_modules=[Extension("hymba.ops.libhymba", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
