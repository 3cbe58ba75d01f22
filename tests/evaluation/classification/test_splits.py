import json
from dataclasses import replace
from unittest.mock import create_autospec

import numpy as np
import pytest
from meddino_evaluation.classification.datasets import LabelledSet
from meddino_evaluation.classification.evaluate import _overlap, choose_splits
from meddino_evaluation.data.leakage import LeakageCheck
from meddino_evaluation.data.splits import Split, check_twins, draw_splits, left_out, load_split, save_split

from meddino.core.errors import ConfigError

OPTIONS = {"repeats": 3, "val_fraction": 0.2, "test_fraction": 0.2, "seed": 0}


def _patients(dataset, names):
    return {case.patient for case in dataset.cases if case.name in set(names)}


def _splits(dataset, **changes):
    return draw_splits(dataset.cases, "the set", **{**OPTIONS, **changes})


@pytest.mark.parametrize(
    "name", ["ct_contrast", "ct_plane", "ham10000", "nih_chestxray14", "brain_mri", "chest_xray_pneumonia"]
)
def test_draw_splits__no_patient_on_two_sides_and_every_case_once(fake_set, name):
    dataset = fake_set(name)
    for split in _splits(dataset):
        parts = [_patients(dataset, ids) for ids in (split.train, split.val, split.test)]
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
        assert sorted(split.train + split.val + split.test) == sorted(case.name for case in dataset.cases)


def test_draw_splits__independent_of_order_and_seeded(fake_set):
    dataset = fake_set("ct_contrast")
    shuffled = LabelledSet(dataset.config, dataset.root, dataset.cases[::-1], dataset.has_patients)
    assert _splits(dataset) == _splits(shuffled)
    first, second, _ = _splits(dataset)
    assert first.test != second.test
    assert _splits(dataset, seed=1)[0].test != first.test


def test_draw_splits__given_test_stays_and_validation_comes_from_train(fake_set):
    dataset = fake_set("nih_chestxray14")
    listed = set((dataset.root / "test_list.txt").read_text().split())
    for split in _splits(dataset):
        assert set(split.test) == listed
        assert not _patients(dataset, split.val) & _patients(dataset, listed)
    chexpert = fake_set("chexpert")
    split = _splits(chexpert)[0]
    assert all("/valid/" in name for name in split.test)
    assert all("/train/" in name for name in (*split.train, *split.val))


def test_draw_splits__a_patient_in_two_given_parts_is_refused_by_name(fake_set):
    dataset = fake_set("nih_chestxray14")
    cases = list(dataset.cases)
    thief = next(case for case in cases if case.split == "test")
    victim = next(place for place, case in enumerate(cases) if case.split == "train")
    cases[victim] = replace(cases[victim], patient=thief.patient)
    with pytest.raises(ConfigError, match=rf"{thief.patient} \(train and test\)"):
        _splits(LabelledSet(dataset.config, dataset.root, tuple(cases), True))


def test_choose_splits__a_class_that_train_lacks_is_refused_by_name(fake_set, quick):
    dataset = fake_set("brain_mri")
    cases = tuple(
        replace(case, split="test" if case.label == 2 else ("train", "val")[i % 4 == 0], patient=case.name)
        for i, case in enumerate(dataset.cases)
    )
    with pytest.raises(ConfigError, match="no training case of class pituitary"):
        choose_splits(LabelledSet(dataset.config, dataset.root, cases, True), quick())


def test_draw_splits__too_few_patients(fake_set):
    dataset = fake_set("ct_contrast")
    few = tuple(replace(case, patient=f"p{i % 2}") for i, case in enumerate(dataset.cases))
    with pytest.raises(ConfigError, match="2 patients"):
        _splits(LabelledSet(dataset.config, dataset.root, few, True))


def test_load_split__file_and_refusals(fake_set, tmp_path):
    dataset = fake_set("ct_contrast")
    split = _splits(dataset)[0]
    save_split(tmp_path / "split.json", "the set", split)
    again = load_split(tmp_path / "split.json", dataset.cases, "the set")
    assert (again.train, again.val, again.test) == (split.train, split.val, split.test)
    content = json.loads((tmp_path / "split.json").read_text())
    content["train"].append("nobody.nii.gz")
    (tmp_path / "unknown.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"nobody\.nii\.gz"):
        load_split(tmp_path / "unknown.json", dataset.cases, "the set")
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ConfigError, match="lists train, val and test"):
        load_split(tmp_path / "bad.json", dataset.cases, "the set")


def test_check_twins__the_same_image_on_two_sides(fake_set):
    dataset = fake_set("ct_contrast")
    split = _splits(dataset)[0]
    hashes = {case.name: [f"h{i}"] for i, case in enumerate(dataset.cases)}
    check_twins(split, hashes, "the set")
    twin = {**hashes, split.test[0]: hashes[split.train[0]]}
    with pytest.raises(ConfigError, match="same image") as error:
        check_twins(split, twin, "the set")
    assert split.test[0] in str(error.value)
    assert split.train[0] in str(error.value)


def test_overlap__each_part_with_volumes_of_the_corpus_is_named():
    seen = create_autospec(LeakageCheck, instance=True)
    seen.look.side_effect = lambda name, *hashes: "seen" in hashes
    notes = _overlap(Split(0, ("n1", "n2"), (), ("n3",)), {"n1": ("new", "seen"), "n2": ("new",), "n3": ("seen",)}, seen)
    assert [[name in one for name in ("n1", "n2", "n3")] for one in notes] == [[True, False, False], [False, False, True]]


def test_draw_splits__strata_keep_their_share(fake_set):
    dataset = fake_set("ct_contrast", 20)
    for split in _splits(dataset):
        labels = np.array([next(case.label for case in dataset.cases if case.name == name) for name in split.test])
        patients = {
            label: len(_patients(dataset, [n for n, one in zip(split.test, labels, strict=True) if one == label]))
            for label in (0, 1)
        }
        assert patients == {0: 4, 1: 4}


def test_choose_splits__rows_without_a_part_among_others_are_counted(fake_set, quick, caplog):
    dataset = fake_set("nih_chestxray14")
    place = next(place for place, case in enumerate(dataset.cases) if case.split == "train")
    cases = list(dataset.cases)
    cases[place] = replace(cases[place], split=None)
    splits = choose_splits(LabelledSet(dataset.config, dataset.root, tuple(cases), True), quick())
    lost = f"1 of {len(cases)} cases are in no part of the split and are left out: {cases[place].name}"
    assert lost in caplog.text and left_out(cases, splits) == lost
    assert "1 cases without a part are left out" in splits[0].origin
