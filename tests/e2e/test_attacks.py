"""No hostile source gets further than ``mshub add``: each is refused in a sentence of its own, and leaves no trace."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import attacks
from attacks import Attack, Calls, Outcome, Scene, attempt
from mshub.store import ModelStore

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(sys.platform == "win32", reason="pipes, links and limits as POSIX systems have them"),
]

MOST_MEMORY_MIB = 256  # a good model takes a tenth of it
LONGEST_MESSAGE = 5000

# What an attack is told. Those that share a line are one attack in several places.
REFUSED: dict[str, tuple[Attack, ...]] = {
    # -- zips
    r"member '[^']+escaped\.txt' leaves its folder with '\.\.'": (
        attacks.member_with_dots,
        attacks.member_with_dots_in_a_zip_in_a_folder,
    ),
    r"member '/[^']+' has an absolute path": (attacks.member_with_an_absolute_path,),
    r"member 'C:/[^']+' has a drive letter": (attacks.member_with_a_drive_letter,),
    r"member '[^']+evil\.dll' has a backslash in its name": (attacks.member_with_a_backslash,),
    r"member 'model/LICENSE' is a symbolic link": (attacks.member_that_is_a_link,),
    r"member '[^']+' is a special file": (attacks.member_that_is_a_device, attacks.member_that_is_a_pipe),
    r"member 'model/plans\.json' occurs twice": (attacks.member_that_occurs_twice,),
    r"member '[^']+' is encrypted": (attacks.member_that_is_encrypted,),
    r"member '[^']+' has a NUL character in its name": (attacks.member_with_a_nul_in_its_name,),
    r"File name in directory 'model/plans\.json' and header .* differ": (
        attacks.member_with_another_name_in_its_header,
    ),
    r"has 10,003 members; at most 10,000 are accepted": (attacks.too_many_members,),
    r"unpacks to 77,309,\d{3},\d{3} bytes; at most 68,719,476,736": (attacks.zip_that_announces_a_bomb,),
    r"fold_1/checkpoint_final\.pth: Bad CRC-32": (attacks.zip_that_lies_about_a_bomb,),
    r"holds no nnU-Net model\. It holds several zips: pass one of them": (attacks.zip_of_zips,),
    # -- folders
    r"plans\.json -> /\S+/?passwd \(a link that leaves it: not followed\)": (attacks.plans_that_are_a_link_to_etc,),
    r"LICENSE is a link to .*secret\.txt, outside the given folder": (attacks.licence_that_is_a_link_to_a_secret,),
    r"checkpoint_final\.pth -> \S+secret\.txt \(a link that leaves it: not followed\)": (
        attacks.checkpoint_that_is_a_link_to_a_secret,
    ),
    r"fold_0 -> / \(a link that leaves it: not followed\)": (attacks.fold_that_is_a_link_to_the_disk,),
    r"fold_1 is a link to /, outside the given folder": (attacks.second_fold_that_is_a_link_to_the_disk,),
    r"The weights are missing: .*Found:\n  dataset\.json\n  plans\.json$": (attacks.checkpoint_that_is_a_pipe,),
    r"plans\.json is missing beside .*Found:\n  dataset\.json\n  fold_0/checkpoint_final\.pth$": (
        attacks.plans_that_are_a_pipe,
    ),
    r"is neither a folder nor a regular file": (attacks.source_that_is_a_pipe, attacks.source_without_end),
    r"Found:\n  '\\x1b\[2Jscan\\nstranger v1 is installed\.nii'$": (attacks.names_that_command_a_terminal,),
    # -- checkpoints that would run something
    r"checkpoint_final\.pth was not loaded: it holds more than weights \(it asks for (posix|nt)\.system\)": (
        attacks.shell_in_the_weights,
        attacks.shell_in_the_optimizer,
        attacks.shell_in_the_log,
        attacks.shell_in_the_arguments,
        attacks.shell_in_the_second_fold,
        attacks.shell_in_the_older_format,
        attacks.shell_in_a_zipped_model,
    ),
    r"not loaded: it holds more than weights \(it asks for eval\)": (attacks.eval_in_a_checkpoint,),
    r"not loaded: it holds more than weights \(it asks for torch\.serialization\.os\.system\)": (
        attacks.dotted_name_in_a_checkpoint,
    ),
    r"holds more than weights \(Only persistent_load of storage is allowed": (
        attacks.checkpoint_that_refers_to_a_module,
    ),
    r"cannot be read as a torch checkpoint \(Cannot use ``weights_only=True`` with files saved in the legacy \.tar": (
        attacks.checkpoint_that_is_a_tar,
    ),
    r"file in archive is not in a subdirectory .*escaped\.txt": (attacks.checkpoint_with_a_member_elsewhere,),
    r"cannot be read as a torch checkpoint \(Cannot use ``weights_only=True`` with TorchScript archives": (
        attacks.checkpoint_that_is_a_program,
    ),
    # -- checkpoints that would fill memory, never end, or be read as what they are not
    r"cannot be read as a torch checkpoint \(Tensor: invalid storage offset -4096": (
        attacks.weights_with_a_negative_offset,
    ),
    r"cannot be read as a torch checkpoint \(Trying to resize storage that is not resizable": (
        attacks.weights_beyond_their_bytes,
    ),
    r"checkpoint_final\.pth has [\d,]+ bytes and weights of 32,267,961,016: they are not in it": (
        attacks.weights_that_are_one_number_repeated,
        attacks.weights_without_bytes,
        attacks.weights_that_are_sparse,
    ),
    r"network_weights are not tensors by name|expected torch\.Tensor": (attacks.weights_whose_values_are_hidden,),
    r"was not loaded: it has members that are compressed": (
        attacks.checkpoint_that_is_a_bomb,
        attacks.checkpoint_with_compressed_weights,
    ),
    r"checkpoint_final\.pth was not read: it unfolds to over 50,000,000 values": (
        attacks.checkpoint_of_doublings,
        attacks.checkpoint_whose_key_is_never_hashed,
        attacks.trainer_name_that_is_never_written,
        attacks.configuration_name_that_is_never_written,
    ),
    r"no nnU-Net v2 checkpoint: its trainer_name is no text": (attacks.text_that_grows_late,),
    r"inference_allowed_mirroring_axes are no tuple of at most three axes": (attacks.mirror_axes_without_end,),
    # -- plans
    r"asks for the custom architecture os\.system\. MSHub builds only the networks": (
        attacks.network_that_is_a_command,
    ),
    r"custom architecture torch\.nn\.modules\.conv\.torch\.os\.system\.": (attacks.network_by_way_of_torch,),
    r"custom architecture dynamic_network_architectures\.[a-z.]+\.torch\.os\.system\.": (
        attacks.network_by_way_of_nnunet,
    ),
    r"custom architecture os\.system\. MSHub builds only nnU-Net's own": (
        attacks.network_of_older_plans_that_is_a_command,
    ),
    r"PlainConvUNet, torch\.nn\.modules\.conv\.torch\.os\.system\.": (attacks.layer_that_is_a_command,),
    r"PlainConvUNet, builtins\.eval\.": (attacks.layer_that_runs_code,),
    r"PlainConvUNet, subprocess\.Popen\.": (attacks.argument_that_is_imported,),
    r"PlainConvUNet, torch\.nn\.modules\.padding\.ConstantPad3d\.": (attacks.layer_that_swells,),
    r"the image reader \.\./\.\./evil\.Reader, which is not nnU-Net's own": (attacks.foreign_image_reader,),
    r"the label manager os\.system, which is not nnU-Net's own": (attacks.foreign_label_manager,),
    r"the preprocessor subprocess\.Popen, which is not nnU-Net's own": (attacks.foreign_preprocessor,),
    r"the normalisation ImageNormalization\.\S+, which is not nnU-Net's own": (attacks.foreign_normalisation,),
    r"the resampling recursive_find_python_class, which is not nnU-Net's own": (attacks.foreign_resampling,),
    r"a resampling that takes num_threads": (attacks.resampling_with_a_million_threads,),
    r"do not fit the architecture .*overflowed": (attacks.widths_without_end,),
    r"do not fit the architecture .*size mismatch for encoder": (attacks.widths_that_fill_memory,),
    r"asks for 1,000,000 resolutions; at most 32": (attacks.stages_without_end,),
    r"asks for patches of \[1000000, 1000000, 1000000\]; at most": (attacks.patch_without_end,),
    r"asks for a spacing of \[1e-06, 1e-06, 1e-06\] mm": (attacks.spacing_without_end,),
    r"asks for a spacing of \[nan, 1\.5, 1\.5\] mm": (attacks.spacing_that_is_no_number,),
    r"not as nnU-Net v2 writes it \(RuntimeError: Circular dependency": (attacks.configurations_in_a_circle,),
    r"not as nnU-Net v2 writes it \(RecursionError": (attacks.configurations_in_a_long_line,),
    r"mshub_keeps_largest_component has 100,000 rules": (attacks.postprocessing_without_end,),
    # -- JSON
    r"plans\.json cannot be read: maximum recursion depth": (attacks.json_without_a_floor,),
    r"dataset\.json cannot be read: Exceeds the limit \(4300 digits\)": (attacks.json_with_an_endless_number,),
    r"dataset\.json has 41,\d{3},\d{3} bytes; at most 16,777,216 are read": (attacks.json_that_fills_memory,),
    r"do not fit the architecture .*size mismatch for decoder\.seg_layers": (attacks.labels_without_end,),
    r"Labels in dataset\.json share a value. Found: l0 = 1, .* and \d[\d,]+ more": (
        attacks.labels_that_all_share_a_value,
    ),
    r"Label names hold characters that cannot be shown": (
        attacks.label_that_commands_a_terminal,
        attacks.label_that_is_half_a_character,
    ),
    r"regions_class_order: \[1, 1000000000000\]\. Expected: 2 positive integers up to 65,535": (
        attacks.label_with_an_absurd_value,
    ),
    # -- nnU-Net v1
    r"plans\.pkl was not read: it asks for (posix|nt)\.system": (
        attacks.v1_plans_that_are_a_command,
        attacks.v1_plans_that_are_a_command_in_protocol_2,
    ),
    r"model\.pkl was not read: it asks for (posix|nt)\.system": (
        attacks.v1_checkpoint_that_is_a_command,
        attacks.v1_checkpoint_that_is_a_command_in_protocol_2,
    ),
    r"model\.pkl was not read: it asks for builtins\.eval": (attacks.v1_checkpoint_that_evaluates,),
    r"checkpoint\.model was not loaded: it holds more than weights \(it asks for (posix|nt)\.system\)": (
        attacks.v1_weights_that_are_a_command,
        attacks.v1_weights_that_are_a_command_in_the_older_format,
    ),
    r"refers to something outside itself \('.*secret\.txt'\)": (attacks.v1_pickle_that_refers_elsewhere,),
    r"model\.pkl was not read: it unfolds to over 50,000,000 values": (
        attacks.v1_pickle_that_refers_to_laughter,
        attacks.v1_stage_that_is_never_written,
        attacks.v1_key_that_is_never_hashed,
    ),
    r"remembers its value number 2 as number 67,108,864": (attacks.v1_pickle_that_remembers_too_much,),
    r"model\.pkl cannot be read \((pickle data was truncated|.* long4)": (attacks.v1_pickle_with_an_enormous_number,),
    r"model\.pkl cannot be read \((MemoryError|.* bytes8)": (attacks.v1_pickle_with_an_enormous_text,),
    r"model\.pkl has 67,\d{3},\d{3} bytes; plans of nnU-Net v1 have at most": (attacks.v1_pickle_of_empty_tables,),
    r"model\.pkl cannot be read \(an array of rows without numbers\)": (attacks.v1_array_of_empty_rows,),
    r"model\.pkl cannot be read \(an array of objects": (attacks.v1_array_of_objects_in_rows,),
    r"model\.pkl cannot be read \(a scalar that is an object\)": (attacks.v1_number_that_is_an_object,),
    r"model\.pkl cannot be read \(an array of 'i8,O8'\)": (attacks.v1_dtype_with_a_hidden_object,),
    r"model\.pkl cannot be read \(text in the encoding 'rot13'\)": (attacks.v1_text_in_rot13,),
    r"model\.pkl cannot be read \(not enough values to unpack": (attacks.v1_array_made_of_nonsense,),
    r"final_checkpoint\.model has [\d,]+ bytes and weights of 48,\d{3},\d{3},\d{3}: they are not in it": (
        attacks.v1_weights_that_are_one_number_repeated,
    ),
    r"postprocessing\.json is not as nnU-Net v1 writes it \((MemoryError|RecursionError|SyntaxError)": (
        attacks.v1_postprocessing_without_a_floor,
    ),
    r"postprocessing\.json is not .*1,000,000 classes in for_which_classes": (attacks.v1_postprocessing_without_end,),
}

# What is installed without the hostile part, or with it where it can do no harm.
HARMLESS: tuple[Attack, ...] = (
    attacks.scripts_beside_the_model,
    attacks.trainer_that_is_a_command,
    attacks.checkpoint_with_more_inside,
    attacks.key_that_occurs_twice,
    attacks.labels_that_are_paths,
    attacks.link_beside_the_model,
    attacks.member_too_deep_to_matter,
    attacks.licence_without_end,
    attacks.licence_that_commands_a_terminal,
)
GOOD: tuple[Attack, ...] = (attacks.good_model, attacks.good_zip, attacks.good_v1_model)


def named(chosen: tuple[Attack, ...]) -> Any:
    """Parametrise a test with attacks, by their names."""
    return pytest.mark.parametrize("attack", chosen, ids=lambda attack: attack.__name__)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """A folder for the source, a secret beside it, and the place of the canary."""
    (tmp_path / "source").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    return Scene(tmp_path / "source", tmp_path / "secret.txt", tmp_path / "canary")


@pytest.fixture
def add(scene: Scene, store: ModelStore) -> Callable[[Attack], Outcome]:
    """Add what an attack writes, and check that nothing but the store has changed."""

    def build_and_add(attack: Attack) -> Outcome:
        around = scene.secret.parent
        work, temporary = around / "work", around / "temporary"
        for folder in (work, temporary, store.home):
            folder.mkdir()
        source = attack(scene)
        before = everything_in(around, (store.home, temporary))
        outcome = attempt(source, store.home, work, temporary)
        assert everything_in(around, (store.home, temporary)) == before
        assert list(temporary.iterdir()) == []
        assert not scene.canary.exists()
        return outcome

    return build_and_add


def everything_in(folder: Path, without: tuple[Path, ...]) -> dict[Path, tuple[int, ...]]:
    """Return mode, size and time of everything below a folder, links as links."""
    paths = (path for path in folder.rglob("*") if not any(map(path.is_relative_to, without)))
    return {path: ((status := path.lstat()).st_mode, status.st_size, status.st_mtime_ns) for path in paths}


def assert_nothing_is_left(store: ModelStore) -> None:
    """Nothing is installed, half-installed or known that was not before."""
    assert store.installed() == []
    assert {path.name for path in store.home.rglob("*")} <= {"staging"}


@named(tuple(attack for several in REFUSED.values() for attack in several))
def test_an_attack_is_refused_in_its_own_words_and_leaves_no_trace(
    attack: Attack, add: Callable[[Attack], Outcome], store: ModelStore
) -> None:
    outcome = add(attack)
    assert outcome.kind == "refused", outcome
    assert [words for words in REFUSED if re.search(words, outcome.message, re.DOTALL)] == words_of(attack), outcome
    assert outcome.grown_mib < MOST_MEMORY_MIB
    assert outcome.length < LONGEST_MESSAGE
    assert outcome.message.replace("\n", "").isprintable()
    assert_nothing_is_left(store)


def words_of(attack: Attack) -> list[str]:
    return [words for words, several in REFUSED.items() if attack in several]


@named(HARMLESS + GOOD)
def test_what_can_do_no_harm_is_installed_and_does_none(
    attack: Attack, add: Callable[[Attack], Outcome], store: ModelStore
) -> None:
    outcome = add(attack)
    assert outcome.kind == "installed", outcome
    assert outcome.grown_mib < MOST_MEMORY_MIB
    assert store.verify("stranger").record["files"].keys() >= {"dataset.json", "plans.json"}
    assert list((store.home / "staging").iterdir()) == []
    assert str(store.current("stranger").record["licence"] or "").isprintable()


@pytest.mark.parametrize("make", [attacks.shell, attacks.evaluation], ids=["shell", "eval"])
@pytest.mark.parametrize("reader", ["pickle", "torch", "older torch"])
def test_the_traps_themselves_work(make: Callable[[Path], Calls], reader: str, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "trap"
    if reader == "pickle":
        pickle.loads(pickle.dumps(make(canary)))
    else:
        torch.save(make(canary), path, _use_new_zipfile_serialization=reader == "torch")
        torch.load(path, weights_only=False)
    assert canary.exists(), "or the canaries of this file prove nothing"


def test_every_attack_is_in_the_table() -> None:
    tabled = {attack.__name__ for several in (*REFUSED.values(), HARMLESS, GOOD) for attack in several}
    written = {name for name, thing in vars(attacks).items() if "Scene" in str(getattr(thing, "__annotations__", ""))}
    assert {name for name in written if not name.startswith("_")} == tabled
    assert sum(map(len, REFUSED.values())) >= 12


@pytest.mark.parametrize(
    ("attack", "words"),
    [(attacks.member_with_dots, r"leaves its folder"), (attacks.shell_in_the_log, r"asks for (posix|nt)\.system")],
    ids=["zip", "checkpoint"],
)
def test_the_command_line_says_it_in_one_sentence(attack: Attack, words: str, scene: Scene, store: ModelStore) -> None:
    command = [sys.executable, "-m", "mshub", "add", "stranger", str(attack(scene))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ, cwd=scene.folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.match(rf"mshub: .*{words}", done.stderr, re.DOTALL), done.stderr
    assert "Traceback" not in done.stderr
    assert not scene.canary.exists()
    assert_nothing_is_left(store)
