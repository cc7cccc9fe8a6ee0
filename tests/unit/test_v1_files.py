"""Files of nnU-Net v1 releases: read as plain values, and nothing in them is ever run."""

from __future__ import annotations

import builtins
import collections
import os
import pickle
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mshub.errors import ModelFolderError
from mshub.nnunet import v1_files
from mshub.nnunet.v1_files import is_v1_folder, read_pickle, read_v1_folder
from v1_models import HOSPITAL, MODELS, v1_checkpoint, v1_plans, write_v1_folder

ANISOTROPIC = MODELS["anisotropic"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A v1 trained-model folder of one fold, to be damaged."""
    return write_v1_folder(tmp_path / "v1", ANISOTROPIC)


def about(folder: Path, fold: str = "fold_0") -> Path:
    return folder / fold / "model_final_checkpoint.model.pkl"


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a pickled dictionary in place, trusting it."""
    content = pickle.loads(path.read_bytes())
    change(content)
    path.write_bytes(pickle.dumps(content))


class Calls:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call


# -- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(5))
def test_plans_are_read_as_plain_values_in_every_protocol(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "plans.pkl"
    path.write_bytes(pickle.dumps(v1_plans(ANISOTROPIC), protocol=protocol))
    plans = read_pickle(path)
    stage = plans["plans_per_stage"][0]
    assert (stage["patch_size"], stage["current_spacing"]) == ([6, 16, 16], [4.0, 0.9, 0.9])
    assert plans["use_mask_for_norm"] == {0: True, 1: False}
    assert plans["all_classes"] == [1, 2]
    assert plans["dataset_properties"]["intensityproperties"][0]["mean"] == 60.0
    assert kinds(plans) <= {dict, list, tuple, str, int, float, bool, type(None), collections.OrderedDict} | PLAIN


PLAIN = {v1_files._Array}


def kinds(value: Any) -> set[type]:
    """Return the types of everything inside a value."""
    inside = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    return {type(value)}.union(*map(kinds, inside)) if isinstance(inside, (list, tuple)) else {type(value)}


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(3, dtype=">i2"),
        np.array([True, False]),
        np.array(["T1", "FLAIR"]),
        np.array(2.5),
    ],
    ids=["2-d", "fortran", "big-endian", "bool", "text", "0-d"],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_an_array_becomes_the_same_nested_lists(tmp_path: Path, array: np.ndarray, protocol: int) -> None:
    path = tmp_path / "array.pkl"
    path.write_bytes(pickle.dumps(array, protocol=protocol))
    assert read_pickle(path) == np.atleast_1d(array).tolist()


def test_an_array_of_objects_is_a_list_of_plain_values(tmp_path: Path) -> None:
    path = tmp_path / "array.pkl"
    path.write_bytes(pickle.dumps(np.array(["a", None, 3], dtype=object)))
    assert read_pickle(path) == ["a", None, 3]


def test_names_of_numpy_2_are_known(tmp_path: Path) -> None:
    path = tmp_path / "scalar.pkl"
    path.write_bytes(pickle.dumps(np.float64(0.25), protocol=0).replace(b"numpy.core", b"numpy._core"))
    assert read_pickle(path) == 0.25


def test_a_fold_says_who_trained_it_and_which_stage(folder: Path) -> None:
    (checkpoint,) = read_v1_folder(folder)
    assert (checkpoint.fold, checkpoint.trainer, checkpoint.stage) == ("0", "nnUNetTrainerV2", 0)
    assert checkpoint.stage_plans["pool_op_kernel_sizes"] == [[1, 2, 2], [2, 2, 2]]
    assert checkpoint.weights()["tu.0.weight"].shape == (16, 8, 2, 2, 2)


def test_the_plans_of_the_checkpoint_win_and_plans_pkl_may_be_missing(folder: Path) -> None:
    edit(folder / "plans.pkl", lambda plans: plans.update(num_classes=99))
    assert read_v1_folder(folder)[0].plans["num_classes"] == 2
    (folder / "plans.pkl").unlink()
    assert read_v1_folder(folder)[0].plans["num_classes"] == 2


def test_plans_pkl_stands_in_for_plans_the_checkpoint_lacks(folder: Path) -> None:
    edit(about(folder), lambda info: info.pop("plans"))
    assert read_v1_folder(folder)[0].plans["num_classes"] == 2


def test_the_distributed_trainer_has_its_stage_one_place_later(tmp_path: Path) -> None:
    model = replace(ANISOTROPIC, trainer="nnUNetTrainerV2_DDP", stage=1, stages=2)
    assert read_v1_folder(write_v1_folder(tmp_path, model))[0].stage == 1


def test_numbered_folds_are_taken_in_order_and_all_is_left_out(tmp_path: Path) -> None:
    write_v1_folder(tmp_path, replace(ANISOTROPIC, folds=("10", "2", "all")))
    assert [checkpoint.fold for checkpoint in read_v1_folder(tmp_path)] == ["2", "10"]


def test_the_best_checkpoint_stands_in_where_no_fold_has_a_final_one(folder: Path) -> None:
    for path in list((folder / "fold_0").iterdir()):
        path.rename(path.with_name(path.name.replace("final_checkpoint", "best")))
    assert read_v1_folder(folder)[0].path.name == "model_best.model"


def test_data_parallel_weights_lose_their_prefix(folder: Path) -> None:
    content = v1_checkpoint(ANISOTROPIC)
    content["state_dict"] = {f"module.{name}": tensor for name, tensor in content["state_dict"].items()}
    torch.save(content, folder / "fold_0" / "model_final_checkpoint.model")
    assert "tu.0.weight" in read_v1_folder(folder)[0].weights()


def test_a_checkpoint_in_torchs_older_format_is_read(folder: Path) -> None:
    path = folder / "fold_0" / "model_final_checkpoint.model"
    torch.save(v1_checkpoint(ANISOTROPIC), path, _use_new_zipfile_serialization=False)
    assert "tu.0.weight" in read_v1_folder(folder)[0].weights()


def test_the_two_generations_are_told_apart(folder: Path, liver_spleen: Path, tmp_path: Path) -> None:
    assert is_v1_folder(folder)
    assert not is_v1_folder(liver_spleen)
    assert not is_v1_folder(tmp_path)


# -- what is refused, and does not run ------------------------------------------------------------------------------


ATTACKS = {
    "os.system": (lambda mark: Calls(os.system, f"touch {mark}"), r"(posix|nt)\.system"),
    "eval": (lambda mark: Calls(builtins.eval, f"open({str(mark)!r}, 'w')"), r"(__builtin__|builtins)\.eval"),
    "exec": (lambda mark: Calls(builtins.exec, f"open({str(mark)!r}, 'w')"), r"(__builtin__|builtins)\.exec"),
    "getattr": (lambda mark: Calls(getattr, collections.OrderedDict, "mro"), r"(__builtin__|builtins)\.getattr"),
    "import": (lambda mark: Calls(builtins.__import__, "os"), r"(__builtin__|builtins)\.__import__"),
    "subprocess": (
        lambda mark: Calls(subprocess.check_call, ["touch", str(mark)]),
        r"(subprocess|commands)\.check_call",
    ),
    "numpy.load": (lambda mark: Calls(np.load, str(mark)), r"numpy.*load"),
    "fromfile": (lambda mark: Calls(np.fromfile, str(mark)), r"numpy.*fromfile"),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_calls_something_else_is_refused_by_name(tmp_path: Path, attack: str, protocol: int) -> None:
    mark, path = tmp_path / "executed", tmp_path / "plans.pkl"
    make, name = ATTACKS[attack]
    path.write_bytes(pickle.dumps({"plans": make(mark)}, protocol=protocol))
    with pytest.raises(ModelFolderError, match=rf"plans\.pkl was not read: it asks for {name}.*Nothing was executed"):
        read_pickle(path)
    assert not mark.exists()


@pytest.mark.parametrize("target", ["numpy.f2py.diagnose\nrun", "numpy.core.multiarray\nfromfile", "numpy\nsave"])
def test_a_name_that_looks_like_numpys_is_refused(tmp_path: Path, target: str) -> None:
    path = tmp_path / "plans.pkl"
    path.write_bytes(f"c{target}\n(tR.".encode())
    with pytest.raises(ModelFolderError, match=target.replace("\n", r"\.")):
        read_pickle(path)


@pytest.mark.parametrize("name", ["ndarray.tofile", "dtype.__class__", "__builtins__", "core.os.system"])
def test_a_dotted_name_does_not_lead_out_of_an_allowed_one(tmp_path: Path, name: str) -> None:
    path = tmp_path / "plans.pkl"
    module, attribute = b"\x8c\x05numpy", b"\x8c" + bytes([len(name)]) + name.encode()
    path.write_bytes(b"\x80\x04" + module + attribute + b"\x93.")  # STACK_GLOBAL of protocol 4
    with pytest.raises(ModelFolderError, match=f"asks for numpy.{name}"):
        read_pickle(path)


def test_the_numbers_of_copyreg_do_not_help(tmp_path: Path) -> None:
    path = tmp_path / "plans.pkl"
    path.write_bytes(b"\x80\x02\x82\x01.")
    with pytest.raises(ModelFolderError, match=r"plans\.pkl cannot be read"):
        read_pickle(path)


def test_something_outside_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plans.pkl"
    path.write_bytes(b"Pelsewhere\n.")
    with pytest.raises(ModelFolderError, match="refers to something outside itself"):
        read_pickle(path)


@pytest.mark.parametrize(
    "name",
    ["collections\nOrderedDict", "numpy\nndarray", "numpy\ndtype", "_codecs\nencode", "numpy.core.multiarray\nscalar"],
)
def test_a_file_cannot_change_what_answers_to_the_allowed_names(tmp_path: Path, name: str) -> None:
    path, before = tmp_path / "plans.pkl", dict(v1_files._stand_ins())
    for state in (b"}S'mark'\nI1\ns", b"N}S'mark'\nI1\ns\x86"):  # __dict__.update; setattr
        path.write_bytes(f"c{name}\n".encode() + state + b"b.")
        with pytest.raises(ModelFolderError, match="cannot be read"):
            read_pickle(path)
    assert dict(v1_files._stand_ins()) == before
    assert not any(hasattr(answer, "mark") for answer in before.values())


def test_bytes_are_decoded_as_latin1_only(tmp_path: Path) -> None:
    path = tmp_path / "plans.pkl"
    path.write_bytes(b"c_codecs\nencode\n(S'4f70'\nS'hex'\ntR.")
    with pytest.raises(ModelFolderError, match="encoding 'hex'"):
        read_pickle(path)


@pytest.mark.parametrize("code", ["V8", "M8", "i4,O", "f8\n", "", "O8,f4"])
def test_an_array_of_anything_but_numbers_and_text_is_refused(tmp_path: Path, code: str) -> None:
    path = tmp_path / "plans.pkl"
    path.write_bytes(b"cnumpy\ndtype\n(" + pickle.dumps(code, protocol=2)[2:-1] + b"tR.")
    with pytest.raises(ModelFolderError, match=r"plans\.pkl cannot be read \(an array of"):
        read_pickle(path)


def test_an_array_cannot_be_larger_than_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "plans.pkl"
    whole = pickle.dumps(np.arange(3, dtype="i8"), protocol=2)
    path.write_bytes(whole.replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85"))
    assert path.read_bytes() != whole
    with pytest.raises(ModelFolderError, match="cannot be read"):
        read_pickle(path)


@pytest.mark.parametrize("kept", [0.0, 0.2, 0.9])
def test_a_truncated_pickle_is_called_damaged(folder: Path, kept: float) -> None:
    whole = about(folder).read_bytes()
    about(folder).write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ModelFolderError, match=r"model\.pkl cannot be read .*damaged"):
        read_v1_folder(folder)


def test_random_damage_never_escapes_as_a_bare_error(folder: Path) -> None:
    whole, generator = about(folder).read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for position in generator.integers(0, len(whole), size=8):
            damaged[position] = int(generator.integers(0, 256))
        about(folder).write_bytes(bytes(damaged))
        try:
            read_pickle(about(folder))
        except ModelFolderError:
            refused += 1
    assert refused > 100


def test_a_pickle_of_absurd_size_is_not_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v1_files, "MAX_PICKLE_BYTES", 1000)
    with pytest.raises(ModelFolderError, match=r"plans of nnU-Net v1 have at most 1,000"):
        read_v1_folder(folder)


def test_weights_that_hold_more_than_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    mark, path = tmp_path / "executed", folder / "fold_0" / "model_final_checkpoint.model"
    torch.save({**v1_checkpoint(ANISOTROPIC), "more": Calls(os.system, f"touch {mark}")}, path)
    with pytest.raises(ModelFolderError, match="holds more than weights"):
        read_v1_folder(folder)[0].weights()
    assert not mark.exists()


@pytest.mark.parametrize("content", [{"weights": 1}, [1], {"state_dict": {}}])
def test_weights_of_something_else_are_refused(folder: Path, content: Any) -> None:
    torch.save(content, folder / "fold_0" / "model_final_checkpoint.model")
    with pytest.raises(ModelFolderError, match="no nnU-Net v1 checkpoint: state_dict not found"):
        read_v1_folder(folder)[0].weights()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info: info.pop("name"), "does not name the trainer"),
        (lambda info: info.update(plans={"plans": 1}), r"plans_per_stage.*Expected them in one of the two"),
        (
            lambda info: info.update(init=("", 0, "", "", True, 3)),
            r"stage 3 of the plans was .*; the plans have \[0\]",
        ),
        (lambda info: info.update(init=("", 0, "", "", 1, True)), "stage True"),
    ],
)
def test_a_checkpoint_that_does_not_say_what_it_is_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    edit(about(folder), change)
    with pytest.raises(ModelFolderError, match=message):
        read_v1_folder(folder)


def test_folds_of_different_models_are_refused(tmp_path: Path) -> None:
    write_v1_folder(tmp_path, replace(ANISOTROPIC, folds=("0",)))
    write_v1_folder(tmp_path, replace(ANISOTROPIC, folds=("1",), trainer="nnUNetTrainerV2_DA3"))
    with pytest.raises(ModelFolderError, match="Fold 0 is of nnUNetTrainerV2, stage 0; fold 1 of nnUNetTrainerV2_DA3"):
        read_v1_folder(tmp_path)


def test_a_folder_without_weights_and_a_fold_without_its_pickle_are_refused(folder: Path) -> None:
    about(folder).unlink()
    with pytest.raises(ModelFolderError, match=r"fold_0/model_final_checkpoint\.model\.pkl is missing"):
        read_v1_folder(folder)
    (folder / "fold_0" / "model_final_checkpoint.model").unlink()
    with pytest.raises(ModelFolderError, match="holds no nnU-Net v1 weights"):
        read_v1_folder(folder)


def test_the_folders_of_these_tests_hold_what_must_not_be_published(folder: Path) -> None:
    assert HOSPITAL.encode() in (folder / "plans.pkl").read_bytes()
