"""Puts the native library and its ONNX Runtime into the wheel, from the installed tree that MACULA_PREFIX names."""

import os
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeLibrary(BuildHookInterface):
    def initialize(self, version, build_data):
        prefix = os.environ.get("MACULA_PREFIX")
        if not prefix:
            raise RuntimeError("MACULA_PREFIX must name a tree that `cargo xtask install` made; `cargo xtask wheel` does")
        prefix = Path(prefix)
        # A wheel holds no links: the library goes in under the name that it is loaded by.
        files = {prefix / "lib/libmacula.so.0": "macula/native/libmacula.so.0"}
        for folder, inside in [("lib/onnxruntime", "onnxruntime"), ("share/licenses/macula", "licenses")]:
            for path in (prefix / folder).rglob("*"):
                if path.is_file():
                    files[path] = f"macula/native/{inside}/{path.relative_to(prefix / folder)}"
        missing = [str(path) for path in files if not path.is_file()]
        if missing:
            raise RuntimeError(f"{', '.join(missing)} is not there")
        build_data["force_include"].update({str(path.resolve()): inside for path, inside in files.items()})
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_x86_64"
