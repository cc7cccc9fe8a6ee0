"""Model cards: strict, complete, and as the published catalogue says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from mshub import catalogue
from mshub.catalogue import Catalogue, Channel, ModelCard, Weights, draft_card, dump_card, load_card
from mshub.errors import CatalogueError, LabelError

MINIMAL = """
id = "spleen-ct"
title = "Spleen"
site = "abdomen"
modality = "CT"
target = "spleen"
status = "local"
generation = 2
"""

FULL = """
id = "brain-tumor-mr"
title = 'Brain tumour "glioma"'
site = "brain"
modality = "MR"
target = "tumour core and oedema"
status = "released"
description = "Two channels | one case"
generation = 2
configuration = "3d_fullres"
labels = ["oedema", "tumour core"]
input_clip = [-0.5, 1000]
orientation = "LPS"
training_scans = 1251
dsc = 0.9
dsc_source = "current catalogue"
licence = "CC-BY-4.0"
access = "open"
notes = ["größer als 1 cm", "skull-stripped"]

[[channels]]
name = "T1w"
sequence = "T1w contrast-enhanced"

[[channels]]
name = "PET"
modality = "PT"

[weights]
kind = "https"
url = "https://example.org/model.zip"
sha256 = "%s"

[[links]]
title = "A paper"
url = "https://example.org/paper"
""" % ("0123456789abcdef" * 4)

WEIGHTS = '\n[weights]\nkind = "gdrive-folder"\nid = "abc"\n'


@pytest.fixture
def write(tmp_path):
    def write_card(text, name="spleen-ct.toml", folder="cards"):
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_card


@pytest.fixture
def complaint(write):
    def complain(text):
        path = write(text)
        with pytest.raises(CatalogueError) as caught:
            load_card(path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    return complain


def with_key(key, value):
    """Return the minimal card with one key set to a TOML value, replacing the key where it is there."""
    lines = [line for line in MINIMAL.splitlines() if not line.startswith(f"{key} =")]
    return "\n".join([*lines, f"{key} = {value}", ""])


def with_status(status):
    return with_key("status", f'"{status}"')


# -- reading a card --------------------------------------------------------------------------------------------------


def test_a_minimal_card_leaves_the_unknown_unknown(write):
    card = load_card(write(MINIMAL))
    assert (card.id, card.modality, card.generation) == ("spleen-ct", "CT", 2)
    assert (card.labels, card.dsc, card.weights, card.licence, card.input_clip) == (None,) * 5
    assert (card.channels, card.notes, card.links) == ((), (), ())


def test_a_full_card_is_read_key_by_key(write):
    card = load_card(write(FULL))
    assert card.labels == ("oedema", "tumour core")
    assert card.input_clip == (-0.5, 1000.0)
    assert card.channels[0] == Channel(name="T1w", sequence="T1w contrast-enhanced")
    assert card.channels[1].modality == "PT"
    assert card.weights.page == "https://example.org/model.zip"
    assert card.links[0].title == "A paper"
    assert card.notes[0] == "größer als 1 cm"


def test_the_number_of_scans_may_be_a_number_or_a_bound(write):
    assert load_card(write(with_key("training_scans", "1018"))).training_scans == "1018"
    assert load_card(write(with_key("training_scans", '">3500"'))).training_scans == ">3500"


def test_a_card_outside_a_catalogue_may_have_any_file_name(write):
    assert load_card(write(MINIMAL, name="card.toml")).id == "spleen-ct"


def test_a_path_may_be_a_string(write):
    assert load_card(str(write(MINIMAL))).id == "spleen-ct"


def test_a_card_cannot_be_changed(write):
    card = load_card(write(MINIMAL))
    with pytest.raises(ValidationError):
        card.title = "Liver"


@pytest.mark.parametrize("text", ["id = \n", "id = 'a'\nid = 'b'\n", "not toml at all\n"])
def test_broken_toml_is_reported_with_its_file_and_line(complaint, text):
    assert "at line " in complaint(text)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(CatalogueError, match="nowhere"):
        load_card(tmp_path / "nowhere.toml")


def test_a_file_that_is_no_text_is_reported(tmp_path):
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CatalogueError, match=r"binary\.toml"):
        load_card(path)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["id", "title", "site", "modality", "target", "status"])
def test_a_missing_key_is_named(complaint, key):
    text = "\n".join(line for line in MINIMAL.splitlines() if not line.startswith(f"{key} ="))
    assert f"key {key!r}: found nothing" in complaint(text)


@pytest.mark.parametrize(
    ("typo", "meant"), [("licens", "licence"), ("lables", "labels"), ("training_scan", "training_scans")]
)
def test_an_unknown_key_is_an_error_with_a_suggestion(complaint, typo, meant):
    message = complaint(MINIMAL + f'{typo} = "x"\n')
    assert f"key {typo!r}: found an unknown key. Did you mean {meant!r}" in message


def test_an_unknown_key_unlike_any_other_lists_the_known_ones(complaint):
    message = complaint(MINIMAL + "zzz = 1\n")
    assert "Did you mean" not in message
    assert "id, title, site, modality" in message


@pytest.mark.parametrize(
    ("table", "where", "meant"),
    [
        ('[weights]\nkindd = "https"\n', "weights.kindd", "kind"),
        ('[[channels]]\nnmae = "CT"\n', "channels.0.nmae", "name"),
        ('[[links]]\ntitel = "A"\n', "links.0.titel", "title"),
    ],
)
def test_unknown_keys_in_tables_get_a_suggestion_too(complaint, table, where, meant):
    assert f"key {where!r}: found an unknown key. Did you mean {meant!r}?" in complaint(MINIMAL + table)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("id", "'Spleen'", "pattern"),
        ("id", "'-spleen'", "pattern"),
        ("id", "'a'", "pattern"),
        ("id", "'../spleen'", "pattern"),
        ("id", "'spleen ct'", "pattern"),
        ("title", "''", "at least 1 character"),
        ("title", "3", "a valid string"),
        ("modality", "'ct'", "'CT', 'MR', 'PT', 'US' or 'other'"),
        ("status", "'beta'", "'released', 'announced', 'bundled' or 'local'"),
        ("generation", "3", "1 or 2"),
        ("dsc", "82", "less than or equal to 1"),
        ("dsc", "-0.1", "greater than or equal to 0"),
        ("training_scans", "true", "a valid string"),
        ("training_scans", "''", "at least 1 character"),
        ("input_clip", "[275, -125]", "low < high"),
        ("input_clip", "[1, 1]", "low < high"),
        ("orientation", "'xyz'", "pattern"),
        ("orientation", "'LRS'", "one of L and R, one of A and P, one of S and I"),
        ("orientation", "'RRS'", "one of L and R, one of A and P, one of S and I"),
        ("labels", "[]", "at least 1 item"),
        ("labels", "['liver', 'Liver']", "told apart"),
        ("labels", "['background', 'liver']", "told apart"),
        ("labels", "'liver'", "a valid tuple"),
        ("notes", "'one'", "a valid tuple"),
    ],
)
def test_a_wrong_value_is_reported_with_key_found_and_expected(complaint, key, value, expected):
    message = complaint(with_key(key, value))
    assert f"key {key!r}: found" in message
    assert expected in message


@pytest.mark.parametrize("bounds", ["[nan, 1]", "[-inf, 1]", "[0]", "[0, 1, 2]", "['low', 1]"])
def test_an_input_clip_is_two_finite_numbers(complaint, bounds):
    assert "input_clip" in complaint(with_key("input_clip", bounds))


def test_all_faults_are_reported_at_once(complaint):
    message = complaint(MINIMAL + 'dsc = 82\nlables = ["a"]\ngeneratoin = 2\n')
    assert all(f"key {key!r}" in message for key in ("dsc", "lables", "generatoin"))


@pytest.mark.parametrize(
    "weights",
    [
        'kind = "gdrive-folder"',
        'kind = "gdrive-file"',
        'kind = "https"',
        'kind = "https"\nid = "abc"',
        'kind = "gdrive-file"\nurl = "https://example.org"',
        'kind = "gdrive-file"\nid = "abc"\nurl = "https://example.org"',
        'kind = "https"\nurl = "ftp://example.org"',
        'kind = "https"\nurl = "file:///etc/passwd"',
        'kind = "gdrive-file"\nid = "https://drive.google.com/abc"',
        'kind = "ftp"\nurl = "https://example.org"',
        'kind = "gdrive-file"\nid = "abc"\nsha256 = "123"',
    ],
)
def test_weights_need_the_address_of_their_kind(complaint, weights):
    message = complaint(with_status("released") + f"\n[weights]\n{weights}\n")
    assert "key 'weights" in message
    assert "expected" in message


def test_the_message_says_which_address_is_needed(complaint):
    message = complaint(with_status("released") + '\n[weights]\nkind = "gdrive-file"\nurl = "https://example.org"\n')
    assert "kind 'gdrive-file' with 'id', found 'url'" in message


# -- keys that must agree --------------------------------------------------------------------------------------------


def test_a_released_model_has_weights(complaint, write):
    assert "a released model needs [weights]" in complaint(with_status("released"))
    assert load_card(write(with_status("released") + WEIGHTS)).weights.id == "abc"


def test_an_announced_model_has_no_weights_yet(complaint, write):
    assert "an announced model has no [weights]" in complaint(with_status("announced") + WEIGHTS)
    assert load_card(write(with_status("announced"))).weights is None


def test_a_local_model_may_have_weights_or_not(write):
    assert load_card(write(MINIMAL)).weights is None
    assert load_card(write(MINIMAL + WEIGHTS)).weights.kind == "gdrive-folder"


@pytest.mark.parametrize(
    "text",
    [
        with_status("bundled"),
        with_status("bundled") + WEIGHTS,
        with_status("released") + '\n[weights]\nkind = "bundled"\n',
    ],
)
def test_bundled_weights_and_bundled_status_go_together(complaint, text):
    assert "'bundled' go together" in complaint(text)


def test_only_an_announced_model_may_leave_the_generation_open(complaint, write):
    text = "\n".join(line for line in MINIMAL.splitlines() if not line.startswith("generation"))
    assert "'generation' (1 or 2)" in complaint(text)
    assert load_card(write(text.replace('"local"', '"announced"'))).generation is None


def test_a_figure_says_which_edition_it_is_from(complaint, write):
    assert "dsc_source" in complaint(MINIMAL + "dsc = 0.9\n")
    assert load_card(write(MINIMAL + 'dsc = 0.9\ndsc_source = "own test set"\n')).dsc == 0.9


# -- writing a card --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [MINIMAL, FULL], ids=["minimal", "full"])
def test_a_written_card_reads_back_equal(write, text):
    card = load_card(write(text))
    assert load_card(write(dump_card(card), name="again.toml")) == card


@pytest.mark.parametrize("card", Catalogue.load(), ids=lambda card: card.id)
def test_every_packaged_card_survives_being_written(write, card):
    assert load_card(write(dump_card(card))) == card


def test_a_written_card_has_no_empty_keys(write):
    text = dump_card(load_card(write(MINIMAL)))
    assert text.splitlines() == [line for line in MINIMAL.splitlines() if line]


# -- drafting a card -------------------------------------------------------------------------------------------------

HIPPOCAMPUS_V1 = {
    "name": "Hippocampus",
    "description": "Left and right hippocampus",
    "licence": "CC-BY-SA 4.0",
    "modality": {"0": "MRI"},
    "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
    "numTraining": 260,
}
ABDOMEN_V2 = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "spleen": 2, "liver": 1},
    "numTraining": 12,
    "file_ending": ".nii.gz",
}


def test_a_draft_takes_what_version_one_knows():
    card = draft_card("hippocampus", HIPPOCAMPUS_V1)
    assert (card.id, card.title, card.modality, card.generation) == ("hippocampus", "Hippocampus", "MR", 1)
    assert (card.labels, card.target) == (("Anterior", "Posterior"), "Anterior, Posterior")
    assert (card.training_scans, card.licence, card.status) == ("260", "CC-BY-SA 4.0", "local")
    assert card.channels == (Channel(name="MRI"),)


def test_a_draft_takes_what_version_two_knows():
    card = draft_card("abdomen", ABDOMEN_V2)
    assert (card.title, card.modality, card.generation) == ("abdomen", "CT", 2)
    assert card.labels == ("liver", "spleen")
    assert (card.licence, card.description, card.weights) == (None, None, None)


def test_a_drafted_card_can_be_written_and_read(write):
    card = draft_card("hippocampus", HIPPOCAMPUS_V1)
    assert load_card(write(dump_card(card))) == card


@pytest.mark.parametrize(
    ("channel", "modality"),
    [
        ("CT", "CT"), (" ct ", "CT"), ("MRI", "MR"), ("T1", "MR"), ("t1ce", "MR"), ("T2w", "MR"), ("FLAIR", "MR"),
        ("ADC", "MR"), ("PET", "PT"), ("rescale_to_0_1", "other"), ("noNorm", "other"),
    ],
)  # fmt: skip
def test_the_modality_is_guessed_from_the_first_channel(channel, modality):
    assert draft_card("my-model", ABDOMEN_V2 | {"channel_names": {"0": channel}}).modality == modality


def test_without_channels_the_modality_is_other_and_the_channels_stay_open():
    card = draft_card("my-model", {"labels": ABDOMEN_V2["labels"]})
    assert (card.modality, card.channels, card.training_scans) == ("other", (), None)


def test_channels_keep_the_order_of_their_numbers():
    names = {str(n): f"channel {n}" for n in (10, 2, 0, 1)}
    card = draft_card("my-model", ABDOMEN_V2 | {"channel_names": names})
    assert [channel.name for channel in card.channels] == ["channel 0", "channel 1", "channel 2", "channel 10"]


def test_the_american_spelling_of_licence_is_understood():
    assert draft_card("my-model", ABDOMEN_V2 | {"license": "MIT"}).licence == "MIT"


@pytest.mark.parametrize("empty", ["", "  ", None, ["MIT"]])
def test_facts_that_say_nothing_are_left_out(empty):
    card = draft_card("my-model", ABDOMEN_V2 | {"name": empty, "licence": empty, "description": empty})
    assert (card.title, card.licence, card.description) == ("my-model", None, None)


def test_region_models_are_drafted_in_order_of_predicted_value():
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    card = draft_card("my-model", {"labels": labels, "regions_class_order": [2, 1]})
    assert card.labels == ("core", "whole")


def test_an_impossible_id_is_refused():
    with pytest.raises(CatalogueError, match="My Model"):
        draft_card("My Model", ABDOMEN_V2)


def test_unusable_labels_are_refused():
    with pytest.raises(LabelError):
        draft_card("my-model", {"labels": {"background": 0}})


# -- the catalogue ---------------------------------------------------------------------------------------------------


def test_the_catalogue_knows_its_models_by_id():
    cards = Catalogue.load()
    assert cards.get("liver-lesion-ct").id == "liver-lesion-ct"
    assert "liver-lesion-ct" in cards
    assert "liver" not in cards
    assert len(cards) == len(cards.ids) == len(list(cards))


def test_an_unknown_id_is_refused_with_close_and_known_ids():
    with pytest.raises(CatalogueError) as caught:
        Catalogue.load().get("liver-lesions-ct")
    assert "Did you mean 'liver-lesion-ct'" in str(caught.value)
    assert "starter" in str(caught.value)
    assert caught.value.http_status == 404


def test_the_order_is_that_of_the_ids():
    ids = Catalogue.load().ids
    assert ids == tuple(sorted(ids))
    assert [card.id for card in Catalogue.load()] == list(ids)


def test_a_labs_own_cards_come_after_the_packaged_ones(write):
    folder = write(MINIMAL).parent
    write(MINIMAL.replace("spleen-ct", "aorta-ct"), name="aorta-ct.toml")
    assert Catalogue.load([folder]).ids == (*Catalogue.load().ids, "aorta-ct", "spleen-ct")


def test_a_labs_cards_may_lie_in_several_folders(write):
    first = write(MINIMAL).parent
    second = write(MINIMAL.replace("spleen-ct", "aorta-ct"), name="aorta-ct.toml", folder="more").parent
    assert Catalogue.load([first, second]).ids[-2:] == ("spleen-ct", "aorta-ct")


def test_other_files_beside_the_cards_are_ignored(write):
    folder = write("hello", name="README.md").parent
    assert Catalogue.load([folder]).ids == Catalogue.load().ids


def test_a_packaged_id_cannot_be_shadowed(write):
    path = write(MINIMAL.replace("spleen-ct", "starter"), name="starter.toml")
    with pytest.raises(CatalogueError) as caught:
        Catalogue.load([path.parent])
    assert str(path) in str(caught.value)
    assert str(catalogue.PACKAGED_CARDS / "starter.toml") in str(caught.value)


def test_one_id_in_two_folders_names_both_files(write):
    first, second = write(MINIMAL), write(MINIMAL, folder="more")
    with pytest.raises(CatalogueError) as caught:
        Catalogue.load([first.parent, second.parent])
    assert str(first) in str(caught.value)
    assert str(second) in str(caught.value)


def test_in_a_catalogue_the_file_is_called_like_the_model(write):
    path = write(MINIMAL, name="spleen.toml")
    with pytest.raises(CatalogueError, match=r"rename the file to spleen-ct\.toml"):
        Catalogue.load([path.parent])


def test_a_missing_folder_is_reported(tmp_path):
    with pytest.raises(CatalogueError, match="nowhere"):
        Catalogue.load([tmp_path / "nowhere"])


def test_one_bad_card_of_a_lab_is_named(write):
    path = write(MINIMAL + "lables = []\n")
    with pytest.raises(CatalogueError, match=r"spleen-ct\.toml"):
        Catalogue.load([path.parent])


def test_importing_the_catalogue_does_not_load_torch():
    code = "import sys, mshub.catalogue; sys.exit(bool({'torch', 'nnunetv2', 'monailabel'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- the published facts ---------------------------------------------------------------------------------------------

PUBLISHED = {
    # id: (modality, scans, dsc, kind of weights, Drive id)
    "hn-oar-ct": ("CT", ">3500", 0.82, None, None),
    "hn-tumor-ln-ct": ("CT", ">6800", 0.70, "gdrive-folder", "11L-TP2rve55v2BM59wJGR6s81H11FLuL"),
    "hn-tumor-ln-mr": ("MR", ">2000", None, None, None),
    "npc-gtv-mr": ("MR", ">1000", 0.89, "gdrive-file", "1gweae9uHaCRno1zKw_fhksYr_VDUaWg2"),
    "lung-tumor-ct": ("CT", "1018", 0.43, "gdrive-folder", "1kTWSqD14M94HK6gf5N_t9wk0OydFz0Nf"),
    "esophagus-tumor-ln-ct": ("CT", ">400", 0.60, "gdrive-folder", "1f3i1sYpjMoqNLOTa4VXXGCWlKN8pP59n"),
    "liver-lesion-ct": ("CT", ">1300", 0.80, "gdrive-folder", "15-vf6HHN37keZTDIr4KSoYd4tkvVpOqM"),
    "kidney-lesion-ct": ("CT", ">200", 0.81, "gdrive-folder", "1mgiZr5TTGB2ezrfObQl4qQJa1IgWr79w"),
    "breast-ctv-ct": ("CT", ">2300", 0.75, "gdrive-folder", "1t5Afz5iLcanRVRUVqCy-hPIdJcMlSlXY"),
    "stomach-tumor-ct": ("CT", ">500", 0.58, "gdrive-folder", "1mrrCjC6BZ5bjnNCqd73mUk4ekRZnaTxE"),
    "cervix-tumor-ln-ct": ("CT", ">400", 0.61, "gdrive-folder", "1t9go2EpuvWM4DZEfDG8d8n579w7yiPT2"),
}


@pytest.fixture(scope="module")
def packaged():
    return Catalogue.load()


def test_all_published_models_and_the_starter_have_a_card(packaged):
    assert set(packaged.ids) == {*PUBLISHED, "starter"}


@pytest.mark.parametrize("model_id", PUBLISHED)
def test_a_card_says_what_the_published_catalogue_says(packaged, model_id):
    card = packaged.get(model_id)
    kind, drive_id = (card.weights.kind, card.weights.id) if card.weights else (None, None)
    assert (card.modality, card.training_scans, card.dsc, kind, drive_id) == PUBLISHED[model_id]


@pytest.mark.parametrize("model_id", PUBLISHED)
def test_all_published_models_are_for_research_and_conditionally_accessed(packaged, model_id):
    card = packaged.get(model_id)
    assert card.licence == "research use; conditionally accessed during development"
    assert (card.access is not None) == (card.status == "released")


@pytest.mark.parametrize("model_id", PUBLISHED)
def test_what_was_not_published_is_not_invented(packaged, model_id):
    card = packaged.get(model_id)
    assert (card.labels, card.channels, card.configuration, card.orientation) == (None, (), None, None)


def test_every_figure_says_which_edition_it_is_from(packaged):
    assert all(card.dsc_source for card in packaged if card.dsc is not None)
    assert "earlier edition gave 0.83 on >3400 scans" in packaged.get("hn-oar-ct").dsc_source
    assert "earlier edition gave 0.72" in packaged.get("hn-tumor-ln-ct").dsc_source


def test_the_target_says_where_even_without_the_site(packaged):
    assert packaged.get("hn-oar-ct").target == "head and neck, 43 organs at risk"
    assert {card.target for card in packaged if card.id.startswith("hn-tumor-ln")} == {
        "head and neck, pan-tumour and lymph nodes"
    }


def test_two_models_are_announced(packaged):
    assert [card.id for card in packaged if card.status == "announced"] == ["hn-oar-ct", "hn-tumor-ln-mr"]


def test_only_the_nasopharynx_model_is_generation_one(packaged):
    assert [card.id for card in packaged if card.generation == 1] == ["npc-gtv-mr"]


def test_only_the_liver_model_clips_its_input(packaged):
    assert {card.id: card.input_clip for card in packaged if card.input_clip} == {"liver-lesion-ct": (-125.0, 275.0)}


def test_references_are_linked(packaged):
    links = {card.id: [link.url for link in card.links] for card in packaged if card.links}
    assert links["hn-oar-ct"] == ["https://arxiv.org/abs/2312.09576"]
    assert [url.rsplit("/", 1)[1] for url in links["npc-gtv-mr"]] == ["S016781402300018X", "S0360301624036447"]


def test_public_and_re_delineated_data_are_noted(packaged):
    assert "LIDC-IDRI" in packaged.get("lung-tumor-ct").notes[0]
    assert "re-delineated RADCURE" in packaged.get("hn-tumor-ln-ct").notes[0]


def test_the_starter_is_bundled_and_names_its_structures_in_order(packaged):
    card = packaged.get("starter")
    assert (card.status, card.weights, card.licence) == ("bundled", Weights(kind="bundled"), "Apache-2.0")
    assert card.labels == ("liver", "spleen", "kidney_right", "kidney_left", "liver_lesion")
    assert card.weights.page is None


@pytest.mark.parametrize(
    ("kind", "page"),
    [
        ("gdrive-folder", "https://drive.google.com/drive/folders/a_b-C"),
        ("gdrive-file", "https://drive.google.com/file/d/a_b-C/view"),
    ],
)
def test_weights_on_drive_have_a_page(kind, page):
    assert Weights(kind=kind, id="a_b-C").page == page


def test_a_card_is_ready_for_json(packaged):
    for card in packaged:
        assert ModelCard.model_validate_json(json.dumps(card.model_dump(mode="json"))) == card
