"""Install OHIF's published build for ``/viewer/``: fetched with npm, checked, unpacked whole or not at all.

python demo/install_viewer.py                 # into MSHUB_HOME/viewer/<version>
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from lib.server.viewer import OHIF_VERSION
from mshub.store import default_home

SHA512 = (
    "5997719a9986eeba85816f5924b71b82bdd70ad2e2d4a0cd3e831a798e4f3dee"
    "a3e06e1f8c48e393271933a0ba664d85f3b04ac457e9abe8dde715d907d13c10"
)
BUILD = "package/dist/"
WORTH_PACKING_BYTES = 4096


def main() -> int:
    """Install the viewer; return the exit status."""
    target = default_home() / "viewer" / OHIF_VERSION
    if (target / "index.html").is_file():
        return 0
    npm = shutil.which("npm")
    if npm is None:
        print(
            "npm was not found, which fetches OHIF. On Debian and Ubuntu: sudo apt-get install -y npm", file=sys.stderr
        )
        return 1
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        print(f"Installing OHIF {OHIF_VERSION} (50 MB) into {target} ...", flush=True)
        fetched = subprocess.run([npm, "pack", "--silent", f"@ohif/app@{OHIF_VERSION}"], cwd=work, check=False)
        archives = list(Path(work).glob("*.tgz"))
        if fetched.returncode or len(archives) != 1:
            print("npm could not fetch OHIF: see its message above.", file=sys.stderr)
            return 1
        found = hashlib.sha512(archives[0].read_bytes()).hexdigest()
        if found != SHA512:
            print(
                f"OHIF {OHIF_VERSION} came with the sha512 {found}; expected {SHA512}. Not installed.", file=sys.stderr
            )
            return 1
        unpack(archives[0], Path(work) / "build")
        (Path(work) / "build").replace(target)
    return 0


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the build, and nothing beside it."""
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix(BUILD)
            if not member.isfile() or name == member.name or ".." in Path(name).parts or name.endswith(".map"):
                continue
            content = tar.extractfile(member)
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is not None:
                write(path, content.read())


def write(path: Path, content: bytes) -> None:
    """Write a file, and beside it what browsers are sent of scripts and the like: a fifth of the bytes."""
    path.write_bytes(content)
    if path.suffix in (".js", ".css", ".wasm") and len(content) >= WORTH_PACKING_BYTES:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content, 6, mtime=0))


if __name__ == "__main__":
    sys.exit(main())
