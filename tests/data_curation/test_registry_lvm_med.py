"""The registry of LVM-Med's 55 sets against the paper's numbers, and what `plan` makes of it."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from meddino_data_curation.cli import main
from meddino_data_curation.sources.licences import needs_decision
from meddino_data_curation.sources.path_globs import glob_pattern
from meddino_data_curation.sources.registry import load_registry
from PIL import Image

REGISTRY = {entry.name: entry for entry in load_registry(Path("lvm_med"))}
# The paper's test tasks by the data that they are tested on; box prompts have no data of their own.
TASKS = {
    "isic2018", "jsrt", "kvasir", "drive", "buid", "brats2018", "mmwhs_ct", "mmwhs_mri", "prostate_sites", "vindr_cxr",
    "kvasir_detection", "fgadr", "brain_tumor_4",
}  # fmt: skip


def test_registry__holds_the_papers_1294015_images_and_volumes():
    assert len(REGISTRY) == 55
    assert sum(entry.listed for entry in REGISTRY.values()) == 1_294_015  # the paper's own sum
    assert REGISTRY["patch_camelyon"].listed == 327_680 and REGISTRY["mmwhs_mri"].listed == 40


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_registry__entry_says_where_what_was_used_and_what_is_held_out(name):
    entry = REGISTRY[name]
    assert (
        entry.url.startswith("http") and entry.used and entry.held_out_rule and entry.modality in ("ct", "mr", "image", "auto")
    )
    assert all(glob_pattern(part.files) for part in entry.parts)
    assert set(entry.tasks) <= TASKS


def test_registry__what_shares_data_with_a_task_says_so():
    sharing = {name for name, entry in REGISTRY.items() if entry.tasks}
    assert sharing == {
        "hyper_kvasir", "kvasir_v2", "isic2019", "brats2018", "mmwhs_ct", "mmwhs_mri", "prostatex", "vindr_cxr", "eyepacs",
    }  # fmt: skip
    assert "15,000" in REGISTRY["vindr_cxr"].used and "70/10/20" in REGISTRY["vindr_cxr"].held_out_rule


def test_registry__half_of_the_licences_need_a_decision():
    restricted = {name for name, entry in REGISTRY.items() if needs_decision(entry.licence.id)}
    assert {"eyepacs", "isic2019", "kits", "vindr_cxr", "adni1_3t"} <= restricted and "hc18" not in restricted


def test_plan__pictures_are_found_held_out_and_curated_as_pictures(tmp_path, capsys):
    for part, count in (("training_set", 3), ("test_set", 2)):
        folder = tmp_path / "HC18" / part
        folder.mkdir(parents=True)
        for number in range(count):
            noise = np.random.default_rng(number).integers(0, 255, (64, 64), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{number:03d}_HC.png")
    plan = ["plan", "--registry", "lvm_med", "--root", str(tmp_path), "--out", str(tmp_path / "sets.yaml")]
    assert main(plan) == 0
    said = capsys.readouterr().out
    assert "train 3/999, test 2/335" in said and "110079 images in the paper's table" in said and "1 of 55 sets" in said
    planned = yaml.safe_load((tmp_path / "sets.yaml").read_text())
    assert [(source["name"], source["modality"]) for source in planned["sources"] + planned["held_out"]] == [
        ("hc18", "image"),
        ("hc18-test", "image"),
    ]


def test_plan__says_what_was_not_compared_with_a_sets_own_page(tmp_path, capsys):
    (tmp_path / "HC18" / "training_set").mkdir(parents=True)
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "HC18" / "training_set" / "000_HC.png")
    assert main(["plan", "--registry", "lvm_med", "--root", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "- hc18, citation and licence not verified here: read its page" in said
    open_ones = [entry for entry in REGISTRY.values() if entry.caveat]
    assert said.count("not verified here") == len(open_ones) and all(entry.verified is not None for entry in REGISTRY.values())
    assert REGISTRY["patch_camelyon"].caveat == "" and REGISTRY["hyper_kvasir"].caveat == "licence not verified here"


def test_plan__an_unknown_registry_is_one_line(tmp_path, capsys):
    assert main(["plan", "--registry", "lvmmed", "--root", str(tmp_path)]) == 2
    assert "no registry in" in capsys.readouterr().err
