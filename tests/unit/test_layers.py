"""The layers of docs/design.md, kept by walking the imports: nothing imports upward, torch stays in one place."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY, APP = ROOT / "src" / "mshub", ROOT / "apps" / "mshub"

# Lowest first; a module may import those before it. Modules of one package count as one where only it is listed.
LIBRARY_LAYERS = (
    *(
        "errors",
        "atomic_file",
        "accounts",
        "audit_line",
        "label_rules",
        "dataset_json",
        "labels",
        "card_tables",
        "structures",
    ),
    *("model_card", "card_draft"),
    *("catalogue", "checksums", "sources", "model_layouts", "archive", "downloads", "http_file", "drive"),
    *("fetch", "store", "users", "logins", "throttle", "log_lines"),
    *("image_limits", "geometry", "image_file", "nifti", "itk_files", "dicom_series", "volume_io"),
    *("mr_sequences", "channel_series", "dicom_derived", "seg_frames", "dicom_seg", "contours", "dicom_rtstruct"),
    *("label_export", "corrections"),
    *("cases", "case_folders", "training_labels", "doubts", "scores", "recipe", "gate", "holdout"),
    *("orphans", "jobs", "lineage"),
    *("agreement", "volumes", "label_quality", "stopping", "uncertainty", "calibration", "selection"),
    *("case_schema", "case_database", "case_scores", "case_offers", "case_batches", "case_index"),
    *("report.contents", "report.words", "report.comparisons", "report.curves", "report.canvas", "report.slices"),
    "report.page",
    *("nnunet.pickle_limits", "nnunet.checkpoints", "nnunet.pieces", "nnunet.postprocessing", "nnunet.folder"),
    *("nnunet.kernels", "nnunet.half_precision", "nnunet.window_kernels", "nnunet.export_kernels"),
    *("nnunet.device_export", "nnunet.export"),
    *("nnunet.devices", "nnunet.window_sums", "nnunet.measures", "nnunet.deepest_features", "nnunet.sliding_window"),
    *("nnunet.openvino_library", "nnunet.network_agreement", "nnunet.openvino_conversion"),
    *("nnunet.openvino_network", "nnunet.cuda_network"),
    *("nnunet.resampling", "nnunet.body", "nnunet.preprocessing", "nnunet.lean_decoder", "nnunet.engine"),
    *("nnunet.network_cache", "nnunet.reading"),
    *("nnunet.image_cache", "nnunet.predictor", "nnunet.profile_figures"),
    *("nnunet.model_writing", "nnunet.v1_files", "nnunet.v1_network", "nnunet.v1_plans"),
    *("nnunet.v1_conversion", "nnunet.trusted", "nnunet.planning", "nnunet.training_set"),
    *("nnunet.label_warping", "nnunet.trainer"),
    *("evaluation", "bundled", "install", "round_report", "rounds", "worker", "serve", "console"),
    *("users_cli", "serve_cli", "cli", "__main__"),
)
APP_LAYERS = (
    *("lib.faults", "lib.audit", "lib.free_space", "lib.index_file", "lib.index_entries", "lib.index_journal"),
    "lib.indexed_folder",
    *("lib.label_note", "lib.label_folder", "lib.janitor", "lib.sessions", "lib.background", "lib.oidc_settings"),
    *("lib.conf", "lib.activity", "lib.digests", "lib.reviews", "lib.refused_labels", "lib.dataset_archive"),
    "lib.datastore",
    *("lib.pacs_session", "lib.pacs_errors", "lib.pacs_client", "lib.pacs_download", "lib.pacs_images"),
    *("lib.pacs_labels", "lib.pacs_receiving", "lib.pacs_sending", "lib.pacs", "lib.exports"),
    *("lib.infers", "lib.trainers", "lib.activelearning", "lib.warm_up", "lib.app", "lib.server", "main"),
)
PACKAGES = ("mshub", "mshub.nnunet", "mshub.report")  # hold modules, and no code of their own
TORCH = {"torch", "numba", "nnunetv2", "dynamic_network_architectures", "acvl_utils"}
TORCH |= {"batchgenerators", "batchgeneratorsv2"}
SERVER = {"monailabel", "monai", "fastapi", "starlette", "uvicorn"}

RUN = """
import mshub.cli
sys.argv = ["mshub", "{argument}"]
try:
    mshub.cli.main()
except SystemExit as end:
    assert not end.code
"""


def modules(folder: Path, prefix: str) -> dict[str, Path]:
    """Return dotted name -> file of every module under `folder`."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join([*([prefix] if prefix else []), *parts])] = path
    return found


LIBRARY_MODULES, APP_MODULES = modules(LIBRARY, "mshub"), modules(APP, "")
EVERY_MODULE = LIBRARY_MODULES | APP_MODULES


def imports(name: str) -> Iterator[str]:
    """Yield what a module imports, inside its functions too, as dotted names: ``from a import b`` is ``a.b``."""
    path = EVERY_MODULE[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def place(name: str, layers: tuple[str, ...], prefix: str = "") -> int | None:
    """Return the layer a dotted name is in: the longest listed name it begins with; None if it is in none."""
    inside = name.removeprefix(prefix)
    fitting = [layer for layer in layers if inside == layer or inside.startswith(f"{layer}.")]
    return layers.index(max(fitting, key=len)) if fitting else None


def owner(imported: str) -> str | None:
    """Return the module of ours that an imported name is or lives in."""
    parts = imported.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in names if name in EVERY_MODULE), None)


@pytest.mark.parametrize("name", [name for name in LIBRARY_MODULES if name not in PACKAGES])
def test_a_library_module_imports_only_lower_layers(name: str) -> None:
    own = place(name, LIBRARY_LAYERS, "mshub.")
    assert own is not None, f"{name} has no layer: give it its place in LIBRARY_LAYERS and in docs/design.md"
    for imported in imports(name):
        target = owner(imported)
        if target in (None, name, "mshub"):
            continue
        assert target in LIBRARY_MODULES, f"{name} imports {imported}: the library must not know the app"
        below = place(target, LIBRARY_LAYERS, "mshub.")
        assert below is not None, f"{name} imports the package {target}: import the module that is meant"
        assert below < own, f"{name} imports upward: {imported}"


@pytest.mark.parametrize("name", [name for name in APP_MODULES if name != "lib"])
def test_an_app_module_imports_only_lower_layers(name: str) -> None:
    own = place(name, APP_LAYERS)
    assert own is not None, f"{name} has no layer: give it its place in APP_LAYERS"
    for imported in imports(name):
        target = owner(imported)
        if target is None or target in LIBRARY_MODULES:
            continue
        below = place(target, APP_LAYERS)
        same_package = below == own and "." in APP_LAYERS[own]
        assert below is not None, f"{name} imports {imported}, which has no layer"
        assert below < own or same_package, f"{name} imports upward: {imported}"


def test_the_tables_list_no_module_that_is_gone() -> None:
    listed = [f"mshub.{layer}" for layer in LIBRARY_LAYERS] + list(APP_LAYERS)
    assert [layer for layer in listed if layer not in EVERY_MODULE] == []


@pytest.mark.parametrize("name", sorted(LIBRARY_MODULES))
def test_the_library_knows_no_server(name: str) -> None:
    assert {imported.split(".")[0] for imported in imports(name)} & SERVER == set()


@pytest.mark.parametrize("name", sorted(EVERY_MODULE))
def test_only_the_nnunet_package_knows_torch(name: str) -> None:
    if not name.startswith("mshub.nnunet."):
        assert {imported.split(".")[0] for imported in imports(name)} & TORCH == set()


def test_the_walk_sees_imports_inside_functions() -> None:
    assert "mshub.nnunet.predictor.PROFILES" in set(imports("mshub.cli"))
    assert "numpy.core.multiarray" in set(imports("mshub.nnunet.checkpoints"))


@pytest.mark.parametrize(
    "program",
    [
        "import mshub.catalogue; mshub.catalogue.Catalogue.load()",
        "import mshub.cli",
        RUN.format(argument="list"),
        RUN.format(argument="--help"),
    ],
    ids=["catalogue", "cli", "list", "help"],
)
def test_looking_at_models_does_not_load_torch(program: str, tmp_path: Path) -> None:
    heavy = sorted({*TORCH, *SERVER} - {"acvl_utils"})
    script = f"import sys\n{program}\nprint('loaded:', *[name for name in {heavy} if name in sys.modules])"
    environment = {**os.environ, "MSHUB_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "loaded:"
