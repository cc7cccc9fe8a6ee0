"""``mshub serve``: what it is given is checked first, then it says where to look, then the server's process starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer
from rich.markup import escape

import mshub
from mshub import serve as server
from mshub.accounts import owner_to_become
from mshub.audit_line import tell_of_a_person
from mshub.console import key_values, near, out, this_command
from mshub.errors import ConfigError
from mshub.store import ModelStore
from mshub.users import user_file

SAMPLES = "sample-studies"
"""Folder under MSHUB_HOME where the working copy of the sample data is."""


def serve(
    studies: Annotated[str | None, typer.Option(help="Folder of images, or address of a DICOMweb server.")] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Serve a working copy of the sample data.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for the whole network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    conf: Annotated[list[str] | None, typer.Option(help="KEY=VALUE option of the app; repeatable.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate (chain) in PEM: the server speaks HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's key in PEM.")] = None,
    log_format: Annotated[str, typer.Option(help="Lines of the log: text, or json for programs.")] = "text",
    oidc_issuer: Annotated[
        str | None,
        typer.Option(
            envvar="MSHUB_OIDC_ISSUER",
            help="Single sign-on: address of the OpenID Connect provider, exactly as it names itself.",
        ),
    ] = None,
    oidc_client_id: Annotated[str | None, typer.Option(help="What this server is called there.")] = None,
    oidc_client_secret_file: Annotated[str | None, typer.Option(help="File with this server's secret there.")] = None,
    oidc_public_url: Annotated[
        str | None,
        typer.Option(help="This server's own address, as browsers see it; needed unless they are on this machine."),
    ] = None,
    oidc_role_claim: Annotated[
        str | None, typer.Option(help="Where the provider lists somebody's groups; default: groups.")
    ] = None,
    oidc_roles: Annotated[
        str | None,
        typer.Option(help="ROLE=GROUP,ROLE=GROUP; without it, only people whom `mshub users` knows may enter."),
    ] = None,
) -> None:
    """Start the MONAI Label server with all installed models."""
    if (studies is None) == (not sample):
        raise ConfigError("Say what to serve: either --studies DIR (or a DICOMweb address) or --sample.")
    sign_on = {
        "oidc_issuer": oidc_issuer,
        "oidc_client_id": oidc_client_id,
        "oidc_client_secret_file": oidc_client_secret_file,
        "oidc_public_url": oidc_public_url,
        "oidc_role_claim": oidc_role_claim,
        "oidc_roles": oidc_roles,
    }
    said = {key: value for key, value in sign_on.items() if value}
    options = {**said, **key_values("--conf", conf or [], "device=cpu")}
    home = options.pop("home", "")
    store = ModelStore(Path(home).expanduser() if home else None)
    if home:
        os.environ["MSHUB_HOME"] = str(store.home)  # what is said of `mshub` goes for the same one
    server.check_exposure(host, store.home, has_sign_on=bool(options.get("oidc_issuer")))
    server.check_address(host, port)
    owner = owner_to_become(store.home)
    if owner is not None:
        out.print(
            f"[bold yellow]{escape(str(store.home))} is {escape(owner[2])}'s, and a server of root's would leave files "
            "there that a server of that account cannot change: start it as one or the other.[/]",
            soft_wrap=True,
        )
    tls = _tls_files(tls_cert, tls_key)
    folder = _prepare_samples(store) if sample else _studies(str(studies))
    log_config = server.write_log_config(store.home, log_format)
    command = server.server_command(folder, host, port, options, log_config, tls)
    tell_of_a_person(store.home, "mshub serve", mshub=mshub.__version__, host=host, port=port)
    _announce(store, folder, host, port, "https" if tls else "http", options.get("oidc_issuer"))
    raise typer.Exit(server.run_server(command, server.server_environment(store.home)))


def _tls_files(cert: Path | None, key: Path | None) -> tuple[Path, Path] | None:
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise ConfigError("HTTPS needs both --tls-cert and --tls-key.")
    missing = [str(path) for path in (cert, key) if not path.is_file()]
    if missing:
        raise ConfigError(f"There is no file {missing[0]}; expected the server's certificate and key in PEM.")
    server.check_tls(cert, key)
    return cert.resolve(), key.resolve()


def _prepare_samples(store: ModelStore) -> str:
    from mshub.bundled import copy_samples

    if "starter" not in store.installed():
        from mshub.install import fetch_model

        installed = fetch_model(store, "starter")
        tell_of_a_person(store.home, "mshub fetch", model="starter", version=installed.version)
    folder = store.home / SAMPLES
    copy_samples(folder)
    return str(folder)


def _studies(studies: str) -> str:
    if "://" in studies:
        try:
            urlsplit(studies)
        except ValueError as error:
            raise ConfigError(
                f"--studies {studies} is no address ({error}). Expected a folder, or a DICOMweb service such as "
                "http://pacs:8042/dicom-web."
            ) from error
        return studies
    if not Path(studies).is_dir():
        raise ConfigError(
            f"--studies {studies} is no folder. Create it, put NIfTI, NRRD or MetaImage files in it, try again."
        )
    return str(Path(studies).resolve())


def _announce(store: ModelStore, studies: str, host: str, port: int, scheme: str, issuer: str | None) -> None:
    url = f"{scheme}://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    models = store.installed()
    out.print(f"[bold]MSHub {mshub.__version__}[/] serves {escape(studies)}", soft_wrap=True)
    out.print(
        f"  models           {', '.join(models) or 'none installed yet: see `mshub list`, `mshub add`'}", soft_wrap=True
    )
    out.print(f"  3D Slicer        MONAI Label module, server address [cyan]{url}[/]")
    out.print(f"  OHIF viewer      {_viewer(store, studies, url)}", soft_wrap=True)
    out.print(f"  API and status   [cyan]{url}/[/]  [cyan]{url}/mshub/status[/]")
    if example := _example(store, studies):
        out.print(f"  in a terminal    {this_command()} predict {escape(example)} -o label.nii.gz", soft_wrap=True)
    users = user_file(store.home).users()
    who = [f"{len(users)} user(s), who log in"] if users else []
    who += [f"people of {issuer}"] if issuer else []
    out.print(
        f"  access           {escape(' and '.join(who) or 'this machine only, no login')}; see {this_command()} users",
        soft_wrap=True,
    )
    if who and scheme == "http" and not server.is_loopback(host):
        out.print(
            "[bold yellow]  Passwords and images travel unencrypted: use --tls-cert and --tls-key, or a proxy that "
            "speaks HTTPS.[/]",
            soft_wrap=True,
        )
    out.print(
        f"  It is up when the last line says so; stop with Ctrl+C. Log: {escape(near(store.home))}/logs/server.log",
        soft_wrap=True,
    )


def _viewer(store: ModelStore, studies: str, url: str) -> str:
    """Return where OHIF is, or what it takes: it shows DICOM only."""
    if "://" not in studies:
        return "shows DICOM: needs the address of a PACS, --studies DICOMWEB-ADDRESS; try `make demo-ohif`"
    stock = f"MONAI Label's own: [cyan]{url}/ohif/[/]"
    if any((store.home / "viewer").glob("*/index.html")):
        return f"[cyan]{url}/viewer/[/]  ({stock})"
    return f"not installed yet: `make viewer`  ({stock})"


def _example(store: ModelStore, studies: str) -> str:
    """Return a model with one channel, the starter first, and what to try it on: a sample; others' stay unnamed."""
    models = [model for model in store.installed() if len(store.current(model).record["channels"]) == 1]
    if not models or "://" in studies:
        return ""
    samples = sorted(Path(studies).glob("*.nii.gz")) if Path(studies) == store.home / SAMPLES else []
    return f"{min(models, key=lambda model: model != 'starter')} {near(samples[0]) if samples else 'IMAGE.nii.gz'}"
