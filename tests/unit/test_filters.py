from __future__ import annotations

import json
import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bank_tools import make_document
from msa import Document
from msa.errors import InputError
from msa.memory.bank import MemoryBank
from msa.memory.store import metadata_index
from msa.memory.store.catalog import Catalog, CatalogRow
from msa.memory.store.filters import MAX_CONDITIONS, MAX_VALUES, metadata_test
from msa.memory.store.records import SegmentEntry


@pytest.mark.parametrize(
    ("filter", "metadata", "passes"),
    [
        ({}, {}, True),
        ({"a": 1}, {"a": 1}, True),
        ({"a": 1}, {"a": 1.0}, True),
        ({"a": 1}, {"a": True}, False),
        ({"a": True}, {"a": 1}, False),
        ({"a": 0}, {"a": False}, False),
        ({"a": 1910}, {"a": "1910"}, False),
        ({"a": "1910"}, {"a": 1910}, False),
        ({"a": None}, {"a": None}, True),
        ({"a": None}, {}, False),
        ({"a": ""}, {"a": None}, False),
        ({"a": "n"}, {"a": None}, False),
        ({"a": "x"}, {"a": ["x", "y"]}, True),
        ({"a": ["x", "y"]}, {"a": ["x", "y"]}, True),
        ({"a": ("x", "y")}, {"a": ["x", "y"]}, True),
        ({"a": ["x"]}, {"a": ["x", "y"]}, False),
        ({"a": ["x"]}, {"a": "x"}, False),
        ({"a": {"eq": {"b": 1}}}, {"a": {"b": 1.0}}, True),
        ({"a": {"eq": {"b": 1}}}, {"a": {"b": True}}, False),
        ({"a": {"ne": 1}}, {"a": 2}, True),
        ({"a": {"ne": 1}}, {"a": [1, 2]}, False),
        ({"a": {"ne": 1}}, {}, True),
        ({"a": {"in": [1, "x"]}}, {"a": "x"}, True),
        ({"a": {"in": []}}, {"a": 1}, False),
        ({"a": {"nin": [1, "x"]}}, {"a": "x"}, False),
        ({"a": {"nin": [1, "x"]}}, {}, True),
        ({"a": {"gte": 1, "lt": 3}}, {"a": 1}, True),
        ({"a": {"gte": 1, "lt": 3}}, {"a": 3}, False),
        ({"a": {"gt": 1}}, {"a": "2"}, False),
        ({"a": {"gt": 1}}, {"a": True}, False),
        ({"a": {"gt": 1}}, {}, False),
        ({"a": {"lte": "2020-12"}}, {"a": "2020-11-30"}, True),
        ({"a": {"lte": "2020-12"}}, {"a": 5}, False),
        ({"a": {"lt": "b"}}, {"a": None}, False),
        ({"a": {"gt": 2**70}}, {"a": 2**71}, True),
        ({"a": 2**70}, {"a": 2**70}, True),
        ({"a": "x" * 2000}, {"a": "x" * 2000}, True),
        ({"a": "x" * 2000}, {"a": "x" * 2001}, False),
        ({"a": 1, "b": 2}, {"a": 1}, False),
        ({"or": [{"a": 1}, {"b": 2}]}, {"b": 2}, True),
        ({"or": []}, {}, False),
        ({"and": []}, {}, True),
        ({"a": 1, "or": [{"b": 1}, {"and": [{"c": 1}, {"d": 1}]}]}, {"a": 1, "c": 1, "d": 1}, True),
        ({"and": {"eq": 3}}, {"and": 3}, True),
    ],
)
def test_what_passes_is_defined_once_for_functions_and_for_the_catalog(
    filter, metadata, passes, tmp_path
):
    assert metadata_test(filter)(metadata) is passes
    catalog = stored(tmp_path, [metadata])
    assert catalog.passing(filter) == ([1] if passes else [])
    catalog.close()


def stored(folder, metadata):
    """A catalog of documents with these metadata, numbered from 1."""
    catalog = Catalog.create(folder)
    rows = [
        CatalogRow(i, Document(f"d{i}", "text"), f"d{i}", 0, 1, b"", json.dumps(m), 1, 1)
        for i, m in enumerate(metadata, start=1)
    ]
    numbers = [r.number for r in rows]
    entry = SegmentEntry(1, 1, "a", 1, "b", len(rows), len(rows))
    catalog.commit([(entry, numbers)], rows)
    return catalog


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        (["a"], "filter is list"),
        ({"a": {"gte": [1]}}, r"'gte' with \[1\]; expected a number or a text"),
        ({"a": {"lt": None}}, "'lt' with null"),
        ({"a": {"gt": True}}, "'gt' with true"),
        ({"a": {"in": 1}}, "'in' without a list"),
        ({"a": {"gtr": 1}}, r"operator 'gtr' \(do you mean 'gt.*'\?\); expected one of eq, ne"),
        ({"a": {"b": 1}}, r"operator 'b'.*write \{'a': \{'eq'"),
        ({"a": {}}, "operator ''"),
        ({"a": {1, 2}}, "no JSON value"),
        ({"a": float("nan")}, "no JSON value"),
        ({1: "a"}, "key 1; keys are text"),
        ({"and": ["a"]}, "filter is str"),
        ({"a": {"in": list(range(MAX_VALUES + 1))}}, "at most 256 with 10000"),
        ({"or": [{"a": i} for i in range(MAX_CONDITIONS + 1)]}, "257 conditions"),
    ],
)
def test_a_filter_that_cannot_be_read_says_why(filter, message, tmp_path):
    with pytest.raises(InputError, match=message):
        metadata_test(filter)
    catalog = stored(tmp_path, [{}])
    with pytest.raises(InputError, match=message):
        catalog.passing(filter)
    catalog.close()


def test_the_largest_filters_are_answered(tmp_path):
    catalog = stored(tmp_path, [{"a": i} for i in range(20)])
    assert len(catalog.passing({"a": {"in": list(range(10, MAX_VALUES))}})) == 10
    assert len(catalog.passing({"or": [{"a": i} for i in range(MAX_CONDITIONS)]})) == 20
    deep = {"a": 3}
    for _ in range(30):
        deep = {"and": [deep]}
    assert catalog.passing(deep) == [4]
    for _ in range(10):
        deep = {"and": [deep]}
    with pytest.raises(InputError, match="nested"):
        catalog.passing(deep)
    catalog.close()


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([0.5, 1.0, -2.0, 1e300, 2**65]),
    st.sampled_from(["", "a", "b", "ab", "1", "s", "true", "\0", "a\0b", "\u00e9"]),
)  # fmt: skip
values = st.one_of(scalars, st.lists(scalars, max_size=3), st.dictionaries(st.just("k"), scalars))
keys = st.sampled_from(["x", "y"])
ordered = scalars.filter(lambda v: isinstance(v, (str, int, float)) and not isinstance(v, bool))
conditions = st.one_of(
    scalars,
    st.dictionaries(st.sampled_from(["eq", "ne"]), values, min_size=1),
    st.dictionaries(st.sampled_from(["in", "nin"]), st.lists(values, max_size=3), min_size=1),
    st.dictionaries(st.sampled_from(["gt", "gte", "lt", "lte"]), ordered, min_size=1),
)
filters = st.recursive(
    st.dictionaries(keys, conditions, max_size=2),
    lambda inner: st.dictionaries(st.sampled_from(["and", "or"]), st.lists(inner, max_size=3)),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("catalogs")


@given(st.lists(st.dictionaries(keys, values), max_size=6), filters)
@settings(max_examples=40, deadline=None)
def test_the_catalog_and_the_function_agree(folder, metadata, filter):
    path = folder / str(len(list(folder.iterdir())))
    path.mkdir()
    catalog = stored(path, metadata)
    passes = metadata_test(filter)
    assert catalog.passing(filter) == [i for i, m in enumerate(metadata, 1) if passes(m)]
    assert catalog.passing(passes) == catalog.passing(filter)
    assert catalog.problems() == []
    catalog.close()


# ---- the index in a bank


def passing_ids(bank, filter):
    numbers = bank.catalog.passing(filter)
    assert numbers == bank.catalog.passing(metadata_test(filter))
    return [bank.get_number(n).document.id for n in numbers]


def test_the_index_follows_every_change(bank):
    bank.add([Document(f"d{i}", f"text {i}", metadata={"kind": i % 2}) for i in range(6)])
    assert passing_ids(bank, {"kind": 1}) == ["d1", "d3", "d5"]
    bank.update(Document("d1", "text 1", metadata={"kind": [7, 8]}))
    bank.update(Document("d3", "new text", metadata={"kind": 8}))
    bank.delete("d5")
    bank.compact()
    assert passing_ids(bank, {"kind": 1}) == []
    assert passing_ids(bank, {"kind": 8}) == ["d1", "d3"]
    assert bank.verify().ok


def test_an_index_that_an_older_version_passed_by_is_not_trusted_and_built_again(bank, path):
    bank.add([make_document("a", 1), make_document("b", 2)])
    bank.close()
    db = sqlite3.connect(path / "catalog.sqlite")
    db.execute("UPDATE documents SET metadata = '{\"seed\": 2}'")
    db.execute("UPDATE counters SET value = value + 1 WHERE name = 'generation'")
    db.commit()
    with MemoryBank.open(path, read_only=True) as reader:
        assert not metadata_index.is_kept(db)
        assert passing_ids(reader, {"seed": 2}) == ["a", "b"]
        assert reader.verify().ok
    with MemoryBank.open(path) as writer:
        assert metadata_index.is_kept(db)
        assert passing_ids(writer, {"seed": 2}) == ["a", "b"]
        assert writer.verify().ok
    db.close()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("DELETE FROM fields WHERE number = 1", "lacks values"),
        ("INSERT INTO fields VALUES ('x', 1, 1)", "values of no document"),
    ],
)
def test_a_damaged_index_is_found_and_repaired(bank, damage, words):
    bank.add([make_document("a", 1), make_document("b", 2)])
    bank.catalog._db.connection.execute(damage)
    assert words in bank.verify().problems[0]
    bank.repair()
    assert bank.verify().ok
    assert passing_ids(bank, {"seed": 1}) == ["a"]


def test_half_of_a_surrogate_pair_is_refused():
    for filter in ({"a": "\ud800"}, {"\ud800": 1}, {"a": {"in": ["x", "\ud800"]}}):
        with pytest.raises(InputError, match="no JSON value"):
            metadata_test(filter)
