"""Banks whose content is stored in eight or four bits."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from bank_tools import LAYERS, make_documents
from msa.cli import main
from msa.errors import BankCorruptError, ConfigError, InputError
from msa.evaluation.agreement import selection_agreement
from msa.memory.bank import MemoryBank
from msa.memory.loaded.loaded_bank import LoadedBank
from msa.memory.loaded.memory_plan import plan
from msa.ops.quantization import PACKED, pack, packed_width, unpack

# Largest error as a share of a row's largest number: half a step.
ERRORS = {"int8": 0.5 / 127, "fp8": 1 / 16, "int4": 0.5 / 7}


def make(path, model, tokenizer, precision, count=20):
    bank = MemoryBank.create(path, model, tokenizer, content_dtype=precision)
    bank.add(make_documents(count))
    return bank


@pytest.mark.parametrize("precision", PACKED)
@pytest.mark.parametrize("shape", [(5, 2, 16), (1, 1, 6), (0, 3, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_come_back_within_half_a_step(precision, shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3
    x = x.to(dtype)
    packed = pack(x, precision)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], packed_width(shape[-1], precision))
    back = unpack(packed, precision, torch.float32)
    assert back.shape == x.shape
    if x.numel():
        peak = x.float().abs().amax(-1, keepdim=True)
        assert ((back - x.float()).abs() <= ERRORS[precision] * peak * 1.001).all()
        assert (back != 0).any()


@pytest.mark.parametrize("precision", PACKED)
def test_rows_have_scales_of_their_own_and_zeros_stay_zeros(precision):
    x = torch.tensor([[1e-6, -2e-6], [300.0, 100.0], [0.0, 0.0]])
    back = unpack(pack(x, precision), precision, torch.float32)
    torch.testing.assert_close(back, x, rtol=0.15, atol=0)
    assert torch.equal(back[2], x[2])


@pytest.mark.parametrize(
    ("x", "precision", "error"),
    [
        (torch.tensor([[1.0, torch.nan]]), "int8", InputError),
        (torch.tensor([[1.0, torch.inf]]), "int4", InputError),
        (torch.ones(2, 3), "int4", ConfigError),
        (torch.ones(2, 4), "int2", ConfigError),
    ],
)
def test_what_cannot_be_packed_is_refused(x, precision, error):
    with pytest.raises(error):
        pack(x, precision)


@pytest.mark.parametrize("precision", PACKED)
@pytest.mark.parametrize("tier", ["held", "mapped"])
def test_content_of_a_packed_bank_is_near_that_of_a_full_one(
    tmp_path, tiny_model, tiny_tokenizer, queries, precision, tier
):
    contents = {}
    for kind in ("float32", precision):
        name = None if kind == "float32" else kind
        with make(tmp_path / kind, tiny_model, tiny_tokenizer, name) as bank:
            resident = LoadedBank(bank, plan=plan(bank, content=tier))
            assert bank.manifest.packed == name
            contents[kind] = [
                resident.content(layer, resident.route(layer, *queries)) for layer in LAYERS
            ]
    for full, low in zip(*contents.values(), strict=True):  # routing keys are the same
        assert torch.equal(full.mask, low.mask)
        assert low.keys.dtype == full.keys.dtype == torch.float32
        for one, other in ((full.keys, low.keys), (full.values, low.values)):
            one, other = one[full.mask], other[full.mask]
            peak = one.abs().amax(-1, keepdim=True)
            assert ((one - other).abs() <= ERRORS[precision] * peak * 1.001).all()
            assert not torch.equal(one, other)


def test_a_packed_bank_is_smaller_and_its_header_says_what_it_is(
    tmp_path, tiny_model, tiny_tokenizer
):
    sizes = {}
    for kind in (None, *PACKED):
        with make(tmp_path / str(kind), tiny_model, tiny_tokenizer, kind) as bank:
            sizes[kind] = bank.info().segment_bytes
            planned = plan(bank, content="held")
            assert bank.info().content_dtype == (kind or "float32")
            resident = LoadedBank(bank, plan=planned)
            assert resident._view._content.num_bytes == planned.content_bytes
        header = json.loads((tmp_path / str(kind) / "bank.json").read_text())
        assert header["content_dtype"] == (kind or "float32")
    assert sizes["int4"] < sizes["int8"] == sizes["fp8"] < sizes[None]


def test_compaction_and_repair_keep_packed_content_byte_for_byte(
    tmp_path, tiny_model, tiny_tokenizer, queries
):
    with make(tmp_path / "b", tiny_model, tiny_tokenizer, "int8") as bank:
        ids = [s.document.id for s in bank.documents(20)]
        bank.delete(ids[:5])
        resident = LoadedBank(bank)
        before = resident.content(2, resident.route(2, *queries))
        bank.compact()
        resident = LoadedBank(bank)
        after = resident.content(2, resident.route(2, *queries))
        assert torch.equal(before.keys, after.keys)
        assert torch.equal(before.values, after.values)
        assert bank.verify().ok


def test_damaged_packed_content_is_never_handed_out(tmp_path, tiny_model, tiny_tokenizer, queries):
    with make(tmp_path / "b", tiny_model, tiny_tokenizer, "int8") as bank:
        (segment,) = bank.segments_folder.glob("*.safetensors")
        data = bytearray(segment.read_bytes())
        data[-3000:] = bytes(b ^ 1 for b in data[-3000:])
        segment.write_bytes(data)
        resident = LoadedBank(bank, plan=plan(bank, content="mapped"), top_k=20)
        with pytest.raises(BankCorruptError, match="checksum"):
            resident.content(3, resident.route(3, *queries))


def test_a_bank_from_before_the_choice_opens(tmp_path, tiny_model, tiny_tokenizer):
    make(tmp_path / "b", tiny_model, tiny_tokenizer, None).close()
    path = tmp_path / "b" / "bank.json"
    values = json.loads(path.read_text())
    del values["content_dtype"]
    path.write_text(json.dumps(values))
    with MemoryBank.open(tmp_path / "b", tiny_model, tiny_tokenizer) as bank:
        assert bank.manifest.packed is None
        assert len(bank) == 20
    values["content_dtype"] = "int3"
    path.write_text(json.dumps(values))
    with pytest.raises(BankCorruptError, match="content_dtype"):
        MemoryBank.open(tmp_path / "b")


def test_an_unknown_precision_is_one_clear_line(tmp_path, tiny_model, tiny_tokenizer):
    with pytest.raises(ConfigError, match="content_dtype=int3: expected int8, fp8, int4"):
        MemoryBank.create(tmp_path / "b", tiny_model, tiny_tokenizer, content_dtype="int3")
    assert not (tmp_path / "b").exists()


def test_agreement_is_whole_at_full_precision_and_falls_with_the_bits(
    tmp_path, tiny_model, tiny_tokenizer
):
    found = {}
    for kind in (None, "int8", "int4"):
        with make(tmp_path / str(kind), tiny_model, tiny_tokenizer, kind, 40) as bank:
            found[kind] = selection_agreement(bank, documents=30, questions=12)
            assert (found[kind].documents, found[kind].questions) == (30, 12)
    assert found[None].selected == 1.0
    assert 0.9 < found["int8"].selected <= 1.0
    assert found["int4"].selected <= found["int8"].selected
    # the first routing layer sees no content, and the routing keys are the same
    assert found["int4"].by_layer[LAYERS[0]] == 1.0


@pytest.fixture
def run(capsys):
    def run(*words):
        with pytest.raises(SystemExit) as stop:
            main.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=stop.value.code, out=out, err=err)

    return run


def test_index_makes_a_bank_in_a_precision_and_measures_it(tmp_path, run):
    rows = [json.dumps({"id": str(i), "text": f"House {i} stands in Rome."}) for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    bank = tmp_path / "bank"
    made = run("index", tmp_path / "a.jsonl", "--bank", bank, "--precision", "int8")
    assert made.code == 0, made.err
    assert "Precision int8, routing keys bfloat16: " in made.out
    info = run("bank", "info", bank)
    assert "content int8, the rest bfloat16" in info.out
    other = run("index", tmp_path / "a.jsonl", "--bank", bank, "--precision", "fp8")
    assert other.code == 1
    assert "was made with precision int8, not fp8" in other.err
    wrong = run("index", tmp_path / "a.jsonl", "--bank", bank, "--precision", "int5")
    assert wrong.code in (1, 2)
    assert "--precision int5: expected one of float32" in wrong.err
