from __future__ import annotations

import json
import sqlite3

import pytest
import torch
from safetensors.torch import load_file

from bank_tools import ids_of, make_document, make_documents
from conftest import make_tiny_model, make_tiny_tokenizer
from msa.errors import (
    BankCorruptError,
    BankError,
    BankLockedError,
    BankMismatchError,
    BankNotFoundError,
    ConfigError,
    InputError,
)
from msa.memory.bank import MemoryBank
from msa.memory.ingest.encoder import DocumentEncoder
from msa.memory.store.manifest import model_fingerprints, tokenizer_fingerprint
from msa.text.prompts import PromptTemplate

STATES = ("routing_keys", "pooled_keys", "pooled_values")


# ---- opening


def test_a_folder_that_is_no_bank(tmp_path, tiny_model, tiny_tokenizer):
    with pytest.raises(BankNotFoundError, match=r"not a memory bank.*msa index"):
        MemoryBank.open(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BankNotFoundError, match="not a memory bank"):
        MemoryBank.open(tmp_path)
    with pytest.raises(BankError, match=r"holds other files \(notes.txt\)"):
        MemoryBank.create(tmp_path, tiny_model, tiny_tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(BankError, match="it is a file"):
        MemoryBank.create(tmp_path / "notes.txt", tiny_model, tiny_tokenizer)
    (tmp_path / "bank.json").write_text('{"format": "other"}')
    with pytest.raises(BankNotFoundError, match="something else"):
        MemoryBank.open(tmp_path)


def test_a_bank_is_not_made_over_another(bank, path, tiny_model, tiny_tokenizer):
    bank.add(make_documents(2))
    with pytest.raises(BankError, match="is a memory bank already"):
        MemoryBank.create(path, tiny_model, tiny_tokenizer)
    assert len(bank) == 2


def test_an_interrupted_creation_can_be_done_again(path, tiny_model, tiny_tokenizer, monkeypatch):
    from msa.memory.store.manifest import Manifest

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            MemoryBank.create(path, tiny_model, tiny_tokenizer)
    with pytest.raises(BankNotFoundError):
        MemoryBank.open(path)
    with MemoryBank.create(path, tiny_model, tiny_tokenizer) as bank:
        assert bank.add(make_documents(2)).added == 2


def edited(path, **changes):
    manifest = json.loads((path / "bank.json").read_text())
    (path / "bank.json").write_text(json.dumps({**manifest, **changes}))


def test_a_bank_of_another_format_version(bank, path):
    bank.close()
    edited(path, format_version=2, msa_version="9.0")
    with pytest.raises(BankMismatchError, match=r"format version 2; .* reads 1\. Use .* \(9\.0\)"):
        MemoryBank.open(path)


def test_a_damaged_manifest_or_lost_catalog(bank, path):
    bank.close()
    text = (path / "bank.json").read_text()
    for wrong in (text[:50], json.dumps({**json.loads(text), "dtype": "int4"})):
        (path / "bank.json").write_text(wrong)
        with pytest.raises(BankCorruptError, match=r"bank.json is damaged"):
            MemoryBank.open(path)
    (path / "bank.json").write_text(text)
    (path / "catalog.sqlite").unlink()
    with pytest.raises(BankCorruptError, match=r"lost its catalog.sqlite"):
        MemoryBank.open(path)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"chunk_size": 16}, r"chunk_size=8; this model has 16"),
        ({"routing_layers": [1, 3]}, r"routing_layers=\(2, 3\); this model has \(1, 3\)"),
        ({"head_dim": 8}, r"head_dim=16; this model has 8"),
        ({"seed": 1}, r"other model weights"),
        ({"rms_norm_eps": 1e-3}, r"other model weights"),
        ({"routing_score": "dot"}, r"other routing score"),
    ],
)
def test_a_bank_of_another_model_says_what_differs(bank, path, tiny_tokenizer, overrides, words):
    bank.close()
    model = make_tiny_model(**overrides)
    with pytest.raises(BankMismatchError, match=rf"{words}.*index again"):
        MemoryBank.open(path, model, tiny_tokenizer)


def test_another_router_tokenizer_or_template_is_refused(bank, path, tiny_model, tiny_tokenizer):
    bank.close()
    model = make_tiny_model()
    with torch.no_grad():
        model.model.layers[3].self_attn.router_k_proj[0].weight.mul_(1.02)
    with pytest.raises(BankMismatchError, match="other router weights"):
        MemoryBank.open(path, model, tiny_tokenizer)
    other = make_tiny_tokenizer()
    other.add_tokens(["<new>"])
    with pytest.raises(BankMismatchError, match="other tokenizer"):
        MemoryBank.open(path, tiny_model, other)
    with pytest.raises(BankMismatchError, match="other prompt template"):
        MemoryBank.open(path, tiny_model, tiny_tokenizer, PromptTemplate(end="<end>"))
    with pytest.raises(InputError, match="a model and its tokenizer"):
        MemoryBank.open(path, tiny_model)
    MemoryBank.open(path, make_tiny_model(), make_tiny_tokenizer()).close()


def test_fingerprints_follow_the_weights_not_their_dtype_or_file_form(tiny_tokenizer):
    model = make_tiny_model()
    first = model_fingerprints(model)
    assert model_fingerprints(model.to(torch.bfloat16)) == first
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    changed = model_fingerprints(model)
    assert changed.weights != first.weights
    assert changed.states != first.states
    assert changed.router == first.router
    assert tokenizer_fingerprint(make_tiny_tokenizer()) == tokenizer_fingerprint(tiny_tokenizer)


def test_a_bank_opens_with_a_model_that_was_trained_above_the_last_routing_layer(
    path, tiny_tokenizer
):
    model = make_tiny_model(num_hidden_layers=5, routing_layers=[1, 2])
    with MemoryBank.create(path, model, tiny_tokenizer) as bank:
        bank.add(make_documents(2))
    changes = [
        (model.model.layers[3].mlp.up_proj.weight, True),
        (model.model.norm.weight, True),
        (model.model.layers[2].self_attn.v_proj.weight, False),
        (model.model.layers[0].mlp.down_proj.weight, False),
        (model.model.embed_tokens.weight, False),
        (model.model.layers[1].input_layernorm.weight, False),
    ]
    for weight, opens in changes:
        with torch.no_grad():
            weight.data.flatten()[0] += 1
        if opens:
            with MemoryBank.open(path, model, tiny_tokenizer) as bank:
                bank.add(make_documents(3)[2:])
        else:
            with pytest.raises(BankMismatchError, match="other model weights"):
                MemoryBank.open(path, model, tiny_tokenizer)
        with torch.no_grad():
            weight.data.flatten()[0] -= 1


def test_a_bank_without_the_fingerprint_of_its_states_opens_with_the_same_weights_alone(
    path, tiny_tokenizer
):
    model = make_tiny_model()
    MemoryBank.create(path, model, tiny_tokenizer).close()
    manifest = json.loads((path / "bank.json").read_text())
    del manifest["states"]
    (path / "bank.json").write_text(json.dumps(manifest))
    MemoryBank.open(path, model, tiny_tokenizer).close()
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    with pytest.raises(BankMismatchError, match="other model weights"):
        MemoryBank.open(path, model, tiny_tokenizer)


def test_without_a_model_everything_works_but_what_encodes(bank, path):
    bank.add(make_documents(4))
    bank.close()
    with MemoryBank.open(path) as bare:
        assert bare.info().num_documents == 4
        assert bare.verify().ok
        assert bare.delete("doc1") == 1
        assert bare.compact().dropped == 1
        with pytest.raises(BankError, match="opened without a model"):
            bare.add(make_documents(1))


def test_a_bank_opened_to_read_or_closed_refuses_to_write(bank, path, tiny_model, tiny_tokenizer):
    bank.add(make_documents(2))
    with MemoryBank.open(path, tiny_model, tiny_tokenizer, read_only=True) as reader:
        for write in (
            lambda: reader.add([make_document("x")]),
            lambda: reader.delete("doc0"),
            reader.compact,
            reader.repair,
        ):
            with pytest.raises(BankError, match="read_only"):
                write()
        bank.delete("doc0")
        assert ids_of(reader) == ["doc1"]
    bank.close()
    bank.close()
    with pytest.raises(BankError, match="is closed"):
        bank.delete("doc1")


def test_the_dtype_on_disk_is_a_setting(path, tiny_model, tiny_tokenizer):
    with MemoryBank.create(path, tiny_model, tiny_tokenizer, dtype=torch.bfloat16) as bank:
        bank.add(make_documents(3))
        stored = load_file(path / "segments" / "000001.safetensors")
        assert {stored[f"2.{n}"].dtype for n in STATES} == {torch.bfloat16}
        encoder = DocumentEncoder(tiny_model, tiny_tokenizer)
        (batch,) = encoder.encode(list(enumerate(make_documents(3), start=1)))
        for name in STATES:
            exact = getattr(batch.states.layers[2], name)
            assert torch.equal(stored[f"2.{name}"], exact.to(torch.bfloat16))
        assert bank.info().dtype == "bfloat16"
    with pytest.raises(ConfigError, match="dtype=float64"):
        MemoryBank.create(path / "x", tiny_model, tiny_tokenizer, dtype=torch.float64)


# ---- one writer


def test_the_second_writer_is_told_who_the_first_is(bank, path):
    with pytest.raises(BankLockedError, match=r"in this very process since 20.*read_only"):
        MemoryBank.open(path)
    holder = path / "writer.json"
    told = json.loads(holder.read_text())
    holder.write_text(json.dumps({**told, "pid": 1}))
    with pytest.raises(BankLockedError, match=r"written by process 1 on .* since 20.*read_only"):
        MemoryBank.open(path)
    holder.write_text("")
    with pytest.raises(BankLockedError, match=r"written by a process that has just started"):
        MemoryBank.open(path)
    MemoryBank.open(path, read_only=True).close()
    bank.close()
    MemoryBank.open(path).close()


def test_a_failed_open_gives_the_lock_back(bank, path):
    bank.close()
    (path / "catalog.sqlite").rename(path / "hidden")
    with pytest.raises(BankCorruptError):
        MemoryBank.open(path)
    (path / "hidden").rename(path / "catalog.sqlite")
    MemoryBank.open(path).close()


def test_readers_see_whole_commits(bank, path):
    bank.add(make_documents(3))
    reader = MemoryBank.open(path, read_only=True)
    assert len(reader) == 3
    seen = []
    bank.add(
        make_documents(30, "more"),
        commit_tokens=300,
        progress=lambda p: seen.append((3 + p.added, len(reader))),
    )
    assert len(seen) > 2
    assert all(told == found for told, found in seen)
    reader.close()


def test_the_catalog_is_an_ordinary_database(bank, path):
    bank.add(make_documents(2))
    bank.close()
    with sqlite3.connect(path / "catalog.sqlite") as db:
        assert db.execute("SELECT COUNT(*) FROM documents").fetchone() == (2,)
    db.close()
    assert not list(path.rglob("*.pkl"))
