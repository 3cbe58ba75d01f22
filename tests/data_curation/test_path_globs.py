import fnmatch

import pytest
from meddino_data_curation.sources.path_globs import escaped, glob_pattern

from meddino.core.errors import ConfigError


@pytest.mark.parametrize(
    ("glob", "matching", "others"),
    [
        ("**/*", ["a", "a/b", "a/b/c.nii"], []),
        ("*.nii", ["a.nii", ".nii"], ["a/b.nii", "a.nii.gz"]),
        ("**/imagesTr/*.nii.gz", ["imagesTr/a.nii.gz", "x/y/imagesTr/a.nii.gz"], ["imagesTr/b/a.nii.gz", "NimagesTr/a.nii.gz"]),
        ("v-{?,1?,20}.nii{,.gz}", ["v-3.nii", "v-17.nii.gz", "v-20.nii"], ["v-21.nii", "v-170.nii", "v-3.gz"]),
        ("{a,b{c,d}e}", ["a", "bce", "bde"], ["b", "ace", "ade"]),
        ("s[0-9][!0-3]", ["s05", "s94"], ["s01", "sx5"]),
        ("a,b}", ["a,b}"], ["a", "b}"]),
        ("a.b+c", ["a.b+c"], ["aXb+c", "a.bbc"]),
    ],
)
def test_glob_pattern__means_what_shells_mean(glob, matching, others):
    assert [path for path in [*matching, *others] if glob_pattern(glob).fullmatch(path)] == matching


def test_glob_pattern__agrees_with_fnmatch_inside_a_name():
    names = ["a1.nii", "ab.nii", "b.nii", "a.nii", "1[.nii", "Ab.nii", "a-.nii"]
    for glob in ("a?.nii", "*.nii", "[ab]*.nii", "a[!b].nii", "a[-b].nii", "?[[].nii"):
        assert [n for n in names if glob_pattern(glob).fullmatch(n)] == [n for n in names if fnmatch.fnmatchcase(n, glob)], glob


def test_escaped__matches_the_path_and_nothing_else():
    for path in ("a/b", "x[1]/{y,z}/*?.nii", "日本/a b"):
        assert glob_pattern(escaped(path)).fullmatch(path)
    assert not glob_pattern(escaped("a*")).fullmatch("ab")


@pytest.mark.parametrize("glob", ["{a,b", "[z-a]"])
def test_glob_pattern__what_cannot_be_read_is_refused(glob):
    with pytest.raises(ConfigError, match="glob"):
        glob_pattern(glob)
