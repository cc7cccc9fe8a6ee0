"""The whole day in a browser, with nothing but this checkout: a PACS with phantoms, the server, the viewer.

    make demo-ohif                            # installs what is missing, then runs this
    python demo/ohif.py --dicom DIR           # your own series too, every DICOM file below DIR

Orthanc runs on this machine only, keeps its objects in ``.mshub/demo-pacs`` and ends with the server.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

from orthanc import Orthanc, OrthancMissing

CHECKOUT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Run the demo until the server ends; return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=8000, help="port of the MSHub server")
    parser.add_argument("--pacs-port", type=int, default=8042, help="port of Orthanc")
    parser.add_argument("--dicom", type=Path, help="folder with series of your own to store in the PACS")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that Orthanc ends too
    home = Path(os.environ.get("MSHUB_HOME") or CHECKOUT / ".mshub")
    try:
        pacs = Orthanc(home / "demo-pacs", arguments.pacs_port)
    except (OrthancMissing, RuntimeError) as error:
        print(f"The demo needs Orthanc: {error}", file=sys.stderr)
        return 1
    with pacs:
        fill(pacs, home, arguments.dicom)
        print(f"PACS      {pacs.url} (Orthanc, this machine only)", flush=True)
        return serve(pacs, home, arguments.port)


def fill(pacs: Orthanc, home: Path, own: Path | None) -> None:
    """Store the phantoms as CT series, and the user's own files."""
    phantoms = home / "demo-series"
    if not phantoms.is_dir():
        script = CHECKOUT / "sample-data" / "generate.py"
        subprocess.run([sys.executable, str(script), "--dicom", str(phantoms)], check=True)
    pacs.upload(sorted(phantoms.rglob("*.dcm")))
    if own:
        pacs.upload(sorted(path for path in own.rglob("*") if path.is_file() and not path.name.startswith(".")))


def serve(pacs: Orthanc, home: Path, port: int) -> int:
    """Run the server on the PACS until it ends."""
    mshub = [sys.executable, "-m", "mshub"]
    environment = {**os.environ, "MSHUB_HOME": str(home)}
    if not (home / "models" / "starter").is_dir():
        subprocess.run([*mshub, "fetch", "starter"], env=environment, check=True)
    command = [*mshub, "serve", "--studies", pacs.dicomweb, "--port", str(port)]
    try:
        return subprocess.call(command, env=environment)
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
