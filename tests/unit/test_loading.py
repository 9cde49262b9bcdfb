"""One loader: names, folders, adapters, Hub ids; what it refuses, and what the model runs in."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
import torch

import msa
from conftest import make_tiny_model
from msa.errors import BankMismatchError, ConfigError, FetchError, ModelError
from msa.model import identity, loading, precision
from msa.text.prompts import PromptTemplate


@pytest.fixture
def folder(tiny_model, tiny_tokenizer, tmp_path):
    """A checkpoint of the tiny model."""
    path = tmp_path / "tiny"
    tiny_model.save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def shipped(folder, tmp_path, monkeypatch):
    """A folder of shipped models that holds a tiny `worlds`; `MSA_MODEL` is not set."""
    path = tmp_path / "models"
    shutil.copytree(folder, path / "worlds")
    monkeypatch.setattr(loading, "SHIPPED", path)
    monkeypatch.delenv("MSA_MODEL")
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MSA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


# ---- names and folders


def test_the_small_model_ships_and_loads_by_name():
    loaded = msa.load("worlds")
    assert loaded.name == "worlds"
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert loaded.ask_options.prior_weight == 5
    assert loaded.template == PromptTemplate()
    assert len(loaded.tokenizer) == loaded.model.config.vocab_size


def test_a_folder_gives_model_tokenizer_template_and_options(folder, tiny_model):
    (folder / "ask_options.json").write_text('{"max_rounds": 3}')
    PromptTemplate(end="<end>").save(folder)
    loaded = msa.load(folder)
    assert loaded.ask_options.max_rounds == 3
    assert loaded.template.end == "<end>"
    assert loaded.name == str(folder)
    for mine, theirs in zip(loaded.model.parameters(), tiny_model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_default_is_the_first_preferred_model_that_ships(shipped, folder, monkeypatch):
    assert loading.default_name() == "worlds"
    assert msa.load().name == "worlds"
    shutil.copytree(folder, shipped / "smollm2-135m")
    assert loading.default_name() == "smollm2-135m"
    assert loading.shipped_names() == ["smollm2-135m", "worlds"]
    monkeypatch.setenv("MSA_MODEL", str(folder))
    assert msa.load().name == str(folder)


def test_a_package_without_models_says_so(shipped):
    shutil.rmtree(shipped)
    with pytest.raises(ModelError, match="holds no model; install the package again"):
        msa.load()


def test_what_is_known_of_a_model_is_said_without_loading_it(shipped):
    info = loading.model_info("worlds")
    assert (info.default, info.ready, info.base) == (True, True, None)
    assert info.weights == info.folder == shipped / "worlds"
    assert info.config["chunk_size"] == 8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wolrds", r"model 'wolrds': no such name or folder; did you mean 'worlds'\? Give one of"),
        ("/nowhere/at/all", "no such name or folder; Give one of .*worlds"),
        ("someone/model", "no such folder; as a Hub id it is not here yet, and MSA_OFFLINE"),
    ],
)
def test_a_name_that_is_none_is_one_line(name, message):
    with pytest.raises(ModelError, match=message) as error:
        msa.load(name)
    assert "\n" not in str(error.value)


def test_a_hub_id_is_fetched_at_its_revision(folder, monkeypatch):
    asked = []

    def snapshot(repository, *, allow_patterns, **options):
        asked.append((repository, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.delenv("MSA_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    loaded = msa.load("someone/model@v1")
    assert loaded.name == "someone/model@v1"
    assert asked == [("someone/model", {"local_files_only": False, "revision": "v1"})]


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.delenv("MSA_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(FetchError, match=r"cannot be had from the Hub \(no route to host\)"):
        msa.load("someone/model")


def test_the_released_format_loads(golden_folder, tiny_tokenizer, tmp_path):
    shutil.copytree(golden_folder / "checkpoint", tmp_path / "released")
    tiny_tokenizer.save_pretrained(tmp_path / "released")
    config = msa.load(tmp_path / "released").model.config
    assert (config.routing_layers, config.chunk_size, config.routing_score) == ([2, 3], 8, "dot")


def test_a_plain_backbone_is_sent_to_msa_convert(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "llama"}))
    with pytest.raises(ModelError, match=r"is 'llama', expected 'msa'.*msa convert .* --texts"):
        msa.load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_or_damaged_file_is_one_line(folder, name):
    for damage in (lambda p: p.write_bytes(p.read_bytes()[:30]), lambda p: p.unlink()):
        damage(folder / name)
        with pytest.raises(ModelError) as error:
            msa.load(folder)
        assert str(folder) in str(error.value)
        assert "\n" not in str(error.value)


# ---- what it runs in


def test_what_runs_faster_on_a_cpu_is_measured_once_and_kept(home, monkeypatch, caplog):
    measured = []

    def seconds(names):
        measured.append(names)
        return {"float32": 1.0, "bfloat16": 0.5}

    monkeypatch.setattr(precision, "_measured", seconds)
    precision._fastest.cache_clear()
    with caplog.at_level("INFO", "msa"):
        assert precision.cpu_dtype(1e9) == torch.bfloat16
    assert "float32 1000.0 ms, bfloat16 500.0 ms; bfloat16 is used" in caplog.text
    precision._fastest.cache_clear()  # as a new process
    assert precision.cpu_dtype(1e9) == torch.bfloat16
    assert len(measured) == 1
    assert precision.cpu_dtype(1e6) == torch.float32  # too small to gain
    precision._fastest.cache_clear()


def test_a_machine_that_is_busy_for_a_while_is_busy_for_all_alike(monkeypatch):
    """What is measured takes turns: a pause in one turn does not decide."""
    clock, turns = [0.0], []
    monkeypatch.setattr(precision.time, "perf_counter", lambda: clock[0])

    def question(dtype):
        def run():
            turns.append(dtype)
            busy = 10.0 if len(turns) < 2 * precision.REPEATS - 1 else 0.0
            clock[0] += busy + {torch.float32: 1.0, torch.bfloat16: 0.5}[dtype]

        return run

    monkeypatch.setattr(precision, "_question", question)
    assert precision._measured(("float32", "bfloat16")) == {"float32": 1.0, "bfloat16": 0.5}
    assert turns == [torch.float32, torch.bfloat16] * precision.REPEATS


@pytest.mark.parametrize(("short", "chosen"), [(0.79, "bfloat16"), (0.9, "float32")])
def test_bfloat16_must_be_clearly_faster(home, monkeypatch, short, chosen):
    times = {"float32": 1.0, "bfloat16": short}
    monkeypatch.setattr(precision, "_measured", lambda names: times)
    precision._fastest.cache_clear()
    assert precision.cpu_dtype(1e9) == getattr(torch, chosen)
    precision._fastest.cache_clear()


def test_the_dtype_is_the_callers_then_the_environments(folder, monkeypatch):
    monkeypatch.setenv("MSA_DTYPE", "bfloat16")
    assert msa.load(folder).model.dtype == torch.bfloat16
    assert msa.load(folder, dtype="float32").model.dtype == torch.float32
    with pytest.raises(ConfigError, match="dtype 'int3': expected one of float32, bfloat16"):
        msa.load(folder, dtype="int3")


# ---- fingerprints


def test_the_fingerprint_of_files_is_computed_once_and_read_afterwards(folder, home, monkeypatch):
    first = identity.model_fingerprints(msa.load(folder).model)
    assert first == identity.model_fingerprints(make_tiny_model())
    monkeypatch.setattr(identity, "_computed", lambda _: pytest.fail("hashed again"))
    assert identity.model_fingerprints(msa.load(folder).model) == first
    assert identity.model_fingerprints(msa.load(folder, dtype="bfloat16").model) == first


def test_other_files_and_damaged_notes_are_hashed_again(folder, home):
    first = identity.model_fingerprints(msa.load(folder).model)
    (note,) = (home / "fingerprints").iterdir()
    note.write_text("{")
    assert identity.model_fingerprints(msa.load(folder).model) == first
    make_tiny_model(seed=1).save_pretrained(folder)
    other = identity.model_fingerprints(msa.load(folder).model)
    assert other[0] != first[0]
    assert other[1] != first[1]


def test_a_change_in_place_that_torch_does_not_count_is_noticed(folder, home):
    model = msa.load(folder).model
    first = identity.model_fingerprints(model)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    second = identity.model_fingerprints(model)
    assert second[0] != first[0]
    assert identity.model_fingerprints(msa.load(folder).model) == first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_change_of_one_value_is_noticed(folder, home, dtype):
    model = msa.load(folder, dtype=dtype).model
    first = identity.model_fingerprints(model)
    weight = model.model.embed_tokens.weight
    assert weight.numel() > 8 * identity.SAMPLED  # most values are in no sample
    for place in (1, 7, 4099, weight.numel() - 1):
        before = weight.data.view(-1)[place].clone()
        weight.data.view(-1)[place] += 1
        assert identity.model_fingerprints(model)[0] != first[0]
        weight.data.view(-1)[place] = before
        assert identity.model_fingerprints(model) == first


def test_without_a_folder_to_write_to_it_works_all_the_same(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MSA_HOME", str(tmp_path / "file"))
    assert identity.model_fingerprints(msa.load(folder).model)


# ---- banks of other models


def test_a_bank_of_another_model_says_which_made_it_and_what_to_type(tmp_path, folder):
    msa.MemoryBank.create(tmp_path / "bank", msa.load("worlds")).close()
    other = msa.load(folder)
    with pytest.raises(BankMismatchError, match=r"It was made with worlds: .*--model worlds"):
        msa.MemoryBank.open(tmp_path / "bank", other)
    path = tmp_path / "bank" / "bank.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "model": "/somewhere/msa/default_model/checkpoint"}))
    with pytest.raises(BankMismatchError, match=r"It was made with worlds: .*msa\.load\('worlds'"):
        msa.MemoryBank.open(tmp_path / "bank", other)
    msa.MemoryBank.open(tmp_path / "bank", msa.load("worlds")).close()


def test_the_name_to_load_is_one_that_can_be_loaded(folder):
    assert loading.loadable_name(str(folder)) == str(folder)
    assert loading.loadable_name("someone/model") == "someone/model"
    assert loading.loadable_name("MSAForCausalLM") is None
