"""``python -m lib.server.launch start_server ...``: MONAI Label's own main, without its settings on the screen.

MONAI Label logs every option at INFO before it reads its logging configuration, and the addresses `mshub serve` printed
scroll away. It configures logging only where nobody has: this does.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
from functools import partial
from typing import NoReturn

import uvicorn
from monailabel.main import Main

from lib import background
from lib.conf import Config
from lib.janitor import own_temporary_folder
from lib.server.single import hold
from mshub.errors import MSHubError
from mshub.serve import check_exposure
from mshub.store import ModelStore

KEEP_ALIVE_S = 75
"""How long a connection stays open that nobody uses: longer than proxies keep theirs (60 s), as one that ends just as
a request is sent takes the request with it."""


def main() -> None:
    """Run MONAI Label's command line; a mistyped option is a sentence, not a trace from within the start."""
    logging.basicConfig(level=logging.WARNING)
    os.umask(os.umask(0) | 0o007)  # images, labels and logs are for this user and group
    # MONAI Label would import `lib` a second time for the app, and what is noted in one copy is unknown in the other.
    os.environ["MONAI_LABEL_RELOAD_APP_LIB"] = "false"
    arguments = Main().args_parser().parse_args()
    try:
        config = Config.parse(dict(arguments.conf or []))
        store = ModelStore(config.home)
        check_exposure(arguments.host, store.home, has_sign_on=config.oidc is not None)
        check_models(config, store)
        folder = config.data_folder(arguments.studies)
        if "://" in arguments.studies:
            folder.mkdir(parents=True, exist_ok=True)
        lock = hold(folder, arguments.studies)
    except MSHubError as error:
        sys.exit(f"mshub: {error}")
    # The web server ends itself by the signal that ended it; what is to be cleared away is, this way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    uvicorn.run = partial(uvicorn.run, timeout_keep_alive=KEEP_ALIVE_S)  # MONAI Label has no option for it
    try:
        with own_temporary_folder():
            Main().run()
    finally:
        background.end_all()
        if lock is not None:
            lock.release()


def check_models(config: Config, store: ModelStore) -> None:
    """Refuse to serve a model of which nobody knows; one that is only not installed yet can be while the server runs.

    Raises
    ------
    CatalogueError
        `models` names it; the message names similar ids.
    """
    for model in config.models:
        if not store.holds(model):
            store.catalogue().get(model)


def leave(code: int) -> NoReturn:
    """End the process once everything is in order, whatever threads are still at work.

    Python would take from under those what they use: libraries at work answer that with a trace, or abort.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        main()
    except SystemExit as ending:
        if not isinstance(ending.code, int):  # a sentence
            raise
        leave(ending.code)
    leave(0)
