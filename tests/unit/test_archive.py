"""Any sane folder or zip gives its model; anything else is refused by name and leaves no trace."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import re
import shutil
import stat
import zipfile
from pathlib import Path

import pytest

from mshub import archive, sources
from mshub.archive import extract_model, find_model_roots
from mshub.checksums import CHUNK, file_sha256, tree_sha256
from mshub.errors import ModelFolderError, StoreError

MODEL = {
    "dataset.json": b'{"labels": {"background": 0, "lesion": 1}}',
    "plans.json": b'{"plans_name": "nnUNetPlans"}',
    "fold_0/checkpoint_final.pth": b"weights of fold 0" * 100,
}


def add(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def zipped(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as out:
        for name, content in files.items():
            out.writestr(name, content)
    return path


def below(prefix: str, files: dict[str, bytes] = MODEL) -> dict[str, bytes]:
    return {f"{prefix}/{name}": content for name, content in files.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "canary" / "target"
    path.mkdir(parents=True)
    return path


@pytest.fixture(params=["folder", "zip"])
def build(request: pytest.FixtureRequest, tmp_path: Path):
    """Make a source of the given files, once as a folder and once as a zip."""

    def make(files: dict[str, bytes]) -> Path:
        if request.param == "folder":
            (tmp_path / "source").mkdir()
            return add(tmp_path / "source", files)
        return zipped(tmp_path / "source.zip", files)

    return make


class TestFinding:
    @pytest.mark.parametrize("prefix", [None, "model", "a/b/nnUNetTrainer__nnUNetPlans__3d_fullres", "1/2/3/4/5/6/7/8"])
    def test_a_model_is_found_whatever_it_is_nested_in(self, build, prefix):
        assert find_model_roots(build(below(prefix) if prefix else MODEL)) == [prefix or "."]

    def test_a_model_nine_levels_down_is_too_deep(self, build):
        assert find_model_roots(build(below("1/2/3/4/5/6/7/8/9"))) == []

    def test_fold_all_counts_and_other_names_do_not(self, build):
        files = below("good") | below("bad")
        files["good/fold_all/checkpoint_best.pth"] = files.pop("good/fold_0/checkpoint_final.pth")
        files["bad/fold_x/checkpoint_final.pth"] = files.pop("bad/fold_0/checkpoint_final.pth")
        assert find_model_roots(build(files)) == ["good"]

    @pytest.mark.parametrize("missing", list(MODEL))
    def test_a_model_without_one_of_its_three_parts_is_none(self, build, missing):
        assert find_model_roots(build({name: data for name, data in MODEL.items() if name != missing})) == []

    def test_several_models_are_listed_outermost_first(self, build):
        assert find_model_roots(build(below("z") | below("a/b") | below("c"))) == ["c", "z", "a/b"]

    def test_what_macos_and_dotfiles_hold_is_ignored(self, build):
        assert find_model_roots(build(below("__MACOSX/model") | below(".trash/model") | below("model"))) == ["model"]

    def test_a_zip_of_names_that_begin_with_dot_slash_is_read(self, tmp_path):
        assert find_model_roots(zipped(tmp_path / "m.zip", below("./model"))) == ["model"]

    def test_a_folder_that_holds_only_a_zip_and_a_readme_is_read_as_that_zip(self, tmp_path, target):
        folder = add(tmp_path / "drive", {"README.txt": b"unpack me"})
        zipped(folder / "model.zip", below("inner"))
        assert find_model_roots(folder) == ["inner"]
        assert extract_model(folder, target) == "inner"
        assert contents(target) == MODEL

    @pytest.mark.parametrize("inner", ["fold_0", "fold_0/checkpoint_final.pth", "plans.json", "fold_0/validation"])
    def test_a_path_inside_a_model_is_answered_with_the_folder_to_pass(self, tmp_path, inner):
        model = add(tmp_path / "model", MODEL | {"fold_0/validation/summary.json": b"{}"})
        with pytest.raises(StoreError, match=rf"Pass the whole model folder: {model}$"):
            find_model_roots(model / inner)

    def test_a_bare_checkpoint_is_not_taken_for_a_zip_although_it_is_one(self, tmp_path):
        checkpoint = zipped(tmp_path / "checkpoint_final.pth", {"archive/data.pkl": b""})
        with pytest.raises(StoreError, match="is a single file"):
            find_model_roots(checkpoint)

    def test_a_source_that_does_not_exist_is_named(self, tmp_path):
        with pytest.raises(StoreError, match="no-such-folder does not exist"):
            find_model_roots(tmp_path / "no-such-folder")

    def test_a_whole_disk_is_not_searched(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sources, "MAX_WALKED", 50)
        with pytest.raises(StoreError, match="over 50 files"):
            find_model_roots(add(tmp_path / "disk", {f"{n}.txt": b"" for n in range(51)}))


class TestExtraction:
    def test_only_the_listed_members_are_copied_byte_for_byte(self, build, target):
        wanted = MODEL | {
            "fold_1/checkpoint_final.pth": b"fold 1",
            "dataset_fingerprint.json": b"{}",
            "LICENSE": b"CC-BY",
            "LICENSE-weights.txt": b"NC",
            "README.md": b"read me",
        }
        others = {
            "fold_0/checkpoint_best.pth": b"best",
            "fold_0/checkpoint_latest.pth": b"latest",
            "fold_0/progress.png": b"png",
            "fold_0/validation/case.nii.gz": b"image",
            "fold_2/checkpoint_best.pth": b"an unfinished fold",
            "install.py": b"import os",
            "nested/LICENSE": b"of something else",
            "fold_0/README.md": b"",
        }
        assert extract_model(build(below("model", wanted | others)), target) == "model"
        assert contents(target) == wanted

    def test_best_checkpoints_are_taken_when_no_fold_has_a_final_one(self, build, target):
        files = {name: data for name, data in MODEL.items() if "fold" not in name}
        files |= {"fold_0/checkpoint_best.pth": b"0", "fold_1/checkpoint_best.pth": b"1"}
        extract_model(build(files), target)
        assert contents(target) == files

    def test_a_model_of_latest_checkpoints_only_is_unfinished(self, build, target):
        files = {name: data for name, data in MODEL.items() if "fold" not in name}
        with pytest.raises(ModelFolderError, match=r"neither checkpoint_final\.pth nor checkpoint_best\.pth"):
            extract_model(build(files | {"fold_0/checkpoint_latest.pth": b"0"}), target)

    def test_of_several_models_one_must_be_chosen(self, build, target):
        source = build(below("ct") | below("mr/best"))
        with pytest.raises(ModelFolderError, match=r"holds 2 models:\n  ct\n  mr/best\nChoose one with --root"):
            extract_model(source, target)
        assert extract_model(source, target, root="mr/best/") == "mr/best"
        assert contents(target) == MODEL

    def test_a_root_that_is_not_there_is_answered_with_those_that_are(self, build, target):
        with pytest.raises(ModelFolderError, match=r"no model in 'pet'\. It has:\n  ct\n"):
            extract_model(build(below("ct")), target, root="pet")

    def test_the_target_must_be_an_existing_empty_directory(self, build, tmp_path, target):
        source = build(MODEL)
        with pytest.raises(StoreError, match="not an empty directory"):
            extract_model(source, tmp_path / "missing")
        (target / "precious.txt").write_text("keep")
        with pytest.raises(StoreError, match="not an empty directory"):
            extract_model(source, target)
        assert contents(target) == {"precious.txt": b"keep"}

    def test_a_model_larger_than_the_limit_is_refused_before_anything_is_written(self, build, target):
        size = sum(map(len, MODEL.values()))
        source = build(MODEL)
        with pytest.raises(StoreError, match=f"unpacks to {size:,} bytes; at most {size - 1:,}"):
            extract_model(source, target, max_bytes=size - 1)
        assert contents(target) == {}
        extract_model(source, target, max_bytes=size)

    def test_a_full_disk_is_reported_with_both_numbers_before_anything_is_written(self, build, target, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10_000, 8_766, 1_234))
        size = sum(map(len, MODEL.values()))
        with pytest.raises(StoreError, match=rf"needs {size:,} bytes and .*target has 1,234 free"):
            extract_model(build(MODEL), target)
        assert contents(target) == {}


class TestNoModel:
    def refusal(self, source: Path, target: Path) -> str:
        with pytest.raises(ModelFolderError) as caught:
            extract_model(source, target)
        return str(caught.value)

    def test_the_message_lists_what_was_seen_and_what_is_expected(self, build, target):
        message = self.refusal(build({f"case_{n:02}.txt": b"" for n in range(13)}), target)
        assert "\n  case_00.txt\n" in message
        assert "\n  case_09.txt\n  ... and 3 more" in message
        assert "case_10" not in message
        assert "dataset.json, plans.json and fold_X/checkpoint_final.pth" in message

    def test_an_empty_source_is_said_to_hold_nothing(self, build, target):
        assert self.refusal(build({}), target).endswith("Found: nothing")

    @pytest.mark.parametrize(
        ("files", "expected"),
        [
            (
                ["m/plans.pkl", "m/fold_0/model_final_checkpoint.model"],
                r"weights of nnU-Net v1, but model_final_checkpoint\.model\.pkl",
            ),
            (["D/dataset.json", "D/imagesTr/a_0000.nii.gz", "D/labelsTr/a.nii.gz"], "looks like a raw dataset"),
            (["D/nnUNetPlans.json", "D/dataset.json", "D/gt_segmentations/a.nii.gz"], "like a preprocessed dataset"),
            (["fold_0/checkpoint_final.pth", "dataset.json"], r"checkpoints, but plans\.json is missing"),
            (["fold_0/checkpoint_final.pth"], r"but dataset\.json and plans\.json is missing"),
            (["dataset.json", "plans.json"], "weights are missing"),
            (["a.zip", "b.zip"], "several zips: pass one"),
        ],
    )
    def test_what_is_recognised_is_named(self, build, target, files, expected):
        message = self.refusal(build(dict.fromkeys(files, b"")), target)
        assert re.search(expected, message), message


class TestLinks:
    def test_links_inside_the_source_are_followed_and_copied_as_files(self, tmp_path, target):
        source = add(tmp_path / "source", MODEL | {"store/weights.bin": b"shared"})
        (source / "fold_1").mkdir()
        (source / "fold_1/checkpoint_final.pth").symlink_to("../store/weights.bin")
        (source / "fold_2").symlink_to("fold_0")
        extract_model(source, target)
        assert contents(target) == MODEL | {
            "fold_1/checkpoint_final.pth": b"shared",
            "fold_2/checkpoint_final.pth": MODEL["fold_0/checkpoint_final.pth"],
        }
        assert not any(path.is_symlink() for path in target.rglob("*"))

    @pytest.mark.parametrize("part", ["plans.json", "fold_0", "fold_1", "fold_1/checkpoint_final.pth", "LICENSE"])
    def test_a_needed_part_that_leads_outside_is_refused_by_name(self, tmp_path, target, part):
        secret = add(tmp_path / "secret", MODEL)
        source = add(tmp_path / "source", MODEL)
        link = source / part
        shutil.rmtree(link, ignore_errors=True)
        link.unlink(missing_ok=True)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(secret / "fold_0" if part.startswith("fold_") and "/" not in part else secret / "plans.json")
        with pytest.raises((StoreError, ModelFolderError), match=rf"{part}.* link") as caught:
            extract_model(source, target)
        assert str(secret) in str(caught.value)
        assert contents(target) == {}

    def test_a_link_that_leads_outside_beside_the_model_does_not_matter(self, tmp_path, target):
        source = add(tmp_path / "source", MODEL)
        (source / "images").symlink_to("/")
        extract_model(source, target)
        assert contents(target) == MODEL

    def test_a_loop_of_links_ends(self, tmp_path):
        source = add(tmp_path / "source", below("model"))
        for number in range(12):
            (source / f"model/again_{number}").symlink_to("..")
        (source / "self").symlink_to("self")
        assert find_model_roots(source) == ["model"]

    def test_a_link_to_a_model_beside_it_is_the_same_model(self, tmp_path):
        source = add(tmp_path / "source", below("v1"))
        (source / "current").symlink_to("v1")
        assert len(find_model_roots(source)) == 1

    def test_the_source_itself_may_be_a_link(self, tmp_path, target):
        add(tmp_path / "real", MODEL)
        (tmp_path / "link").symlink_to(tmp_path / "real")
        assert extract_model(tmp_path / "link", target) == "."


def special(name: str, kind: int, content: bytes = b"/etc/passwd") -> tuple[zipfile.ZipInfo, bytes]:
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = (kind | 0o777) << 16
    return info, content


class TestMaliciousZips:
    def refusal(self, source: Path, target: Path, **limits: int) -> str:
        """Extract, expect a refusal, and check that nothing appeared in or around the target."""
        around = target.parent.parent
        before = contents(around)
        with pytest.raises(StoreError) as caught:
            extract_model(source, target, **limits)
        assert contents(around) == before
        assert list(target.iterdir()) == []
        return str(caught.value)

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("../escaped.txt", r"leaves its folder"),
            ("model/../../escaped.txt", r"leaves its folder"),
            ("model/fold_1/../../../escaped/checkpoint_final.pth", r"leaves its folder"),
            ("/absolute/escaped.txt", "absolute path"),
            ("C:/escaped.txt", "drive letter"),
            ("c:escaped.txt", "drive letter"),
            ("model\\fold_1\\checkpoint_final.pth", "backslash"),
            ("..\\escaped.txt", "backslash"),
        ],
    )
    def test_a_member_that_could_land_elsewhere_is_refused_by_name(self, tmp_path, target, name, reason):
        source = zipped(tmp_path / "evil.zip", below("model") | {name: b"evil"})
        message = self.refusal(source, target)
        assert reason in message
        assert repr(name) in message

    @pytest.mark.parametrize(
        ("kind", "reason"),
        [(stat.S_IFLNK, "symbolic link"), (stat.S_IFIFO, "special file"), (stat.S_IFCHR, "special file")],
    )
    @pytest.mark.parametrize("name", ["model/plans.json", "model/fold_1", "other/thing"])
    def test_a_link_or_device_is_refused_by_name(self, tmp_path, target, kind, reason, name):
        with zipfile.ZipFile(tmp_path / "evil.zip", "w") as out:
            for good, content in below("model").items():
                if good != name:
                    out.writestr(good, content)
            out.writestr(*special(name, kind))
        message = self.refusal(tmp_path / "evil.zip", target)
        assert reason in message
        assert name in message

    def test_a_member_that_occurs_twice_is_refused(self, tmp_path, target):
        with zipfile.ZipFile(tmp_path / "evil.zip", "w") as out:
            for name, content in MODEL.items():
                out.writestr(name, content)
            with pytest.warns(UserWarning, match="Duplicate name"):
                out.writestr("plans.json", b"the other plans")
        assert "'plans.json' occurs twice" in self.refusal(tmp_path / "evil.zip", target)

    def test_a_name_cut_short_by_a_nul_is_refused(self, tmp_path, target):
        source = zipped(tmp_path / "evil.zip", MODEL | {"README.md?evil": b""})
        source.write_bytes(source.read_bytes().replace(b"README.md?evil", b"README.md\0evil"))
        assert "NUL character" in self.refusal(source, target)

    def test_an_encrypted_member_is_refused(self, tmp_path, target):
        source = zipped(tmp_path / "secret.zip", MODEL)
        with zipfile.ZipFile(source) as opened:
            offset = opened.start_dir
        data = bytearray(source.read_bytes())
        data[offset + 8] |= 1
        source.write_bytes(data)
        assert "is encrypted" in self.refusal(source, target)

    def test_a_zip_of_too_many_members_is_refused(self, tmp_path, target):
        source = zipped(tmp_path / "many.zip", MODEL | {f"{n}.txt": b"" for n in range(8)})
        assert "has 11 members; at most 10" in self.refusal(source, target, max_members=10)
        extract_model(source, target, max_members=11)

    def test_a_bomb_that_declares_its_size_is_refused_before_it_is_unpacked(self, tmp_path, target):
        source = zipped(tmp_path / "bomb.zip", MODEL | {"fold_1/checkpoint_final.pth": bytes(50_000_000)})
        assert source.stat().st_size < 100_000
        assert "at most 1,000,000 are accepted" in self.refusal(source, target, max_bytes=1_000_000)

    def test_a_bomb_that_lies_about_its_size_is_refused(self, tmp_path, target):
        bomb = bytes(5_000_000)
        source = zipped(tmp_path / "bomb.zip", MODEL | {"fold_1/checkpoint_final.pth": bomb})
        small = (1_000).to_bytes(4, "little")
        source.write_bytes(source.read_bytes().replace(len(bomb).to_bytes(4, "little"), small))
        with zipfile.ZipFile(source) as opened:
            assert opened.getinfo("fold_1/checkpoint_final.pth").file_size == 1_000
        assert "fold_1/checkpoint_final.pth" in self.refusal(source, target, max_bytes=1_000_000)

    def test_a_stream_longer_than_declared_is_cut_off_and_refused(self, build, target, monkeypatch):
        # zipfile happens to stop at the declared size; the copy must not depend on it, nor on a file that stays put.
        source = build(MODEL)
        honest = archive._opened

        @archive.contextmanager
        def lying(path, max_members):
            with honest(path, max_members) as tree:
                tree.files["fold_0/checkpoint_final.pth"] -= 1
                yield tree

        monkeypatch.setattr(archive, "_opened", lying)
        assert "1,699 announced" in self.refusal(source, target)

    def test_an_endless_stream_is_not_written_for_ever(self, build, target, monkeypatch):
        source = build(MODEL)
        honest = archive._opened

        class Endless(io.RawIOBase):
            reads = 0

            def read(self, size: int = -1) -> bytes:
                Endless.reads += 1
                return bytes(size) if Endless.reads < 100 else pytest.fail("still reading")

        @archive.contextmanager
        def endless(path, max_members):
            with honest(path, max_members) as tree:
                yield dataclasses.replace(tree, open=lambda name: Endless())

        monkeypatch.setattr(archive, "_opened", endless)
        assert "announced" in self.refusal(source, target)

    def test_one_wrong_bit_is_noticed(self, tmp_path, target):
        source = zipped(tmp_path / "bad.zip", MODEL, zipfile.ZIP_STORED)
        data = bytearray(source.read_bytes())
        data[data.index(MODEL["fold_0/checkpoint_final.pth"]) + 700] ^= 1
        source.write_bytes(data)
        message = self.refusal(source, target)
        assert "Bad CRC-32" in message
        assert "fold_0/checkpoint_final.pth" in message

    def test_damaged_compressed_data_is_noticed(self, tmp_path, target):
        noise = hashlib.shake_256(b"noise").digest(100_000)
        source = zipped(tmp_path / "bad.zip", MODEL | {"fold_1/checkpoint_final.pth": noise * 2})
        data = bytearray(source.read_bytes())
        data[60_000:60_100] = bytes(100)
        source.write_bytes(data)
        assert "incomplete or damaged download" in self.refusal(source, target)

    @pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
    def test_a_truncated_zip_is_called_an_incomplete_download(self, tmp_path, target, kept):
        source = zipped(tmp_path / "half.zip", below("model"))
        data = source.read_bytes()
        source.write_bytes(data[: int(len(data) * kept)])
        assert "half.zip cannot be read as a zip (its end is missing)" in self.refusal(source, target)

    def test_a_damaged_directory_of_a_zip_is_refused(self, tmp_path, target):
        source = zipped(tmp_path / "bad.zip", MODEL)
        source.write_bytes(source.read_bytes().replace(b"PK\x01\x02", b"PK\x09\x09"))
        assert "cannot be read as a zip" in self.refusal(source, target)

    def test_a_compression_python_does_not_know_is_answered_with_unpack_by_hand(self, tmp_path, target):
        source = zipped(tmp_path / "odd.zip", {name: MODEL[name] for name in sorted(MODEL)}, zipfile.ZIP_STORED)
        data = bytearray(source.read_bytes())
        with zipfile.ZipFile(source) as opened:
            data[opened.start_dir + 10] = 9
        data[8] = 9
        source.write_bytes(data)
        assert "Unpack the archive by hand" in self.refusal(source, target)

    def test_a_failure_half_way_leaves_the_target_empty(self, tmp_path, target):
        late = {f"fold_{n}/checkpoint_final.pth": bytes([n]) * 3_000 for n in range(5)}
        source = zipped(tmp_path / "bad.zip", MODEL | late, zipfile.ZIP_STORED)
        source.write_bytes(source.read_bytes().replace(bytes([4]) * 3_000, bytes([9]) * 3_000))
        assert "fold_4" in self.refusal(source, target)


class TestOtherArchives:
    @pytest.mark.parametrize(
        ("format", "suffix", "command"),
        [("tar", ".tar", "tar -xf"), ("gztar", ".tar.gz", "tar -xzf"), ("xztar", ".tar.xz", "tar -xJf")],
    )
    def test_a_tar_is_answered_with_how_to_unpack_it(self, tmp_path, format, suffix, command):
        add(tmp_path / "model", MODEL)
        shutil.make_archive(str(tmp_path / "weights"), format, tmp_path / "model")
        with pytest.raises(StoreError, match=rf"`{command} weights{suffix}` and pass the folder"):
            find_model_roots(tmp_path / f"weights{suffix}")

    @pytest.mark.parametrize(("magic", "command"), [(b"7z\xbc\xaf\x27\x1c", "7z x"), (b"Rar!\x1a\x07", "unrar x")])
    def test_7z_and_rar_are_known_by_content_whatever_their_name(self, tmp_path, magic, command):
        (tmp_path / "weights.zip").write_bytes(magic + bytes(100))
        with pytest.raises(StoreError, match=rf"`{command} weights\.zip`"):
            find_model_roots(tmp_path / "weights.zip")

    def test_a_zip_is_known_by_content_whatever_its_name(self, tmp_path):
        assert find_model_roots(zipped(tmp_path / "download", below("model"))) == ["model"]

    def test_any_other_file_is_neither_folder_nor_zip(self, tmp_path):
        (tmp_path / "notes.txt").write_text("hello")
        with pytest.raises(StoreError, match="neither a folder nor a zip"):
            find_model_roots(tmp_path / "notes.txt")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
    def test_a_pipe_is_refused_without_waiting_for_it(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(StoreError, match="nor a regular file"):
            find_model_roots(tmp_path / "pipe")


class TestHashes:
    def test_every_file_is_hashed_under_its_posix_path_in_order(self, tmp_path):
        folder = add(tmp_path / "f", {"b/z.bin": b"z" * (CHUNK + 1), "a.txt": b"", "b/.hidden": b"h", "B": b"B"})
        expected = {name: hashlib.sha256(data).hexdigest() for name, data in contents(folder).items()}
        assert tree_sha256(folder) == expected
        assert list(tree_sha256(folder)) == ["B", "a.txt", "b/.hidden", "b/z.bin"]

    def test_a_link_is_refused_since_its_content_may_change(self, tmp_path):
        folder = add(tmp_path / "f", {"a": b"a"})
        (folder / "link").symlink_to("a")
        with pytest.raises(StoreError, match="link is a link"):
            tree_sha256(folder)

    def test_a_missing_folder_or_file_is_named(self, tmp_path):
        with pytest.raises(StoreError, match="gone is no folder"):
            tree_sha256(tmp_path / "gone")
        with pytest.raises(StoreError, match="gone cannot be read"):
            file_sha256(tmp_path / "gone")
