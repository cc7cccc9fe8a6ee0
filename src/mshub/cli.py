"""The command line: ``mshub list | show | add | fetch | verify | predict | finetune | versions | promote`` and more.

Commands import what they need when they run: ``mshub list`` does not wait for torch.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

import mshub
from mshub.accounts import account, become, owner_to_become
from mshub.audit_line import tell_of_a_person
from mshub.catalogue import ModelCard
from mshub.console import (
    bytes_progress,
    epoch_progress,
    err,
    key_values,
    near,
    out,
    print_json,
    readable,
    tile_progress,
)
from mshub.errors import ConfigError, MSHubError, TrainingError
from mshub.serve_cli import serve
from mshub.store import ModelStore, ModelVersion
from mshub.users_cli import users_app

app = typer.Typer(
    help="nnU-Net models for OHIF and 3D Slicer: install them, predict with them, serve them. For research use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
CHANGING = ("add", "fetch", "promote", "rollback", "finetune", "users")
"""Commands that leave files a server uses."""
# What a version's record says of it, beside the card.
_RECORDED = [
    "channels",
    "configuration",
    "folds",
    "trainer",
    "reader",
    "licence",
    "origin",
    "created",
    "converted",
    "trusted",
]
app.add_typer(users_app, name="users")
app.command()(serve)
ModelId = Annotated[str, typer.Argument(metavar="ID", help="Model id; see `mshub list`.", show_default=False)]
EngineName = Annotated[
    str,
    typer.Option(
        envvar="MSHUB_ENGINE",
        help="On a CPU: torch (as nnU-Net, to the voxel), openvino, or auto: OpenVINO if installed.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run the command line; errors of ours are one sentence on stderr and exit code 1."""
    try:
        app()
    except MSHubError as error:
        _end(str(error))
    except PermissionError as error:
        _end(
            f"{error.filename or 'A file'} cannot be used ({error.strerror}): {account() or 'this account'} may not. "
            "MSHUB_HOME and all in it have to be of the account that the server runs as."
        )


def _end(reason: str) -> NoReturn:
    err.print(f"[bold red]mshub:[/] {escape(reason)}", soft_wrap=True)
    sys.exit(1)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="Log more, to stderr.")] = 0,
) -> None:
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, format="%(message)s", handlers=[RichHandler(console=err, show_path=False)])
    if version:
        out.print(f"mshub {mshub.__version__}")
        raise typer.Exit
    if context.invoked_subcommand in CHANGING:
        _act_as_owner(ModelStore().home)


def _act_as_owner(home: Path) -> None:
    """Go on as the account whose server's state `home` is, where root is at work: that server could not use root's."""
    owner = owner_to_become(home)
    if owner is None:
        return
    os.environ["MSHUB_HOME"] = str(home)  # by default it is in the account's own folder
    if become(*owner):
        err.print(f"[dim]as {escape(owner[2])}, whose {escape(str(home))} is[/]", soft_wrap=True)
    else:
        err.print(
            f"[yellow]{escape(str(home))} is {escape(owner[2])}'s, whose server may be unable to use what is made now: "
            "run this as that account.[/]",
            soft_wrap=True,
        )


# -- the catalogue and the store --------------------------------------------------------------------------------------


@app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List all models: what they see, how well, and whether they are installed here."""
    store = ModelStore()
    rows = [_summary(card, store) for card in store.catalogue()]
    if as_json:
        print_json(rows)
        return
    # No frame: with one, the titles have no room left in 80 columns.
    table = Table(title=f"Models ({escape(str(store.home))})", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("id", "title", "modality", "scans", "DSC", "weights"):
        table.add_column(heading, overflow="fold", no_wrap=heading != "title")
    for row in rows:
        dsc = "" if row["dsc"] is None else f"{row['dsc']:.2f}"
        weights = f"[green]here ({row['version']})[/]" if row["installed"] else row["status"]
        table.add_row(row["id"], escape(row["title"]), row["modality"], row["training_scans"] or "", dsc, weights)
    out.print(table)


@app.command()
def show(model_id: ModelId, as_json: AsJson = False) -> None:
    """Show everything known about one model."""
    store = ModelStore()
    card = store.catalogue().get(model_id)
    facts = {**card.model_dump(mode="json", exclude_none=True), **_summary(card, store)}
    if facts["installed"]:
        record = store.current(model_id).record
        facts.update({key: record[key] for key in _RECORDED if key in record})
    if as_json:
        print_json(facts)
        return
    table = Table(show_header=False, title=escape(card.title), title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        if value not in (None, [], {}, ""):
            table.add_row(f"[bold]{key}[/]", escape(readable(value)))
    out.print(table)


@app.command()
def add(
    model_id: ModelId,
    path: Annotated[
        Path,
        typer.Argument(
            help="Folder or zip with an nnU-Net model, v2 or v1; or v1 weights whose card has a [plan].",
            show_default=False,
        ),
    ],
    card: Annotated[Path | None, typer.Option(help="Card (TOML) of your own model.")] = None,
    root: Annotated[str | None, typer.Option(help="Which model inside PATH, where there are several.")] = None,
    origin: Annotated[
        str | None, typer.Option("--from", help="Where you have it from (an address, a name), for the record.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="Its terms of use, for the record.")] = None,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="Run the Python code in its files, once, now, with your rights. For makers you trust only; what is "
            "kept are weights and plain values. Without it, files that need it are refused.",
        ),
    ] = False,
    engine: EngineName = "auto",
) -> None:
    """Install a model from a folder or zip; an id that is not in the catalogue makes it your own model."""
    from mshub.install import add_model, origin_of

    if trust:
        err.print(
            f"[bold yellow]--trust:[/] code inside {escape(str(path))} may run on this computer with your rights.",
            soft_wrap=True,
        )
    store = ModelStore()
    version = add_model(
        store,
        model_id,
        path,
        card_path=card,
        root=root,
        origin=origin_of(path, origin),
        licence=licence,
        trust=trust,
    )
    tell_of_a_person(store.home, "mshub add", model=model_id, version=version.version, trust=trust)
    _report_installed(version, engine)


@app.command()
def fetch(model_id: ModelId, engine: EngineName = "auto") -> None:
    """Download a model's weights and install them."""
    from mshub.install import fetch_model

    store = ModelStore()
    with bytes_progress() as progress:
        task = progress.add_task(model_id, total=None, visible=False)
        version = fetch_model(
            store,
            model_id,
            lambda done, total: progress.update(task, completed=done, total=total, visible=True),
        )
    tell_of_a_person(store.home, "mshub fetch", model=model_id, version=version.version)
    _report_installed(version, engine)


@app.command()
def verify(
    model_id: ModelId,
    version: Annotated[str | None, typer.Option(help="Default: the current one.")] = None,
    bench: Annotated[
        list[Path],
        typer.Option(
            metavar="IMAGE",
            help="Measure what each profile costs and gives on this image; once per channel, in the model's order.",
        ),
    ] = [],  # noqa: B006 -- typer's way to have none by default
    device: Annotated[str, typer.Option(help="Of --bench: auto, cpu, cuda, cuda:1...")] = "auto",
    engine: EngineName = "auto",
) -> None:
    """Compare an installed model with the checksums recorded when it was installed; measure its profiles."""
    checked = ModelStore().verify(model_id, version)
    out.print(f"{checked.model_id} {checked.version}: all {len(checked.record['files'])} files are as installed.")
    if bench:
        _report_profiles(checked, bench, device, _runtime(engine))


def _report_profiles(version: ModelVersion, images: list[Path], device: str, runtime: str) -> None:
    from mshub.nnunet.folder import ModelFolder
    from mshub.nnunet.network_cache import NetworkCache
    from mshub.nnunet.predictor import PROFILES, NNUNetPredictor, PredictOptions
    from mshub.nnunet.profile_figures import profile_figures

    options = PredictOptions(device=device, rules=version.card.input_rules, runtime=runtime)
    cache = NetworkCache(kept=ModelStore().prepared_networks)
    predictor = NNUNetPredictor(ModelFolder.open(version.model_path), cache)
    table = Table("profile", "seconds", "memory, MB", "Dice with accurate", "lowest")
    with err.status(f"measuring {', '.join(PROFILES)} ..."):
        for figures in profile_figures(predictor, images, options):
            mean = "" if figures.mean_dice is None else f"{figures.mean_dice:.4f}"
            lowest = "" if figures.worst is None else f"{escape(figures.worst[0])} {figures.worst[1]:.4f}"
            table.add_row(figures.profile, f"{figures.seconds:.1f}", f"{figures.memory_mb:.0f}", mean, lowest)
    out.print(table)


@app.command()
def versions(model_id: ModelId, as_json: AsJson = False) -> None:
    """List the versions of a model, where they come from and what the gate said; the current one serves."""
    from mshub.lineage import rounds

    store = ModelStore()
    found = store.versions(model_id)
    current = store.current(model_id).version if model_id in store.installed() or not found else None
    rows = [
        {**row, "current": row["version"] == current, "origin": version.record["origin"]}
        for row, version in zip(rounds(store, model_id), found, strict=True)
    ]
    if as_json:
        print_json(rows)
        return
    table = Table("version", "serves", "created", "parent", "origin", "hold-out Dice", "gate", box=None)
    for row in rows:
        table.add_row(
            row["version"],
            "yes" if row["current"] else "",
            row["created"][:16].replace("T", " "),
            row["parent"] or "",
            escape(readable({key: value for key, value in row["origin"].items() if key != "sha256"})),
            "" if row["mean_dice"] is None else f"{row['mean_dice']:.4f} ({row['held_out']})",
            row["outcome"] or "",
        )
    out.print(table)


@app.command()
def promote(
    model_id: ModelId,
    version: Annotated[str, typer.Argument(help="Version to serve, such as v2.", show_default=False)],
    reason: Annotated[str, typer.Option(help="Why; kept in the model's history.")] = "promoted by hand",
) -> None:
    """Make a version the current one; a running server switches with its next request."""
    store = ModelStore()
    chosen = store.promote(model_id, version, reason)
    tell_of_a_person(store.home, "mshub promote", model=model_id, version=chosen.version)
    out.print(f"{model_id} now serves {chosen.version}.")


@app.command()
def rollback(model_id: ModelId) -> None:
    """Go back to the version that served before the last promotion."""
    store = ModelStore()
    chosen = store.rollback(model_id)
    tell_of_a_person(store.home, "mshub rollback", model=model_id, version=chosen.version)
    out.print(f"{model_id} now serves {chosen.version} again.")


# -- prediction -------------------------------------------------------------------------------------------------------


@app.command()
def predict(
    model_id: ModelId,
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE...", help="NIfTI, NRRD, MetaImage or DICOM folder; one per channel, in the model's order."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Label file (.nii.gz, .nii, .nrrd, .dcm) or a folder for it.")
    ],
    format: Annotated[
        str, typer.Option(help="Of a .dcm file: seg or rtstruct, for an image that is a DICOM folder.")
    ] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1...")] = "auto",
    profile: Annotated[
        str, typer.Option(help="accurate (nnU-Net's own settings), balanced (no mirroring) or fast.")
    ] = "accurate",
    folds: Annotated[str, typer.Option(help="Comma-separated; default: all the model has.")] = "",
    engine: EngineName = "auto",
    probabilities: Annotated[
        list[str],
        typer.Option(metavar="STRUCTURE", help="Write its probability too, beside the label; may be repeated."),
    ] = [],  # noqa: B006 -- typer's way to have none by default
) -> None:
    """Segment one case and write the label on the image's own grid."""
    from mshub.nnunet.folder import ModelFolder
    from mshub.nnunet.network_cache import NetworkCache
    from mshub.nnunet.predictor import PROFILES, NNUNetPredictor, PredictOptions
    from mshub.volume_io import write_volume

    if profile not in PROFILES:
        raise ConfigError(f"The profile {profile!r} is unknown: expected one of {', '.join(PROFILES)}.")
    store = ModelStore()
    version = store.current(model_id)
    target = _label_path(output, images, format)
    stack = _dicom_series(images[0]) if format else None
    options = PredictOptions(
        PROFILES[profile],
        tuple(fold.strip() for fold in folds.split(",") if fold.strip()),
        device,
        version.card.input_rules,
        _runtime(engine),
        probabilities=tuple(dict.fromkeys(probabilities)),
    )
    with tile_progress() as progress:
        task = progress.add_task(f"{model_id} {version.version}", total=None)
        predictor = NNUNetPredictor(ModelFolder.open(version.model_path), NetworkCache(kept=store.prepared_networks))
        prediction = predictor.predict(
            images, options, lambda done, total: progress.update(task, completed=done, total=total)
        )
    labels = prediction.labels
    if stack is None:
        write_volume(target, labels.array_xyz, labels.grid)
    else:
        from mshub.dicom_derived import Algorithm, Facts
        from mshub.label_export import export_labels

        facts = Facts.of_model(Algorithm(model_id, version.version), overrides=version.card.structures)
        export_labels(target, format, labels.array_xyz, prediction.names, stack, facts)
    for name, array_xyz in prediction.probabilities.items():
        write_volume(_probability_path(target, name), array_xyz, labels.grid)
    _report_prediction(prediction, target)


def _probability_path(target: Path, name: str) -> Path:
    """Return where the probability of a structure goes: beside the label, named after both."""
    stem = target.name
    for ending in (".nii.gz", ".nii", ".nrrd", ".dcm"):
        stem = stem.removesuffix(ending)
    plain = "".join(sign if sign.isalnum() or sign in "-_" else "_" for sign in name)
    return target.with_name(f"{stem}_probability_{plain}.nii.gz")


def _runtime(engine: str) -> str:
    from mshub.nnunet.engine import RUNTIMES

    if engine not in RUNTIMES:
        raise ConfigError(f"The engine {engine!r} is unknown: expected one of {', '.join(RUNTIMES)}.")
    return engine


def _dicom_series(image: Path) -> Any:
    """Return the series a DICOM label will refer to; checked before anything is computed."""
    from mshub.dicom_derived import check_identified
    from mshub.dicom_series import read_stack

    if not image.is_dir():
        raise ConfigError(
            "--format makes a DICOM object, which refers to the slices it was made from. Found the image "
            f"{image.name}; expected the folder of a DICOM series. Give that, or leave --format out."
        )
    stack = read_stack(image)
    check_identified(stack, "a DICOM object")
    return stack


def _label_path(output: Path, images: list[Path], format: str) -> Path:
    """Return the file to write; checked before anything is computed."""
    endings: tuple[str, ...] = (".nii.gz", ".nii", ".nrrd")
    if format not in ("", "seg", "rtstruct"):
        raise ConfigError(f"--format is {format!r}; expected seg or rtstruct, or nothing for {', '.join(endings)}.")
    if output.suffix == ".dcm" and not format:
        raise ConfigError(f"-o {output} can be two kinds of DICOM: add --format seg or --format rtstruct.")
    if output.is_dir() and format:
        return output / f"{images[0].name}_{format}.dcm"
    endings = (".dcm",) if format else endings
    if output.is_dir():
        stem = images[0].name
        for ending in (*endings, ".mha", ".mhd"):
            stem = stem.removesuffix(ending)
        return output / f"{stem}_label.nii.gz"
    if not output.name.endswith(endings):
        raise ConfigError(f"-o {output} is neither an existing folder nor a file ending in {', '.join(endings)}.")
    if output.resolve() in [image.resolve() for image in images]:
        raise ConfigError(f"-o {output} is the image itself: choose another name for the label.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The folder of -o {output} cannot be made ({error}). Choose another one.") from error
    return output


def _report_prediction(prediction: Any, target: Path) -> None:
    millilitres = float(abs(_determinant(prediction.labels.grid.affine_ras))) / 1000.0
    table = Table("value", "structure", "voxels", "ml")
    for name, voxels in prediction.voxel_counts().items():
        table.add_row(str(prediction.names[name]), escape(name), f"{voxels}", f"{voxels * millilitres:.1f}")
    out.print(table)
    seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in prediction.seconds.items())
    out.print(
        f"{escape(str(target))}  ({seconds}; {prediction.provenance['device']}, {prediction.provenance['runtime']})",
        soft_wrap=True,
    )


def _determinant(affine: Any) -> Any:
    import numpy as np

    return np.linalg.det(affine[:3, :3])


# -- training ---------------------------------------------------------------------------------------------------------


@app.command()
def finetune(
    model_id: ModelId,
    images: Annotated[
        Path, typer.Option(help="Folder of images: case.nii.gz, or case_0000.nii.gz, case_0001.nii.gz per channel.")
    ],
    labels: Annotated[
        Path, typer.Option(help="Folder of reviewed labels, case.nii.gz; a dataset.json there names the integers.")
    ],
    epochs: Annotated[int | None, typer.Option(help="Epochs to train.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Steps per epoch.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate at its peak.")] = None,
    guard: Annotated[str | None, typer.Option(help="Against forgetting: distil, interpolate, both or none.")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of the recipe; repeatable.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1...")] = "auto",
) -> None:
    """Make a better version of a model from reviewed cases; a gate on held-out cases decides whether it serves.

    A model that is only announced is planned by nnU-Net and trained from scratch. Ctrl+C stops; the same command goes
    on where it was.
    """
    from mshub.case_folders import cases_from_folders, read_dataset_json
    from mshub.jobs import JobRequest, Jobs
    from mshub.recipe import FROM_SCRATCH, Recipe

    store = ModelStore()
    if model_id not in store.catalogue() and not store.versions(model_id):
        store.catalogue().get(model_id)  # raises, and names similar ids
    parent = store.current(model_id) if model_id in store.installed() else None
    cases = cases_from_folders(images.resolve(), labels.resolve(), parent.record["labels"] if parent else None)
    options = {"epochs": epochs, "iterations": iterations, "learning_rate": learning_rate, "guard": guard}
    further = key_values("--recipe", recipe or [], "averaging=0.2")
    chosen = Recipe.from_options({**options, **further}, Recipe() if parent else FROM_SCRATCH)
    dataset = None if parent else read_dataset_json(labels.resolve())
    request = JobRequest(
        model_id, parent.version if parent else None, tuple(cases), chosen, device, dataset, client="mshub finetune"
    )
    job = Jobs(store.home).create(request)
    out.print(
        f"{model_id}: {len(cases)} reviewed cases, "
        + (f"continuing {parent.version}" if parent else "a new model planned by nnU-Net")
        + f". Log: {escape(near(job.path / 'log.txt'))}",
        soft_wrap=True,
    )
    tell_of_a_person(store.home, "mshub finetune", model=model_id, job=job.id)
    job.spawn()
    _report_round(store, model_id, _follow(job))


def _follow(job: Any) -> dict[str, Any]:
    """Show a job's progress until it ends; Ctrl+C asks it to stop and waits for it."""
    import time

    from mshub.jobs import OPEN

    with epoch_progress() as bar:
        task = bar.add_task("starting", total=None)
        while True:
            try:
                progress = job.progress()
                if progress["state"] not in OPEN:
                    return dict(progress)
                total, epoch = progress.get("total_epochs"), progress.get("epoch")
                bar.update(task, description=progress.get("stage") or "starting", total=total, completed=epoch or 0)
                time.sleep(0.5)
            except KeyboardInterrupt:
                job.ask_to_stop()


def _report_round(store: ModelStore, model_id: str, progress: dict[str, Any]) -> None:
    if progress["state"] != "done":
        raise TrainingError(progress.get("message") or f"The training ended as {progress['state']}; see its log.")
    version = progress["version"]
    lineage = store.version(model_id, version).record["lineage"]
    colour = {"promoted": "green", "refused": "red"}.get(progress["outcome"], "yellow")
    out.print(f"[bold]{model_id} {version}[/]: [bold {colour}]{progress['outcome']}[/]")
    for reason in lineage["verdict"]["reasons"]:
        out.print(f"  - {escape(reason.replace('ID VERSION', f'{model_id} {version}'))}", soft_wrap=True)
    if progress.get("report"):
        out.print(f"  report: {escape(near(store.home / progress['report']))}", soft_wrap=True)


# -- shared -----------------------------------------------------------------------------------------------------------


def _summary(card: ModelCard, store: ModelStore) -> dict[str, Any]:
    current = store.current(card.id) if card.id in store.installed() else None
    return {
        "id": card.id,
        "title": card.title,
        "modality": card.modality,
        "target": card.target,
        "status": card.status,
        "training_scans": card.training_scans,
        "dsc": card.dsc,
        "installed": current is not None,
        "version": current.version if current else None,
        "labels": list(current.record["labels"]) if current else list(card.labels or ()),
    }


def _report_installed(version: ModelVersion, engine: str) -> None:
    names = ", ".join(version.record["labels"])
    out.print(f"[green]{version.model_id} {version.version}[/] is installed: {escape(names)}.", soft_wrap=True)
    out.print(f"Licence: {escape(version.record['licence'] or 'unknown; note it with --licence')}.", soft_wrap=True)
    for name in version.record.get("trusted", []):
        out.print(
            f"[yellow]Code in {escape(name)} was run, as asked; the installed file holds none.[/]", soft_wrap=True
        )
    if version.version != ModelStore().current(version.model_id).version:
        out.print(f"Another version is serving; switch with `mshub promote {version.model_id} {version.version}`.")
    if _runtime(engine) != "torch":
        _prepare_engine(version)


def _prepare_engine(version: ModelVersion) -> None:
    """Let OpenVINO prepare a new version where it is installed, and say if it cannot."""
    from mshub.nnunet.engine import prepare_openvino
    from mshub.nnunet.folder import ModelFolder
    from mshub.nnunet.openvino_library import is_installed

    if not is_installed():
        return
    with err.status("comparing OpenVINO with torch ..."):
        reason = prepare_openvino(ModelFolder.open(version.model_path), ModelStore().prepared_networks)
    out.print(
        f"[yellow]On a CPU torch will run it:[/] {escape(reason)}" if reason else "On a CPU OpenVINO will run it.",
        soft_wrap=True,
    )
