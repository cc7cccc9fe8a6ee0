"""Hostile sources for ``mshub add``: archives, folders, checkpoints, plans and pickles that mean harm.

Every attack is a function that writes its source at a `Scene` and returns the path to add. Each of them is a good model
but for the one thing it is named after. What would run leaves a file behind, the canary. `attempt` adds a source in a
process of its own, where memory and time are bounded, so that an attack that works ends a child and not the tests.
"""

from __future__ import annotations

import builtins
import codecs
import json
import multiprocessing
import os
import pickle
import shutil
import stat
import struct
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from factories import make_model_folder
from mshub.errors import MSHubError
from mshub.install import add_model
from mshub.model_layouts import V1, V2
from mshub.store import ModelStore
from v1_models import MODELS, v1_checkpoint, v1_weights, write_v1_folder

MIB = 2**20
MORE_MEMORY = 2048 * MIB  # what a child may map beyond what it has; an attack that works meets this
CPU_SECONDS = 8
WALL_SECONDS = 100
V1_MODEL = MODELS["anisotropic"]
CHECKPOINT = f"fold_0/{V2.final}"
V1_WEIGHTS = f"fold_0/{V1.final}"
V1_ABOUT = f"{V1_WEIGHTS}.pkl"
DOUBLINGS = 40  # 2**40 of anything is more than there is


@dataclass(frozen=True)
class Scene:
    """Where an attack takes place.

    Attributes
    ----------
    folder : Path
        Sources are written here.
    secret : Path
        A file outside of it, which no model may hold.
    canary : Path
        Exists once code of an attack has run.
    """

    folder: Path
    secret: Path
    canary: Path


@dataclass(frozen=True)
class Outcome:
    """How an attempt to add a source ended.

    Attributes
    ----------
    kind : str
        ``installed``, ``refused`` (by an error of MSHub's), ``escaped`` (by any other) or ``killed``.
    message : str
        Of the error, or by which signal the child ended.
    length : int
        Of the whole message: what is kept of it has an end.
    grown_mib : int
        Memory it took beyond what it started with.
    """

    kind: str
    message: str
    length: int = 0
    grown_mib: int = 0


Attack = Callable[[Scene], Path]


# -- trying it --------------------------------------------------------------------------------------------------------


def attempt(source: Path, home: Path, work: Path, temporary: Path) -> Outcome:
    """Add a source to the store in `home`, in a child with a working and a temporary folder of its own."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["pytest", "nibabel", "mshub.install"])  # imported once, for every child
    receiver, sender = processes.Pipe(duplex=False)
    child = processes.Process(target=_add, args=(source, home, work, temporary, sender))
    child.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(WALL_SECONDS) else Outcome("killed", "it never ended")
    except EOFError:
        child.join()
        return Outcome("killed", f"exit code {child.exitcode}")
    finally:
        child.kill()
        child.join()


def _add(source: Path, home: Path, work: Path, temporary: Path, result: Connection) -> None:
    os.chdir(work)
    os.environ["HOME"], tempfile.tempdir = str(work), str(temporary)
    before = _most_memory_mib()
    _limit()
    try:
        add_model(ModelStore(home), "stranger", source)
        kind, message = "installed", ""
    except MSHubError as error:
        kind, message = "refused", str(error)
    except BaseException as error:
        kind, message = "escaped", f"{type(error).__name__}: {error}"
    result.send(Outcome(kind, message[:5000], len(message), _most_memory_mib() - before))


def _most_memory_mib() -> int:
    import resource  # not on Windows, where these tests are skipped

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // MIB


def _limit() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    mapped = Path("/proc/self/statm")
    if mapped.exists():
        limit = int(mapped.read_text().split()[0]) * resource.getpagesize() + MORE_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


# -- what the attacks are made of -------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call


def shell(canary: Path) -> Calls:
    """Pickles as a command of the shell."""
    return Calls(os.system, f"touch {canary}")


def evaluation(canary: Path) -> Calls:
    """Pickles as an expression of Python."""
    return Calls(builtins.eval, f"open({str(canary)!r}, 'w').close()")


def good_model(scene: Scene, **options: Any) -> Path:
    """A model of nnU-Net v2."""
    return make_model_folder(scene.folder / "model", **options)


def good_v1_model(scene: Scene) -> Path:
    """A model of nnU-Net v1."""
    return write_v1_folder(scene.folder / "v1", V1_MODEL)


def good_zip(scene: Scene) -> Path:
    """A model of nnU-Net v2 in a zip."""
    return zipped(good_model(scene), scene.folder / "model.zip")


def zipped(model: Path, path: Path, more: Iterable[tuple[str | zipfile.ZipInfo, bytes]] = ()) -> Path:
    """Pack a folder and more members; returns `path`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name that occurs twice
        for file in sorted(model.rglob("*")):
            if file.is_file():
                out.write(file, f"model/{file.relative_to(model)}")
        for name, content in more:
            out.writestr(name, content)
    return path


def _zip_with(scene: Scene, *more: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    return zipped(good_model(scene), scene.folder / "evil.zip", more)


def _special(name: str, kind: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = (kind | 0o777) << 16
    return info


def _replaced(path: Path, old: bytes, new: bytes, count: int = -1) -> Path:
    before = path.read_bytes()
    path.write_bytes(before.replace(old, new, count))
    if path.read_bytes() == before:
        raise ValueError(f"{path.name} has no {old!r}")
    return path


def _with_json(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    return folder


def _with_plans(scene: Scene, change: Callable[[dict[str, Any]], Any]) -> Path:
    return _with_json(good_model(scene), "plans.json", change)


def _with_configuration(scene: Scene, **changes: Any) -> Path:
    return _with_plans(scene, lambda plans: plans["configurations"]["3d_fullres"].update(changes))


def _with_architecture(scene: Scene, **changes: Any) -> Path:
    return _with_plans(scene, lambda plans: plans["configurations"]["3d_fullres"]["architecture"].update(changes))


def _with_layers(scene: Scene, **changes: Any) -> Path:
    def change(plans: dict[str, Any]) -> None:
        plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].update(changes)

    return _with_plans(scene, change)


def _with_dataset(scene: Scene, **changes: Any) -> Path:
    return _with_json(good_model(scene), "dataset.json", lambda dataset: dataset.update(changes))


def _with_checkpoint(folder: Path, change: Callable[[dict[str, Any]], Any], name: str = CHECKPOINT, **how: Any) -> Path:
    checkpoint = torch.load(folder / name, weights_only=False)
    change(checkpoint)
    torch.save(checkpoint, folder / name, **how)
    return folder


def _with_weights(scene: Scene, make: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    def change(checkpoint: dict[str, Any]) -> None:
        checkpoint["network_weights"] = {name: make(old) for name, old in checkpoint["network_weights"].items()}

    return _with_checkpoint(good_model(scene), change)


def _with_records(scene: Scene, records: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """A model whose checkpoint is torch's zip, written by hand."""
    model = good_model(scene)
    with zipfile.ZipFile(model / CHECKPOINT, "w", method) as out:
        for name, content in {"version": b"3\n", "byteorder": b"little", **records}.items():
            out.writestr(f"archive/{name}", content)
    return model


def _with_members(scene: Scene, members: Mapping[str, bytes]) -> Path:
    """A model whose checkpoint has more in it than torch wrote."""
    model = good_model(scene)
    with zipfile.ZipFile(model / CHECKPOINT, "a") as out:
        for name, content in members.items():
            out.writestr(name, content)
    return model


def _with_pickle(folder: Path, name: str, change: Callable[[dict[str, Any]], Any], protocol: int = 4) -> Path:
    content = pickle.loads((folder / name).read_bytes())
    change(content)
    (folder / name).write_bytes(pickle.dumps(content, protocol))
    return folder


def _with_bytes(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder


def _text(characters: bytes) -> bytes:
    """A text, as protocol 2 writes it."""
    return b"X" + struct.pack("<I", len(characters)) + characters


def _laughs() -> Any:
    """Lists in lists, two in each: few bytes in a file, 2**40 as text."""
    value: Any = []
    for _ in range(DOUBLINGS):
        value = [value, value]
    return value


LAUGHING_KEY = b"\x80\x02})q\x00" + b"h\x00\x86q\x00" * DOUBLINGS + b"Ns."  # tuples in tuples, to be hashed


# -- zips -------------------------------------------------------------------------------------------------------------


def member_with_dots(scene: Scene) -> Path:
    """A member that would land beside the store."""
    return _zip_with(scene, ("model/../../../../../escaped.txt", b"evil"))


def member_with_dots_in_a_zip_in_a_folder(scene: Scene) -> Path:
    """The same, in a folder that holds nothing but the zip and a text."""
    folder = scene.folder / "drive"
    folder.mkdir()
    (folder / "README.txt").write_text("unpack me")
    member_with_dots(scene).rename(folder / "model.zip")
    return folder


def member_with_an_absolute_path(scene: Scene) -> Path:
    return _zip_with(scene, (str(scene.canary), b"evil"))


def member_with_a_drive_letter(scene: Scene) -> Path:
    return _zip_with(scene, ("C:/Windows/System32/evil.dll", b"evil"))


def member_with_a_backslash(scene: Scene) -> Path:
    return _zip_with(scene, ("..\\..\\evil.dll", b"evil"))


def member_that_is_a_link(scene: Scene) -> Path:
    return _zip_with(scene, (_special("model/LICENSE", stat.S_IFLNK), str(scene.secret).encode()))


def member_that_is_a_device(scene: Scene) -> Path:
    return _zip_with(scene, (_special("model/LICENSE", stat.S_IFCHR), b""))


def member_that_is_a_pipe(scene: Scene) -> Path:
    return _zip_with(scene, (_special("model/fold_1/checkpoint_final.pth", stat.S_IFIFO), b""))


def member_that_occurs_twice(scene: Scene) -> Path:
    return _zip_with(scene, ("model/plans.json", b"{}"))


def member_that_is_encrypted(scene: Scene) -> Path:
    source = _zip_with(scene)
    return _replaced(source, b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\1\0", 1)


def member_with_a_nul_in_its_name(scene: Scene) -> Path:
    return _replaced(_zip_with(scene, ("model/README.md?.exe", b"")), b"README.md?.exe", b"README.md\0.exe")


def member_with_another_name_in_its_header(scene: Scene) -> Path:
    """What comes before a member's bytes names another file than the zip's list does."""
    return _replaced(_zip_with(scene), b"model/plans.json", b"../../evil.json.", 1)


def too_many_members(scene: Scene) -> Path:
    return _zip_with(scene, *((f"model/{number}", b"") for number in range(10_000)))


def zip_that_announces_a_bomb(scene: Scene) -> Path:
    """Eighteen checkpoints of 4 GiB each."""
    size = b"\xfe\xff\xff\xff"
    source = _zip_with(scene, *((f"model/fold_{fold}/checkpoint_final.pth", bytes(99_991)) for fold in range(1, 19)))
    return _replaced(source, struct.pack("<I", 99_991), size)


def zip_that_lies_about_a_bomb(scene: Scene) -> Path:
    """50 MB that are announced as 99 bytes."""
    source = _zip_with(scene, ("model/fold_1/checkpoint_final.pth", bytes(50_000_001)))
    return _replaced(source, struct.pack("<I", 50_000_001), struct.pack("<I", 99))


def zip_of_zips(scene: Scene) -> Path:
    inner = good_zip(scene).read_bytes()
    (scene.folder / "empty").mkdir()
    return zipped(scene.folder / "empty", scene.folder / "zips.zip", ((f"{n}.zip", inner) for n in range(50)))


# -- folders ----------------------------------------------------------------------------------------------------------


def _linked(scene: Scene, name: str, target: Path) -> Path:
    model = good_model(scene)
    path = model / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(target)
    return model


def plans_that_are_a_link_to_etc(scene: Scene) -> Path:
    return _linked(scene, "plans.json", Path("/etc/passwd"))


def licence_that_is_a_link_to_a_secret(scene: Scene) -> Path:
    return _linked(scene, "LICENSE", scene.secret)


def checkpoint_that_is_a_link_to_a_secret(scene: Scene) -> Path:
    return _linked(scene, CHECKPOINT, Path("../../../../") / scene.secret.name)


def fold_that_is_a_link_to_the_disk(scene: Scene) -> Path:
    return _linked(scene, "fold_0", Path("/"))


def second_fold_that_is_a_link_to_the_disk(scene: Scene) -> Path:
    return _linked(scene, "fold_1", Path("/"))


def checkpoint_that_is_a_pipe(scene: Scene) -> Path:
    """Reading it would wait for ever."""
    model = good_model(scene)
    (model / CHECKPOINT).unlink()
    os.mkfifo(model / CHECKPOINT)
    return model


def plans_that_are_a_pipe(scene: Scene) -> Path:
    model = good_model(scene)
    (model / "plans.json").unlink()
    os.mkfifo(model / "plans.json")
    return model


def source_that_is_a_pipe(scene: Scene) -> Path:
    os.mkfifo(scene.folder / "model.zip")
    return scene.folder / "model.zip"


def source_without_end(scene: Scene) -> Path:
    return Path("/dev/zero")


def names_that_command_a_terminal(scene: Scene) -> Path:
    """The list of what was found would clear the screen and forge a line."""
    folder = scene.folder / "images"
    folder.mkdir()
    (folder / "\x1b[2Jscan\nstranger v1 is installed.nii").touch()
    return folder


# -- checkpoints that would run something -----------------------------------------------------------------------------


def shell_in_the_weights(scene: Scene) -> Path:
    return _with_checkpoint(
        good_model(scene), lambda checkpoint: checkpoint["network_weights"].update(more=shell(scene.canary))
    )


def shell_in_the_optimizer(scene: Scene) -> Path:
    state = {"state": {}, "param_groups": [shell(scene.canary)]}
    return _with_checkpoint(good_model(scene), lambda checkpoint: checkpoint.update(optimizer_state=state))


def shell_in_the_log(scene: Scene) -> Path:
    log = {"train_losses": [0.5, shell(scene.canary)]}
    return _with_checkpoint(good_model(scene), lambda checkpoint: checkpoint.update(logging=log))


def shell_in_the_arguments(scene: Scene) -> Path:
    return _with_checkpoint(
        good_model(scene), lambda checkpoint: checkpoint["init_args"].update(device=shell(scene.canary))
    )


def shell_in_the_second_fold(scene: Scene) -> Path:
    return _with_checkpoint(
        good_model(scene, folds=("0", "1")),
        lambda checkpoint: checkpoint.update(logging=shell(scene.canary)),
        "fold_1/checkpoint_final.pth",
    )


def shell_in_the_older_format(scene: Scene) -> Path:
    return _with_checkpoint(
        good_model(scene),
        lambda checkpoint: checkpoint.update(logging=shell(scene.canary)),
        _use_new_zipfile_serialization=False,
    )


def shell_in_a_zipped_model(scene: Scene) -> Path:
    return zipped(shell_in_the_log(scene), scene.folder / "model.zip")


def eval_in_a_checkpoint(scene: Scene) -> Path:
    return _with_checkpoint(good_model(scene), lambda checkpoint: checkpoint.update(logging=evaluation(scene.canary)))


def dotted_name_in_a_checkpoint(scene: Scene) -> Path:
    """``os.system``, by way of a module that is allowed to be named."""
    call = b"ctorch.serialization\nos.system\n" + _text(f"touch {scene.canary}".encode()) + b"\x85R."
    return _with_records(scene, {"data.pkl": b"\x80\x02" + call})


def checkpoint_that_refers_to_a_module(scene: Scene) -> Path:
    """A persistent id of torch's oldest format, which compares source files and writes a patch."""
    text = b"".join(map(_text, (b"module", b"evil.py", b"source")))
    return _with_records(scene, {"data.pkl": b"\x80\x02(" + text + b"tQ."})


def checkpoint_that_is_a_tar(scene: Scene) -> Path:
    """torch's oldest format is unpacked where it says."""
    model = good_model(scene)
    with tarfile.open(model / CHECKPOINT, "w") as out:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, str(scene.secret)
            out.addfile(info)
    return model


def checkpoint_with_a_member_elsewhere(scene: Scene) -> Path:
    return _with_members(scene, {"../../../../escaped.txt": b"evil"})


def checkpoint_that_is_a_program(scene: Scene) -> Path:
    """A TorchScript archive."""
    command = pickle.dumps(shell(scene.canary), protocol=2)
    return _with_records(scene, {"constants.pkl": command, "data.pkl": command, "code/__torch__.py": b"evil"})


# -- checkpoints that would fill memory, or never end -----------------------------------------------------------------


def weights_with_a_negative_offset(scene: Scene) -> Path:
    """Tensors that begin before their bytes."""
    return _with_weights(scene, lambda tensor: _view_of_four_numbers(-4096, tensor.shape))


def weights_beyond_their_bytes(scene: Scene) -> Path:
    """Tensors that end after their bytes."""
    return _with_weights(scene, lambda tensor: _view_of_four_numbers(2**20, tensor.shape))


def _view_of_four_numbers(offset: int, shape: torch.Size) -> Any:
    storage = torch.zeros(4)._typed_storage()
    stride = torch.empty(shape, device="meta").stride()
    return Calls(torch._utils._rebuild_tensor_v2, storage, offset, tuple(shape), stride, False, {})


def _wide(scene: Scene, make: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A model with 5 GB of weights, each of them what `make` makes of a tensor without bytes."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    model = _with_layers(scene, features_per_stage=[4, 6000, 6000])
    plans = json.loads((model / "plans.json").read_text())
    plan = plans["configurations"]["3d_fullres"]["architecture"]
    with torch.device("meta"):
        network = get_network_from_plans(*plan.values(), 1, 3, allow_init=False, deep_supervision=False)
    weights = {name: make(tensor) for name, tensor in network.state_dict().items()}
    return _with_checkpoint(model, lambda checkpoint: checkpoint.update(network_weights=weights))


def weights_that_are_one_number_repeated(scene: Scene) -> Path:
    """The tensors have the sizes of the plans, the file has four bytes."""
    return _wide(scene, lambda tensor: torch.zeros(1).expand(tensor.shape))


def weights_without_bytes(scene: Scene) -> Path:
    """Tensors of the ``meta`` device."""
    return _wide(scene, lambda tensor: tensor)


def weights_that_are_sparse(scene: Scene) -> Path:
    """Tensors that list what is not zero, which is nothing."""
    return _wide(scene, lambda tensor: torch.sparse_coo_tensor(size=tensor.shape, check_invariants=True))


def checkpoint_that_is_a_bomb(scene: Scene) -> Path:
    """torch stores and never compresses: 300 MiB of zeros here take 300 kB."""
    return _with_records(scene, {"data.pkl": pickle.dumps({}, 2) + bytes(300 * MIB)}, zipfile.ZIP_DEFLATED)


def checkpoint_with_compressed_weights(scene: Scene) -> Path:
    """The weights would be read as what the compressor wrote."""
    model = good_model(scene)
    with zipfile.ZipFile(model / CHECKPOINT) as stored:
        records = {name.partition("/")[2]: stored.read(name) for name in stored.namelist()}
    return _with_records(replace(scene, folder=scene.folder / "again"), records, zipfile.ZIP_DEFLATED)


def checkpoint_of_doublings(scene: Scene) -> Path:
    """Text that is encoded again and again, twice as long each time."""
    value: Any = Calls(codecs.encode, "x" * 1000, "latin1")
    for _ in range(24):
        value = Calls(codecs.encode, value, "hex")
    return _with_checkpoint(good_model(scene), lambda checkpoint: checkpoint.update(logging=value))


def checkpoint_whose_key_is_never_hashed(scene: Scene) -> Path:
    return _with_records(scene, {"data.pkl": LAUGHING_KEY})


def trainer_name_that_is_never_written(scene: Scene) -> Path:
    """The name of the trainer is lists in lists: the text for it has 2**40 brackets."""
    return _with_checkpoint(good_model(scene), lambda checkpoint: checkpoint.update(trainer_name=_laughs()))


def configuration_name_that_is_never_written(scene: Scene) -> Path:
    return _with_checkpoint(
        good_model(scene), lambda checkpoint: checkpoint["init_args"].update(configuration=_laughs())
    )


def weights_whose_values_are_hidden(scene: Scene) -> Path:
    """The dictionary says it is empty to whoever checks it."""

    class Hiding(OrderedDict[str, str]):
        def __reduce__(self) -> tuple[Any, ...]:
            return OrderedDict, (), {"values": set}, None, iter(self.items())

    def change(checkpoint: dict[str, Any]) -> None:
        checkpoint["network_weights"] = Hiding.fromkeys(checkpoint["network_weights"], "no tensor")

    return _with_checkpoint(good_model(scene), change)


def text_that_grows_late(scene: Scene) -> Path:
    """Lists in lists that are filled from the innermost, after they were put into each other."""
    lists = b"".join(b"]q" + bytes([number]) for number in range(DOUBLINGS + 1))
    nested = b"".join(b"h%ch%cah%ca" % (n, n + 1, n + 1) for n in range(DOUBLINGS))
    arguments = b"}" + _text(b"configuration") + _text(b"3d_fullres") + b"s"
    parts = ((b"network_weights", b"}"), (b"init_args", arguments), (b"trainer_name", b"h\x00"))
    content = b"".join(_text(key) + value + b"s" for key, value in parts)
    return _with_records(scene, {"data.pkl": b"\x80\x02" + lists + nested + b"}" + content + b"."})


def mirror_axes_without_end(scene: Scene) -> Path:
    """A thousand million axes in four bytes."""
    axes = torch.zeros(1).expand(10**9)
    return _with_checkpoint(
        good_model(scene), lambda checkpoint: checkpoint.update(inference_allowed_mirroring_axes=axes)
    )


# -- plans ------------------------------------------------------------------------------------------------------------


def network_that_is_a_command(scene: Scene) -> Path:
    return _with_architecture(scene, network_class_name="os.system", arch_kwargs={"command": f"touch {scene.canary}"})


def network_by_way_of_torch(scene: Scene) -> Path:
    return _with_architecture(scene, network_class_name="torch.nn.modules.conv.torch.os.system")


def network_by_way_of_nnunet(scene: Scene) -> Path:
    return _with_architecture(
        scene, network_class_name="dynamic_network_architectures.architectures.unet.torch.os.system"
    )


def network_of_older_plans_that_is_a_command(scene: Scene) -> Path:
    return _with_configuration(scene, UNet_class_name="os.system")


def layer_that_is_a_command(scene: Scene) -> Path:
    command = {"command": f"touch {scene.canary}"}
    return _with_layers(scene, nonlin="torch.nn.modules.conv.torch.os.system", nonlin_kwargs=command)


def layer_that_runs_code(scene: Scene) -> Path:
    return _with_layers(scene, norm_op="builtins.eval", norm_op_kwargs={})


def argument_that_is_imported(scene: Scene) -> Path:
    def change(plans: dict[str, Any]) -> None:
        architecture = plans["configurations"]["3d_fullres"]["architecture"]
        architecture["arch_kwargs"]["nonlin_kwargs"] = "subprocess.Popen"
        architecture["_kw_requires_import"].append("nonlin_kwargs")

    return _with_plans(scene, change)


def layer_that_swells(scene: Scene) -> Path:
    """Every activation pads the image by a thousand voxels on each side."""
    padding = {"padding": 1000, "value": 0.0}
    return _with_layers(scene, nonlin="torch.nn.modules.padding.ConstantPad3d", nonlin_kwargs=padding)


def foreign_image_reader(scene: Scene) -> Path:
    return _with_plans(scene, lambda plans: plans.update(image_reader_writer="../../evil.Reader"))


def foreign_label_manager(scene: Scene) -> Path:
    return _with_plans(scene, lambda plans: plans.update(label_manager="os.system"))


def foreign_preprocessor(scene: Scene) -> Path:
    return _with_configuration(scene, preprocessor_name="subprocess.Popen")


def foreign_normalisation(scene: Scene) -> Path:
    return _with_configuration(scene, normalization_schemes=["ImageNormalization.__init__.__globals__"])


def foreign_resampling(scene: Scene) -> Path:
    return _with_configuration(scene, resampling_fn_data="recursive_find_python_class")


def resampling_with_a_million_threads(scene: Scene) -> Path:
    return _with_configuration(
        scene,
        resampling_fn_data="resample_torch_fornnunet",
        resampling_fn_data_kwargs={"is_seg": False, "num_threads": 10**6},
    )


def widths_without_end(scene: Scene) -> Path:
    return _with_layers(scene, features_per_stage=[4, 10**9, 10**9])


def widths_that_fill_memory(scene: Scene) -> Path:
    return _with_layers(scene, features_per_stage=[4, 6000, 6000])


def stages_without_end(scene: Scene) -> Path:
    one_for_each = {"features_per_stage": 4, "kernel_sizes": 3, "strides": 1, "n_conv_per_stage": 1}
    return _with_layers(scene, n_stages=10**6, n_conv_per_stage_decoder=1, **one_for_each)


def patch_without_end(scene: Scene) -> Path:
    return _with_configuration(scene, patch_size=[10**6] * 3)


def spacing_without_end(scene: Scene) -> Path:
    """Every image would be resampled to voxels of a nanometre."""
    return _with_configuration(scene, spacing=[1e-6] * 3)


def spacing_that_is_no_number(scene: Scene) -> Path:
    return _with_configuration(scene, spacing=[float("nan"), 1.5, 1.5])


def configurations_in_a_circle(scene: Scene) -> Path:
    circle = {"3d_fullres": {"inherits_from": "other"}, "other": {"inherits_from": "3d_fullres"}}
    return _with_plans(scene, lambda plans: plans["configurations"].update(circle))


def configurations_in_a_long_line(scene: Scene) -> Path:
    line = {f"{number}": {"inherits_from": f"{number + 1}"} for number in range(20_000)}
    return _with_plans(scene, lambda plans: plans.update(configurations={**line, "3d_fullres": {"inherits_from": "0"}}))


def postprocessing_without_end(scene: Scene) -> Path:
    """Every label map would be searched for components a hundred thousand times."""
    rules = [{"classes": [1], "minimum_mm3": None}] * 100_000
    return _with_plans(scene, lambda plans: plans.update(mshub_keeps_largest_component=rules))


# -- JSON -------------------------------------------------------------------------------------------------------------


def json_without_a_floor(scene: Scene) -> Path:
    return _with_bytes(good_model(scene), "plans.json", b'{"configurations":' + b"[" * 100_000)


def json_with_an_endless_number(scene: Scene) -> Path:
    return _with_bytes(good_model(scene), "dataset.json", b'{"numTraining":' + b"9" * 100_000 + b"}")


def json_that_fills_memory(scene: Scene) -> Path:
    """13 million lists in 40 MiB."""
    return _with_bytes(good_model(scene), "dataset.json", b'{"more":[' + b"[]," * (40 * MIB // 3) + b"[]]}")


def labels_without_end(scene: Scene) -> Path:
    labels = {"background": 0, **{f"l{number}": number for number in range(1, 60_000)}}
    return _with_dataset(scene, labels=labels)


def labels_that_all_share_a_value(scene: Scene) -> Path:
    """The error would list them."""
    return _with_dataset(scene, labels={"background": 0, **{f"l{number}": 1 for number in range(100_000)}})


def label_that_commands_a_terminal(scene: Scene) -> Path:
    return _with_dataset(scene, labels={"background": 0, "liver\x1b]0;owned\x07": 1, "spleen": 2})


def label_that_is_half_a_character(scene: Scene) -> Path:
    """No file can hold it."""
    return _with_dataset(scene, labels={"background": 0, "liver\ud800": 1, "spleen": 2})


def label_with_an_absurd_value(scene: Scene) -> Path:
    labels = {"background": 0, "whole": [1, 2], "core": [2]}
    return good_model(scene, labels=labels, dataset_extra={"regions_class_order": [1, 10**12]})


# -- nnU-Net v1 -------------------------------------------------------------------------------------------------------


def v1_plans_that_are_a_command(scene: Scene, protocol: int = 0) -> Path:
    model = _with_pickle(good_v1_model(scene), V1_ABOUT, lambda info: info.pop("plans"))
    return _with_pickle(model, "plans.pkl", lambda plans: plans.update(evil=shell(scene.canary)), protocol)


def v1_plans_that_are_a_command_in_protocol_2(scene: Scene) -> Path:
    return v1_plans_that_are_a_command(scene, 2)


def v1_checkpoint_that_is_a_command(scene: Scene, protocol: int = 0) -> Path:
    return _with_pickle(good_v1_model(scene), V1_ABOUT, lambda info: info.update(evil=shell(scene.canary)), protocol)


def v1_checkpoint_that_is_a_command_in_protocol_2(scene: Scene) -> Path:
    return v1_checkpoint_that_is_a_command(scene, 2)


def v1_checkpoint_that_evaluates(scene: Scene) -> Path:
    return _with_pickle(good_v1_model(scene), V1_ABOUT, lambda info: info.update(evil=evaluation(scene.canary)))


def v1_weights_that_are_a_command(scene: Scene) -> Path:
    model = good_v1_model(scene)
    torch.save({**v1_checkpoint(V1_MODEL), "plot_stuff": shell(scene.canary)}, model / V1_WEIGHTS)
    return model


def v1_weights_that_are_a_command_in_the_older_format(scene: Scene) -> Path:
    model = good_v1_model(scene)
    content = {**v1_checkpoint(V1_MODEL), "plot_stuff": shell(scene.canary)}
    torch.save(content, model / V1_WEIGHTS, _use_new_zipfile_serialization=False)
    return model


def v1_pickle_that_refers_elsewhere(scene: Scene) -> Path:
    return _with_bytes(good_v1_model(scene), V1_ABOUT, b"P" + str(scene.secret).encode() + b"\n.")


def v1_pickle_that_refers_to_laughter(scene: Scene) -> Path:
    """The persistent id is lists in lists, which an error would quote."""
    return _with_bytes(good_v1_model(scene), V1_ABOUT, pickle.dumps(_laughs(), 2)[:-1] + b"Q.")


def v1_stage_that_is_never_written(scene: Scene) -> Path:
    arguments = ("plans.pkl", 0, "", "", False, _laughs())
    return _with_pickle(good_v1_model(scene), V1_ABOUT, lambda info: info.update(init=arguments))


def v1_key_that_is_never_hashed(scene: Scene) -> Path:
    return _with_bytes(good_v1_model(scene), V1_ABOUT, LAUGHING_KEY)


def v1_pickle_that_remembers_too_much(scene: Scene) -> Path:
    """The 2**26th entry of its memory, for which Python makes room for twice as many."""
    return _with_bytes(good_v1_model(scene), V1_ABOUT, b"\x80\x02Nr" + struct.pack("<I", 2**26) + b".")


def v1_pickle_with_an_enormous_number(scene: Scene) -> Path:
    """LONG4: two thousand million bytes of which none are there."""
    return _with_bytes(good_v1_model(scene), V1_ABOUT, b"\x80\x02\x8b\xff\xff\xff\x7f.")


def v1_pickle_with_an_enormous_text(scene: Scene) -> Path:
    """BINBYTES8: 2**62 bytes."""
    return _with_bytes(good_v1_model(scene), V1_ABOUT, b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".")


def v1_pickle_of_empty_tables(scene: Scene) -> Path:
    """64 million dictionaries, one byte each."""
    return _with_bytes(good_v1_model(scene), V1_ABOUT, b"\x80\x02" + b"}" * (64 * MIB) + b".")


def v1_array_of_empty_rows(scene: Scene) -> Path:
    """No number at all, in a thousand million rows."""
    pickled = pickle.dumps(np.zeros((3, 0)), 3).replace(b"K\x03K\x00\x86", b"J\x00\xca\x9a\x3bK\x00\x86")
    return _with_bytes(good_v1_model(scene), V1_ABOUT, pickled)


def v1_array_of_objects_in_rows(scene: Scene) -> Path:
    return _with_bytes(good_v1_model(scene), V1_ABOUT, pickle.dumps(np.full((2, 2), None), 2))


def v1_number_that_is_an_object(scene: Scene) -> Path:
    """A numpy scalar of dtype ``O``: eight bytes taken for the address of something."""
    pickled = pickle.dumps(np.float64(1), 2)
    return _with_bytes(good_v1_model(scene), V1_ABOUT, pickled.replace(b"f8", b"O8", 1))


def v1_dtype_with_a_hidden_object(scene: Scene) -> Path:
    pickled = pickle.dumps(np.float64(1), 2)
    return _with_bytes(good_v1_model(scene), V1_ABOUT, pickled.replace(b"X\x02\0\0\0f8", b"X\x05\0\0\0i8,O8", 1))


def v1_text_in_rot13(scene: Scene) -> Path:
    return _with_bytes(good_v1_model(scene), V1_ABOUT, b"\x80\x02c_codecs\nencode\nU\x04evilU\x05rot13\x86R.")


def v1_array_made_of_nonsense(scene: Scene) -> Path:
    """``_reconstruct`` and its state, called with what neither takes."""
    call = b"cnumpy.core.multiarray\n_reconstruct\nc_codecs\nencode\nJ\xff\xff\xff\xffN\x87R(KKNNNtb."
    return _with_bytes(good_v1_model(scene), V1_ABOUT, b"\x80\x02" + call)


def v1_weights_that_are_one_number_repeated(scene: Scene) -> Path:
    """A thousand million classes in four bytes; each would get a name."""
    classes = 10**9
    model = _with_pickle(good_v1_model(scene), V1_ABOUT, lambda info: info["plans"].update(num_classes=classes - 1))
    weights = v1_weights(V1_MODEL)
    for name in [name for name in weights if name.startswith("seg_outputs")]:
        weights[name] = torch.zeros(1).expand(classes, *weights[name].shape[1:])
    torch.save({**v1_checkpoint(V1_MODEL), "state_dict": weights}, model / V1_WEIGHTS)
    _with_pickle(model, V1_ABOUT, lambda info: info["plans"].pop("all_classes"))
    return model


def v1_postprocessing_without_a_floor(scene: Scene) -> Path:
    sizes = {"for_which_classes": [1], "min_valid_object_sizes": "-" * 200_000 + "1"}
    return _with_bytes(good_v1_model(scene), "postprocessing.json", json.dumps(sizes).encode())


def v1_postprocessing_without_end(scene: Scene) -> Path:
    rules = {"for_which_classes": [1] * 1_000_000}
    return _with_bytes(good_v1_model(scene), "postprocessing.json", json.dumps(rules).encode())


# -- what is installed, and does no harm ------------------------------------------------------------------------------


def scripts_beside_the_model(scene: Scene) -> Path:
    script = f"import os; os.system('touch {scene.canary}')".encode()
    names = ("setup.py", "conftest.py", "sitecustomize.py", "model/__init__.py", "model/nnUNetTrainer.py")
    return _zip_with(scene, *((name, script) for name in names))


def trainer_that_is_a_command(scene: Scene) -> Path:
    """The name of the trainer, which is never imported."""
    return good_model(scene, trainer="os.system")


def checkpoint_with_more_inside(scene: Scene) -> Path:
    """torch's zip has members that torch does not read."""
    command = pickle.dumps(shell(scene.canary))
    return _with_members(scene, {f"{Path(CHECKPOINT).stem}/{name}": command for name in ("evil.pkl", "data.pkl.py")})


def key_that_occurs_twice(scene: Scene) -> Path:
    """The last one counts, as it does for nnU-Net."""
    model = good_model(scene)
    return _replaced_in(model, "dataset.json", '{"channel', '{"labels": {"../../evil": 0}, "channel')


def labels_that_are_paths(scene: Scene) -> Path:
    return _with_dataset(scene, labels={"background": 0, "../../../../escaped": 1, str(scene.canary): 2})


def link_beside_the_model(scene: Scene) -> Path:
    good_model(scene)
    (scene.folder / "images").symlink_to("/")
    (scene.folder / "again").symlink_to(".")
    return scene.folder


def member_too_deep_to_matter(scene: Scene) -> Path:
    return _zip_with(scene, ("d/" * 20_000 + "plans.json", b"{}"))


def licence_without_end(scene: Scene) -> Path:
    """A licence of 300 MiB, in a zip of 400 kB."""
    return _zip_with(scene, ("model/LICENSE", bytes(300 * MIB)))


def licence_that_commands_a_terminal(scene: Scene) -> Path:
    return _with_bytes(good_model(scene), "LICENSE", b"\x1b]0;owned\x07CC BY 4.0\n")


def _replaced_in(model: Path, name: str, old: str, new: str) -> Path:
    _replaced(model / name, old.encode(), new.encode(), 1)
    return model
