"""Weights of corpora, data sets and modalities: shares, determinism, and that nothing is forgotten."""

from collections import Counter

import numpy as np
import pytest
from meddino_pretrain.data.sampler import CYCLE, SampleOrder, sample_order
from meddino_pretrain.run.config import SamplingConfig
from meddino_pretrain.run.recipe_changes import may_change

from meddino.core.errors import ConfigError
from meddino.data.joined_corpus import open_corpora
from tests.data.tiny_corpus import write_corpus


@pytest.fixture
def corpora(tmp_path):
    def write(name: str, count: int, datasets: list[str]) -> None:
        pixels = [np.full((16, 16), number, dtype=np.int16) for number in range(count)]
        write_corpus(tmp_path / name, pixels, volumes=[{"dataset": dataset} for dataset in datasets])

    write("a", 8, ["amos", "btcv"])
    write("b", 16, ["amos"] * 4)
    return open_corpora([tmp_path / "a", tmp_path / "b"])


def shares(corpora, sampling: SamplingConfig, of) -> dict:
    order = sample_order(corpora, sampling, seed=3, global_batch=8)
    counts = Counter(of(order.slice_of(number)) for number in range(CYCLE))
    return {name: count / CYCLE for name, count in counts.items()}


def test_without_weights__it_is_the_order_it_always_was(corpora):
    assert sample_order(corpora, SamplingConfig(), 3, 8) == SampleOrder(3, 24, 8)


def test_corpus__a_weight_is_relative_to_what_the_number_of_slices_gives(corpora):
    found = shares(corpora, SamplingConfig(corpus={"a": 6.0}), lambda index: "a" if index < 8 else "b")
    assert found == pytest.approx({"a": 6 * 8 / (6 * 8 + 16), "b": 16 / (6 * 8 + 16)}, abs=0.001)


def test_dataset__weights_multiply_and_zero_leaves_out(corpora):
    sampling = SamplingConfig(corpus={"b": 0.5}, dataset={"btcv": 0.0})
    found = shares(corpora, sampling, lambda index: "amos a" if index < 4 else "btcv" if index < 8 else "amos b")
    assert found == pytest.approx({"amos a": 4 / 12, "amos b": 8 / 12}, abs=0.001)
    order = sample_order(corpora, sampling, 3, 8)
    assert sorted(order.fallbacks(5)) == [*range(4), *range(8, 24)]


def test_order__is_a_function_of_seed_and_number_and_shows_every_slice_before_one_again(corpora):
    sampling = SamplingConfig(corpus={"a": 2.0})
    one, same, other = (sample_order(corpora, sampling, seed, 8) for seed in (3, 3, 4))
    numbers = range(CYCLE - 40, CYCLE + 40)
    assert [one.slice_of(number) for number in numbers] == [same.slice_of(number) for number in numbers]
    assert [one.slice_of(number) for number in numbers] != [other.slice_of(number) for number in numbers]
    seen = [index for number in range(3 * CYCLE) if (index := one.slice_of(number)) < 4]  # amos of a: one group
    for start in range(0, len(seen) - 4, 4):
        assert sorted(seen[start : start + 4]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        (SamplingConfig(corpus={"c": 1.0}), "corpus.sampling.corpus.c: there is no 'c'; there: a, b"),
        (SamplingConfig(dataset={"amoss": 1.0}), "there: amos, btcv"),
        (SamplingConfig(modality={"mr": 2.0}), "there: ct"),
        (SamplingConfig(modality={"ct": 0.0}), "every slice the weight 0"),
    ],
)
def test_weights__of_what_is_not_there_are_refused(corpora, sampling, said):
    with pytest.raises(ConfigError, match=said):
        sample_order(corpora, sampling, 3, 8)


def test_weights__of_a_name_that_two_corpora_have_are_refused(tmp_path):
    for site in ("paris", "lyon"):
        write_corpus(tmp_path / site / "corpus", [np.full((16, 16), 3, dtype=np.int16)])
    corpora = open_corpora([tmp_path / "paris" / "corpus", tmp_path / "lyon" / "corpus"])
    with pytest.raises(ConfigError, match="2 corpora have a folder of this name"):
        sample_order(corpora, SamplingConfig(corpus={"corpus": 2.0}), 3, 8)
    assert sample_order(corpora, SamplingConfig(modality={"ct": 2.0}), 3, 8)


def test_weights__are_settled_once_a_run_has_begun():
    assert not may_change("corpus.sampling.modality.mr: (absent) -> 2.0", [])
    assert may_change("corpus.allow_known_overlap: False -> True", [])


def test_balance__data_sets_come_equally_often_before_weights_count(corpora):
    def of(index):
        return "btcv" if 4 <= index < 8 else "amos"

    found = shares(corpora, SamplingConfig(balance="dataset"), of)
    assert found == pytest.approx({"amos": 0.5, "btcv": 0.5}, abs=0.001)
    found = shares(corpora, SamplingConfig(balance="dataset", dataset={"btcv": 3.0}), of)
    assert found == pytest.approx({"amos": 0.25, "btcv": 0.75}, abs=0.001)


def test_repeats__are_what_a_group_has_shown_since_the_pass_began(corpora):
    order = sample_order(corpora, SamplingConfig(balance="dataset"), 3, 8)
    assert not any(sample_order(corpora, SamplingConfig(), 3, 8).is_repeat(number) for number in range(100))
    shown: Counter[int] = Counter()
    for number in range(CYCLE - 48, CYCLE + 48):
        if number % 24 == 0:
            shown.clear()
        group = int(order.turns[number % CYCLE])
        wanted = shown[group] >= len(order.groups[group])
        shown[group] += 1
        if number >= (CYCLE - 48) // 24 * 24 + 24:  # from the first whole pass on
            assert order.is_repeat(number) == wanted
    assert any(order.is_repeat(number) for number in range(24)) and not order.is_repeat(0)
