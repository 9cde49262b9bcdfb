"""What the benchmarks measure, count and write. That something is fast is not tested here."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from conftest import make_tiny_model
from measuring import asking, encoding, report, routing, scale, synthetic, timing
from measuring.report import Report
from measuring.results import write_results
from measuring.sizes import parse_size
from measuring.synthetic import SHAPE_4B, Shape, SyntheticMemory
from msa.errors import InputError
from msa.ops.routing import routing_vectors
from msa.types import MemoryReader, Selection

CPU = torch.device("cpu")
SMALL = Shape("small", 4, 2, 32, 48, 64, heads=4, groups=2, dim=8, chunk_size=4, top_k=3)
F32 = torch.float32


# Sizes, exponents, timing


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("250k", 250_000), ("1M", 10**6), (" 1.5m", 1_500_000), ("1G", 10**9), ("64", 64)],
)
def test_sizes_are_read_as_people_write_them(text, tokens):
    assert parse_size(text) == tokens


@pytest.mark.parametrize("text", ["", "M", "many", "0", "-1M", "nan", "1e99", "1MM"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="give tokens as 250k, 1M or 100M"):
        parse_size(text)


def test_the_exponent_is_the_slope_of_the_logarithms():
    sizes = [10, 100, 1000, 5000]
    assert timing.exponent(sizes, [3.0 * s for s in sizes]) == pytest.approx(1.0)
    assert timing.exponent(sizes, [0.2] * 4) == pytest.approx(0.0)
    assert timing.exponent(sizes, [s**2.0 for s in sizes]) == pytest.approx(2.0)
    assert timing.exponent([10, 10], [1.0, 2.0]) is None
    assert timing.exponent([10, 20], [0.0, 2.0]) is None


def test_functions_take_turns_and_the_median_counts(monkeypatch):
    calls = []
    clock = {"a": iter([9.0, 1.0, 5.0, 2.0]), "b": iter([9.0, 4.0, 4.0, 7.0])}

    def fake(run, device):
        calls.append(run())
        return next(clock[calls[-1]])

    monkeypatch.setattr(timing, "seconds", fake)
    runs = {"a": lambda: "a", "b": lambda: "b"}
    assert timing.side_by_side(runs, CPU, 3, max_seconds=100) == {"a": 2.0, "b": 4.0}
    assert calls == ["a", "b"] * 4


def test_a_slow_function_is_not_run_again():
    calls = []
    runs = {"slow": lambda: calls.append("slow"), "other": lambda: calls.append("other")}
    times = timing.side_by_side(runs, CPU, 5, max_seconds=0.0)
    assert calls == ["slow", "other"]
    assert set(times) == {"slow", "other"}


def test_the_bandwidth_is_that_of_the_fastest_pass(monkeypatch):
    passes = iter([4.0, 2.0, 3.0, 1.0, 5.0, 8.0])
    monkeypatch.setattr(timing, "seconds", lambda run, device: (run(), next(passes))[1])
    tensors = [torch.ones(8, 2, 4, dtype=torch.bfloat16) for _ in range(3)]
    assert timing.bandwidth(tensors, repeats=1) == 3 * 8 * 2 * 4 * 2 / 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is asked of Linux")
def test_extra_bytes_are_the_peak_of_one_call():
    held = []

    def run():
        if not held:
            held.append(torch.ones(30_000_000))  # made by the first call, kept: no cost
        return torch.ones(20_000_000).sum()

    extra = timing.extra_bytes(run, CPU)
    assert extra is None or 70e6 < extra < 100e6


def test_the_machine_is_described():
    facts = timing.machine(CPU)
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["device"] == "cpu"
    assert not hasattr(os, "getloadavg") or float(facts["load average"]) >= 0


# Synthetic memories


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_keys_have_unit_length_and_no_two_are_alike(monkeypatch, dtype):
    monkeypatch.setattr(synthetic, "_BLOCK", 16)
    keys = synthetic.random_keys(200, SMALL, dtype, CPU, seed=1)
    assert keys.shape == (200, 2, 8)
    assert keys.dtype == dtype
    torch.testing.assert_close(keys.float().norm(dim=-1), torch.ones(200, 2), atol=2e-2, rtol=0)
    assert len(torch.unique(keys.flatten(1).float(), dim=0)) == 200
    assert torch.equal(keys, synthetic.random_keys(200, SMALL, dtype, CPU, seed=1))
    assert not torch.equal(keys, synthetic.random_keys(200, SMALL, dtype, CPU, seed=2))


def test_a_shape_makes_the_configuration_that_it_was_made_from():
    assert synthetic.shape_of(SMALL.config(4), "small") == SMALL
    config = SHAPE_4B.config(2)
    assert config.routing_layers == [1]
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 8, 128)


def test_a_memory_is_of_whole_documents():
    assert SMALL.chunks(1) == 8
    assert SMALL.chunks(4 * 8 * 3 + 1) == 24
    assert SHAPE_4B.key_bytes(10_000_000, torch.bfloat16) == 19531 * 8 * 1024 * 2


def memory(tokens=320, **changes) -> SyntheticMemory:
    values = {"key_dtype": F32, "dtype": F32, "device": CPU, "seed": 0, **changes}
    return SyntheticMemory(SMALL, [2, 3], tokens, **values)


def asked(tokens):
    queries = synthetic.random_queries(SMALL, tokens, CPU, 0)
    return routing_vectors(queries, SMALL.groups, "cosine"), torch.ones(1, tokens) > 0


def test_a_synthetic_memory_is_what_the_model_asks_for():
    reader = memory()
    assert isinstance(reader, MemoryReader)
    vectors, mask = asked(5)
    first, second = (reader.route(layer, vectors, mask) for layer in (2, 3))
    assert first.documents.shape == (1, 3)
    assert not torch.equal(first.scores, second.scores)  # layers have keys of their own
    assert reader.routing_seconds > 0
    content = reader.content(2, first)
    assert content.keys.shape == content.values.shape == (1, 24, 2, 8)
    assert content.mask.all()


def test_content_of_no_document_is_masked():
    chosen = Selection(torch.tensor([[4, -1]]), torch.tensor([[1.0, -torch.inf]]))
    content = memory().content(2, chosen)
    assert content.mask.tolist() == [[True] * 8 + [False] * 8]


def test_layers_share_keys_if_fewer_are_held():
    reader = memory(held_layers=1)
    vectors, mask = asked(5)
    assert len(reader.keys) == 1
    assert torch.equal(reader.route(2, vectors, mask).scores, reader.route(3, vectors, mask).scores)


def test_what_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(synthetic, "free_bytes", lambda _: 100_000)
    with pytest.raises(InputError, match=r"a memory of 1,000,000 tokens .* smaller --sizes"):
        memory(1_000_000)
    assert synthetic.layers_that_fit(20_000, 18, CPU) == 3
    assert synthetic.layers_that_fit(200_000, 18, CPU) == 0
    monkeypatch.setattr(synthetic, "free_bytes", lambda _: None)
    assert synthetic.layers_that_fit(200_000, 18, CPU) == 18


# Routing


def test_the_per_head_formulation_selects_what_we_select():
    keys = synthetic.random_keys(160, SMALL, F32, CPU, 3)
    counts = synthetic.equal_documents(160, CPU)
    queries = synthetic.random_queries(SMALL, 6, CPU, 3)
    mask = torch.tensor([[True, True, False, True, True, False]])
    ours = synthetic.route(queries, mask, synthetic.layer_index(keys, counts), 5)
    theirs = routing.per_head_route(queries, mask, keys, counts, 5)
    assert torch.equal(ours.documents, theirs.documents)
    torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-6, rtol=0)


def test_the_flat_index_finds_the_best_chunks():
    pytest.importorskip("faiss", reason="FAISS is an extra")
    keys = synthetic.random_keys(64, SMALL, torch.bfloat16, CPU, 0)
    vectors = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    search = routing.flat_index(keys, vectors, 4, threads=1)
    _, found = search()
    wanted = (vectors @ keys.flatten(1).float().T).topk(4).indices
    assert found.tolist() == wanted.tolist()


def test_without_faiss_its_rows_are_left_out_and_that_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    result = routing.routing([64], shape=SMALL, tokens=4, repeats=1)
    assert not any("faiss" in name for row in result.rows for name in row)
    assert routing.FAISS_NOTE in result.notes


class FakeFaiss(SimpleNamespace):
    """Counts vectors added and searched."""

    def __init__(self):
        self.seen = []
        super().__init__(omp_set_num_threads=lambda n: self.seen.append(("threads", n)))

    def IndexFlatIP(self, width):  # noqa: N802
        return SimpleNamespace(
            add=lambda x: self.seen.append(("add", x.shape, x.dtype.name, width)),
            search=lambda x, k: self.seen.append(("search", x.shape, k)),
        )


def test_the_ratios_of_routing_follow_from_its_seconds(monkeypatch):
    fake = FakeFaiss()
    monkeypatch.setitem(sys.modules, "faiss", fake)
    said = []
    result = routing.routing([64, 640], shape=SMALL, tokens=4, repeats=2, note=said.append)
    assert [(row["tokens"], row["dtype"]) for row in result.rows] == [
        (64, "bfloat16"),
        (640, "bfloat16"),
        (64, "float32"),
        (640, "float32"),
    ]
    assert len(said) == 4
    for row in result.rows:
        mine = row["msa_seconds"]
        assert row["keys_bytes"] == row["chunks"] * 16 * (2 if row["dtype"] == "bfloat16" else 4)
        once = row["keys_bytes"] / row["bandwidth_bytes_per_second"]
        assert row["read_once_seconds"] == pytest.approx(once)
        assert row["msa_over_read_once_ratio"] == pytest.approx(mine / once)
        for name in ("per_head", "faiss", "faiss_one_vector"):
            assert row[f"{name}_over_msa_ratio"] == pytest.approx(row[f"{name}_seconds"] / mine)
    assert ("add", (16, 16), "float32", 16) in fake.seen
    assert {("search", (4, 16), 3), ("search", (1, 16), 3)} <= set(fake.seen)
    assert set(result.exponents) >= {"MSA, bfloat16", "read once, float32"}


def test_the_per_head_formulation_is_left_out_where_it_would_be_too_large(monkeypatch):
    monkeypatch.setattr(routing, "PER_HEAD_CHUNKS", 8)
    small, large = routing.routing(
        [32, 64], dtypes=["float32"], shape=SMALL, tokens=4, repeats=1
    ).rows
    assert "per_head_seconds" in small
    assert "per_head_seconds" not in large


# Encoding


def test_documents_are_as_long_as_asked_and_the_same_for_a_seed():
    documents = encoding.random_documents(50, 64, 100, seed=3)
    lengths = [len(ids) for _, ids in documents]
    assert [number for number, _ in documents] == list(range(1, 51))
    assert 32 <= min(lengths) < 45
    assert 80 < max(lengths) <= 100
    assert documents == encoding.random_documents(50, 64, 100, seed=3)


def test_batches_hold_every_token_once_within_the_budget():
    documents = encoding.random_documents(40, 64, 100, seed=0)
    batches = encoding.padded(encoding.in_order(documents, 500), CPU)
    found = [
        row[:length].tolist()
        for ids, lengths in batches
        for row, length in zip(ids, lengths.tolist(), strict=True)
    ]
    assert found == [ids for _, ids in documents]
    assert all(ids.numel() <= 500 for ids, _ in batches)


def test_the_backbone_forward_is_the_models_without_logits(tiny_model):
    ids = torch.randint(2, 500, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = encoding.backbone_forward(tiny_model, ids)
        torch.testing.assert_close(tiny_model.lm_head(hidden), tiny_model(ids).logits)


def test_encoding_is_reported_beside_the_backbone(tiny_model, tiny_tokenizer):
    result = encoding.encoding(
        tiny_model, tiny_tokenizer, documents=12, longest=64, batch_tokens=128, repeats=1
    )
    (row,) = result.rows
    assert row["documents"] == 12
    for name in ("encode", "encoder", "arrival_order"):
        ratio = row[f"{name}_tokens_per_second"] / row["backbone_tokens_per_second"]
        assert row[f"{name}_over_backbone_ratio"] == pytest.approx(ratio)
    assert 0 <= row["bucketed_padding_share"] < row["arrival_order_padding_share"] < 1
    assert "compiled_tokens_per_second" not in row


# Asking


def test_a_question_is_routed_once_and_then_decoded():
    model = make_tiny_model()
    shape = synthetic.shape_of(model.config, "tiny")
    reader = SyntheticMemory(
        shape, model.config.routing_layers, 2048, key_dtype=F32, dtype=F32, device=CPU, seed=0
    )
    routed, fed = [], []
    route = reader.route
    reader.route = lambda layer, *rest: (routed.append(layer), route(layer, *rest))[1]
    model.model.embed_tokens.register_forward_hook(lambda _, args, __: fed.append(args[0].shape[1]))
    times = asking.ask_once(model, reader, tokens=6, new_tokens=3, seed=0)
    assert routed == [2, 3]
    assert fed == [6, 1, 1, 1]
    assert set(times) == {"routing", "prefill", "decode"}
    assert min(times.values()) > 0


def test_asking_adds_up(tiny_model):
    result = asking.asking(tiny_model, [512, 4096], tokens=6, new_tokens=2, repeats=1)
    assert [row["tokens"] for row in result.rows] == [512, 4096]
    for row in result.rows:
        generation = row["prefill_seconds"] + 2 * row["decode_seconds_per_token"]
        assert row["generation_seconds"] == pytest.approx(generation)
        assert row["question_seconds"] == pytest.approx(generation + row["routing_seconds"])
        assert row["keys_bytes"] == 2 * row["chunks"] * 2 * 16 * 4
    assert set(result.exponents) == {"routing", "generation", "question"}


# The 4B shapes


def small_scale(sizes, **changes) -> Report:
    values = {"shape": SMALL, "tokens": 4, "prefill_tokens": 6, "new_tokens": 2, "repeats": 1}
    return scale.scale(sizes, **{**values, **changes})


def test_scale_counts_all_layers_whatever_was_held():
    (row,) = small_scale([640], routing_layers=1).rows
    assert row["layers_held"] == 1
    assert row["layers_built"] == 2
    assert row["routing_seconds"] == pytest.approx(2 * row["routing_layer_seconds"])
    ratio = row["routing_seconds"] / row["read_once_seconds"]
    assert row["routing_over_read_once_ratio"] == pytest.approx(ratio)
    assert row["prefill_tokens_per_second"] > 0
    assert row["decode_tokens_per_second"] > 0
    assert row["routing_keys_bytes"] == 2 * 160 * 16 * 2


def test_scale_builds_no_model_if_told_so():
    (row,) = small_scale([640], layers=0).rows
    assert "prefill_tokens_per_second" not in row
    assert "routing_seconds" in row


def test_scale_holds_as_many_layers_as_fit(monkeypatch):
    free = 4 * 160 * 16 * 2
    monkeypatch.setattr(synthetic, "free_bytes", lambda _: free)
    (row,) = small_scale([640], layers=0).rows
    assert row["layers_held"] == 2
    with pytest.raises(InputError, match=r"one layer of 64,000 tokens takes .* are free on cpu"):
        small_scale([64_000], layers=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, "layers=3: expected an even number from 0 to 4"),
        ({"layers": 6}, "layers=6: expected an even number from 0 to 4"),
        ({"routing_layers": 3}, "routing layers=3: expected a number from 1 to 2"),
    ],
)
def test_scale_refuses_layers_that_the_shape_does_not_have(changes, message):
    with pytest.raises(InputError, match=message):
        small_scale([640], **changes)


def test_the_bytes_by_tier_are_those_of_the_paper():
    row = scale.tier_row(100_000_000, SHAPE_4B, torch.bfloat16, torch.bfloat16)
    total = row["routing_keys_bytes"] + row["content_bytes"]
    assert total == pytest.approx(172.8e9, rel=1e-4)
    assert row["content_bytes"] == 2 * row["routing_keys_bytes"]
    assert row["local_cache_bytes"] == 147_456 * scale.LOCAL_TOKENS


def test_the_parameters_are_counted_as_the_model_has_them():
    from msa import MSAForCausalLM

    model = MSAForCausalLM(SMALL.config(4))
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    counted = 4 * scale.layer_parameters(SMALL) + SMALL.vocabulary * SMALL.hidden
    assert counted == matrices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_random_model_computes_with_what_a_model_has(dtype):
    model = scale.random_model(SMALL, 2, dtype, CPU, seed=0)
    assert model.dtype == dtype
    assert model.lm_head.weight is model.model.embed_tokens.weight
    fresh = make_tiny_model(**SMALL.config(2).to_diff_dict())
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, fresh.model.rotary_emb.inv_freq)
    assert all(not p.is_meta and p.isfinite().all() for p in model.parameters())
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


# Reports


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("x_seconds", 0.01234, "12.3 ms"),
        ("x_seconds", 2.5, "2.50 s"),
        ("x_seconds_per_token", 0.002, "2 ms"),
        ("x_bytes", 57_600_000_000, "57.6 GB"),
        ("x_bytes", 12, "12 bytes"),
        ("x_bytes_per_second", 2e10, "20.0 GB/s"),
        ("x_tokens_per_second", 12345.6, "12,346"),
        ("x_ratio", 15.234, "15.23x"),
        ("x_ratio", 152.34, "152x"),
        ("x_share", 0.256, "25.6%"),
        ("chunks", 1562496, "1,562,496"),
        ("x", None, "–"),
    ],
)
def test_figures_are_shown_with_their_units(name, value, text):
    assert report.shown(name, value) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("decode_seconds_per_token", "decode per token"),
        ("msa_over_read_once_ratio", "MSA / read once"),
        ("faiss_one_vector_seconds", "FAISS one vector"),
        ("encode_tokens_per_second", "encode tokens per second"),
    ],
)
def test_figures_have_names_for_people(name, text):
    assert report.words(name) == text


def made(kind="asking", cost=2.0) -> Report:
    rows = [
        {"tokens": size, "routing_seconds": cost * size, "generation_seconds": 0.5}
        for size in (1000, 1_000_000)
    ]
    found = Report(kind, timing.machine(CPU), "speed.py asking", {"seed": 0}, rows)
    found.fit(None, ("routing_seconds", "generation_seconds"))
    return found


def test_a_report_is_written_and_read_again(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is an extra")
    found = made()
    written = found.write(tmp_path / "new")
    assert [path.name for path in written] == ["bench_asking.json", "bench_asking.png", "bench.md"]
    data = json.loads((tmp_path / "new" / "bench_asking.json").read_text())
    assert data == asdict(found)
    assert data["exponents"] == {"routing": pytest.approx(1.0), "generation": pytest.approx(0.0)}
    assert (tmp_path / "new" / "bench_asking.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "new" / "bench.md").read_text()
    assert "| tokens | 1k | 1M |" in page
    assert "routing 1.00; generation 0.00" in page
    assert "(bench_asking.png)" in page


def test_the_page_shows_every_benchmark_of_the_folder(tmp_path):
    made("asking").write(tmp_path)
    made("scale").write(tmp_path)
    page = (tmp_path / "bench.md").read_text()
    assert page.index("A question") < page.index("The 4B configuration")


def test_without_matplotlib_there_is_no_plot_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = made()
    written = found.write(tmp_path)
    assert [path.name for path in written] == ["bench_asking.json", "bench.md"]
    assert report.PLOT_NOTE in json.loads((tmp_path / "bench_asking.json").read_text())["notes"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot be written .* give another --output"):
        made().write(tmp_path / "file")


def test_a_curve_per_dtype_has_its_own_exponent():
    rows = [
        {"tokens": size, "dtype": dtype, "msa_seconds": size**power}
        for size in (10, 100)
        for dtype, power in (("float32", 1), ("bfloat16", 2))
    ]
    found = Report("routing", {}, rows=rows)
    found.fit("dtype", ("msa_seconds",))
    assert found.exponents == {
        "MSA, float32": pytest.approx(1.0),
        "MSA, bfloat16": pytest.approx(2.0),
    }
    assert found.table()[0] == [
        "tokens",
        "10 f32",
        "10 bf16",
        "100 f32",
        "100 bf16",
    ]


def test_results_are_figures_and_a_page_of_the_same(tmp_path):
    found = {"rows": [(1, "Ä")]}
    write_results(None, "x", found)
    write_results(tmp_path / "new", "x", found, lambda read: f"{read['rows']}\n")
    written = (tmp_path / "new" / "x.json").read_text(encoding="utf-8")
    assert json.loads(written) == {"rows": [[1, "Ä"]]}
    assert (tmp_path / "new" / "x.md").read_text(encoding="utf-8") == "[[1, 'Ä']]\n"
