import json
from pathlib import Path

import numpy as np
import pytest
from meddino_evaluation.data.case import Case, doubtful_patients
from meddino_evaluation.data.dataset import LabelledDataset, with_patients
from meddino_evaluation.data.labels import LabelScheme
from meddino_evaluation.data.splits import (
    Split,
    check_twins,
    choose_split,
    few_cases,
    left_out,
    make_folds,
    of_folds,
    read_folds,
)

from meddino.core.errors import ConfigError


def dataset(tmp_path: Path, names: list[str]) -> LabelledDataset:
    cases = []
    for name in names:
        path = tmp_path / f"{name}_0000.nii.gz"
        path.write_text(name)
        cases.append(Case(name, (path,), None, patient=name))
    return LabelledDataset("d", tmp_path, tuple(cases), LabelScheme(("a",), ((1,),)), ("CT",))


def test_make_folds__equal_nnunets_own(tmp_path):
    from sklearn.model_selection import KFold

    names = [f"case_{i:03d}" for i in range(17)]
    wanted = [
        {"train": [names[i] for i in train], "val": [names[i] for i in val]}
        for train, val in KFold(5, shuffle=True, random_state=12345).split(np.array(names))
    ]
    assert make_folds(dataset(tmp_path, names).cases, 5) == wanted


def test_make_folds__directory_order_does_not_matter(tmp_path):
    cases = dataset(tmp_path, list("abcdefgh")).cases
    assert make_folds(cases, 4) == make_folds(tuple(reversed(cases)), 4)
    assert make_folds(cases, 4) != make_folds(cases, 4, seed=1)


def test_folds__a_patient_stays_on_one_side(tmp_path):
    data = with_patients(dataset(tmp_path, [f"p{p}_scan{s}" for p in range(6) for s in range(3)]), "^(p[0-9]+)_")
    for fold in range(3):
        split = choose_split(data.cases, (), make_folds(data.cases, 3), fold, val_fraction=0.3, seed=0)
        sides = [{name.split("_")[0] for name in part} for part in (split.train, split.val, split.test)]
        assert sum(len(side) for side in sides) == 6
        assert set.union(*sides) == {f"p{p}" for p in range(6)}
        assert len(split.train) + len(split.val) + len(split.test) == 18


def test_patients_file__gives_patient_and_site(tmp_path):
    data = dataset(tmp_path, ["a", "b"])
    (tmp_path / "patients.csv").write_text("case,patient,site\na,p1,Ulm\nb,p1,Ulm\n")
    assert {(case.patient, case.site) for case in with_patients(data, None).cases} == {("p1", "Ulm")}
    (tmp_path / "patients.csv").write_text("case,patient\na,p1\n")
    with pytest.raises(ConfigError, match="'b'"):
        with_patients(data, None)


def test_splits_final__read_and_checked(tmp_path):
    data = dataset(tmp_path, list("abcd"))
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": ["a", "b"], "val": ["c", "d"]}]))
    folds = read_folds(path)
    assert choose_split(data.cases, (), folds, 0, 0.0, 0).test == ("c", "d")
    with pytest.raises(ConfigError, match="fold 1 does not exist"):
        choose_split(data.cases, (), folds, 1, 0.0, 0)
    path.write_text(json.dumps([{"train": ["a", "nobody"], "val": ["c"]}]))
    with pytest.raises(ConfigError, match="nobody"):
        choose_split(data.cases, (), read_folds(path), 0, 0.0, 0)
    path.write_text(json.dumps([{"train": ["a"], "val": []}]))
    with pytest.raises(ConfigError, match="test part is empty"):
        choose_split(data.cases, (), read_folds(path), 0, 0.0, 0)


def test_split__the_same_patient_or_image_on_two_sides_is_refused_with_the_names(tmp_path):
    data = with_patients(dataset(tmp_path, ["p1_a", "p1_b", "p2_a"]), "^(p[0-9])")
    with pytest.raises(ConfigError, match=r"p1 \(train and test\)"):
        choose_split(data.cases, (), [{"train": ["p1_a", "p2_a"], "val": ["p1_b"]}], 0, 0.0, 0)
    with pytest.raises(ConfigError, match=r"'c' in test .* 'a' in train"):
        check_twins(Split(0, ("a", "b"), (), ("c",)), {"a": ["1"], "b": ["2"], "c": ["3", "1"]}, "fold 0")


def test_too_many_folds__is_said(tmp_path):
    with pytest.raises(ConfigError, match="2 patients allow 2 to 2 folds"):
        make_folds(dataset(tmp_path, ["a", "b"]).cases, 5)


def test_few_cases__nested_and_by_patient(tmp_path):
    data = with_patients(dataset(tmp_path, [f"p{p}_{s}" for p in range(5) for s in "ab"]), "^(p[0-9])")
    train = [case.name for case in data.cases]
    two, three = few_cases(train, data.cases, 2, 1.0, seed=3), few_cases(train, data.cases, 3, 1.0, seed=3)
    assert len(two) == 4
    assert set(two) < set(three)
    assert few_cases(train, data.cases, None, 0.4, seed=3) == two
    assert len({few_cases(train, data.cases, 1, 1.0, seed=seed) for seed in range(20)}) > 1
    with pytest.raises(ConfigError, match=r"labels\.train_cases is 9"):
        few_cases(train, data.cases, 9, 1.0, 0)


def test_patient_pattern__wrong_ones(tmp_path):
    data = dataset(tmp_path, ["a1"])
    for pattern, words in (("(", "no regular expression"), ("a", "has no group"), ("(b)", "does not match case 'a1'")):
        with pytest.raises(ConfigError, match=words):
            with_patients(data, pattern)


@pytest.mark.parametrize(
    ("fold", "words"),
    [
        ({"train": ["a", "b", "a"], "val": ["c"]}, r"fold 0 names \['a'\] twice"),
        ({"train": ["a", "b"], "val": ["b"]}, r"fold 0 names \['b'\] twice"),
        ({"train": ["a"], "val": ["b"], "test": ["c"]}, "fold 0 has the list 'test'"),
    ],
)
def test_splits_final__a_case_twice_and_a_list_that_is_not_read_are_refused(tmp_path, fold, words):
    (tmp_path / "splits_final.json").write_text(json.dumps([fold]))
    with pytest.raises(ConfigError, match=words):
        read_folds(tmp_path / "splits_final.json")


def test_doubtful_patients__one_written_in_two_ways_and_nobody():
    names = ["P0", "p0", "A-1", "a_01", "1.2.3", "12.3", "B", "B", "NA", "NA"]
    cases = [Case(str(number), (Path("x"),), 0, patient) for number, patient in enumerate(names)]
    assert doubtful_patients(cases) == [
        "patients taken for different people whose names differ in writing alone: 'A-1' and 'a_01', 'P0' and 'p0'",
        "2 cases have the patient 'NA', and are taken for one person's",
    ]
    assert doubtful_patients(cases[4:8]) == []


def test_left_out__cases_of_no_part_are_counted_and_named(tmp_path):
    cases = dataset(tmp_path, ["a", "b", "c"]).cases
    assert left_out(cases, of_folds([{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}])) == (
        "1 of 3 cases are in no part of the split and are left out: c"
    )
    assert left_out(cases, of_folds([{"train": ["a", "b"], "val": ["c"]}])) == ""
