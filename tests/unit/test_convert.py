from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from conftest import DATA, SMALL
from gguf_tools import write_gguf
from msa import Document, MemoryBank, MSAConfig, MSAForCausalLM, load
from msa.errors import ConfigError, InputError, ModelError, MSAError
from msa.memory.latent import LatentMemory
from msa.model.convert import (
    check_backbone,
    convert_backbone,
    convert_checkpoint,
    logit_difference,
)
from msa.model.export import to_released
from msa.model.pretrained import read_weights
from msa.text.prompts import PromptEncoder, PromptTemplate

FAMILIES = pytest.mark.parametrize(
    ("config", "model"),
    [
        (Qwen3Config, Qwen3ForCausalLM),
        (LlamaConfig, LlamaForCausalLM),
        (Qwen2Config, Qwen2ForCausalLM),
        (MistralConfig, MistralForCausalLM),
    ],
    ids=["qwen3", "llama", "qwen2", "mistral"],
)


def plain(config=Qwen3Config, model=Qwen3ForCausalLM, **values):
    torch.manual_seed(0)
    fields = {name: value for name, value in SMALL.items() if hasattr(config, name)}
    if config is MistralConfig:
        fields["sliding_window"] = None
    made = model(config(**{**fields, **values})).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):  # they begin as zeros
            torch.nn.init.normal_(parameter)
    return made


@FAMILIES
def test_without_a_memory_it_computes_what_the_backbone_computes(config, model):
    backbone = plain(config, model)
    ours = convert_backbone(backbone, chunk_size=4).eval()
    ids = torch.randint(0, 64, (2, 30))
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, backbone(ids).logits, atol=1e-5)


@FAMILIES
def test_routers_begin_as_copies_of_the_layers_own_projections(config, model):
    backbone = plain(config, model)
    ours = convert_backbone(backbone, routing_layers=[1, 2])
    for index, layer in enumerate(ours.model.layers):
        attention = layer.self_attn
        assert attention.routes == (index in (1, 2))
        if attention.routes:
            source = backbone.model.layers[index].self_attn
            assert torch.equal(attention.router_q_proj[0].weight, source.q_proj.weight)
            assert torch.equal(attention.router_k_proj[0].weight, source.k_proj.weight)
            attention.router_q_proj[0].weight.data.zero_()  # a copy: the source stays
            assert source.q_proj.weight.any()


@pytest.mark.parametrize("tied", [True, False])
@FAMILIES
def test_the_head_is_the_backbones_tied_or_not(config, model, tied):
    backbone = plain(config, model, tie_word_embeddings=tied)
    ours = convert_backbone(backbone)
    assert ours.config.tie_word_embeddings is tied
    assert torch.equal(ours.lm_head.weight, backbone.lm_head.weight)
    shared = ours.lm_head.weight.data_ptr() == ours.model.embed_tokens.weight.data_ptr()
    assert shared is tied


def test_settings_are_taken_and_the_backbones_fields_kept():
    backbone = plain(rope_theta=12345.0, rms_norm_eps=1e-3, max_position_embeddings=99)
    config = convert_backbone(
        backbone, chunk_size=7, top_k_documents=3, routing_layers=[0], routing_score="dot"
    ).config
    assert config.model_type == "msa"
    assert config.backbone == "qwen3"
    assert (config.chunk_size, config.top_k_documents) == (7, 3)
    assert (config.routing_layers, config.routing_score) == ([0], "dot")
    assert config.rope_parameters["rope_theta"] == 12345.0
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-3, 99)


def test_the_dtype_stays_that_of_the_backbone():
    ours = convert_backbone(plain().to(torch.bfloat16))
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}


@FAMILIES
def test_a_converted_model_routes_saves_and_loads(config, model, tmp_path):
    ours = convert_backbone(plain(config, model), chunk_size=4).eval()
    ours.save_pretrained(tmp_path)
    again = MSAForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    documents = torch.randint(0, 64, (3, 9))
    question = torch.randint(0, 64, (1, 5))
    logits = []
    for each in (ours, again):
        with torch.no_grad():
            states = each.encode_documents(documents, torch.tensor([9, 4, 6]))
            out = each(question, memory=LatentMemory(states, 2))
        assert sorted(out.selections) == [1, 2]
        logits.append(out.logits)
    assert torch.equal(*logits)


def test_a_backbone_of_another_family_is_refused_with_the_known_ones():
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ConfigError, match=r"backbone='gpt2': expected one of .*llama.*qwen3"):
        convert_backbone(gpt)


def test_weights_without_a_place_are_refused_by_name():
    backbone = plain()
    backbone.model.layers[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"qwen3: weights do not fit; .*layers\.0\.extra"):
        convert_backbone(backbone)


def test_missing_weights_are_refused_by_name():
    backbone = plain()
    del backbone.model.norm
    with pytest.raises(ModelError, match=r"missing: \['model.norm.weight'\]"):
        convert_backbone(backbone)


# ---- what is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MistralConfig(), r"mistral with sliding_window=4096: MSA attends to all"),
        (
            Qwen2Config(use_sliding_window=True, max_window_layers=2, num_hidden_layers=4),
            r"qwen2 with sliding_window=4096",
        ),
        (
            Qwen3Config(layer_types=["full_attention", "chunked_attention"], num_hidden_layers=2),
            r"qwen3 with layers of \['chunked_attention'\]",
        ),
        (GPT2Config(), r"backbone='gpt2': expected one of \['llama', 'mistral'"),
        (SimpleNamespace(model_type="qwen3_moe"), r"qwen3_moe.*the nearest is 'qwen3'"),
        (
            LlamaConfig(quantization_config={"quant_method": "gptq"}),
            r"llama with quantized weights \(gptq\)",
        ),
    ],
)
def test_attention_that_is_not_computed_is_refused_by_name(config, message):
    with pytest.raises(ConfigError, match=message) as error:
        check_backbone(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(sliding_window=None),
        MistralConfig(sliding_window=4096, max_position_embeddings=4096),
        Qwen2Config(use_sliding_window=False),
        Qwen3Config(),
        LlamaConfig(),
    ],
)
def test_a_window_that_is_never_left_is_none(config):
    check_backbone(config)


def test_a_backbone_that_computes_something_else_is_found_out(tiny_tokenizer):
    backbone = plain(LlamaConfig, LlamaForCausalLM, vocab_size=len(tiny_tokenizer))
    ours = convert_backbone(backbone).eval()
    encoder = PromptEncoder(tiny_tokenizer)
    assert logit_difference(backbone, ours, encoder, ["A text."]) < 1e-5
    ours.model.layers[0].self_attn.scaling *= 2
    with pytest.raises(ModelError, match="llama: without a memory the logits differ by"):
        logit_difference(backbone, ours, encoder, ["A text."])


# ---- a whole checkpoint

TEXTS = [
    f"Person {i} of town {i * 7 % 31}. The lamp of person {i} is {c}. It was made in {1800 + i}."
    for i, c in enumerate(["red", "blue", "green", "grey"] * 17)
]
QUESTIONS = [(f"The lamp of person {i}", i) for i in range(len(TEXTS))]


@pytest.fixture(scope="module")
def sources(tiny_tokenizer, tmp_path_factory):
    """Folders of plain models, by family."""
    root = tmp_path_factory.mktemp("plain")
    for name, config, model in (
        ("llama", LlamaConfig, LlamaForCausalLM),
        ("qwen3", Qwen3Config, Qwen3ForCausalLM),
    ):
        plain(config, model, vocab_size=len(tiny_tokenizer) + 3).save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    return root


def converted(source, folder, **settings):
    given = {"texts": TEXTS, "questions": QUESTIONS, "chunk_size": 8, **settings}
    return convert_checkpoint(source, folder, **given)


def test_a_folder_becomes_a_checkpoint_that_loads_with_all_that_belongs_to_it(sources, tmp_path):
    report = converted(sources / "llama", tmp_path / "out", top_k_documents=3)
    loaded = load(tmp_path / "out")
    config = loaded.model.config
    assert (config.chunk_size, config.top_k_documents) == (8, 3)
    assert (config.query_reduction, config.backbone) == ("pooled", "llama")
    assert tuple(config.routing_layers) == report.calibration.layers
    assert loaded.template == report.marks.template == PromptTemplate.compact()
    assert loaded.ask_options.prior_weight > 0
    assert report.logit_difference < 1e-5
    routers = {n.split(".")[2] for n in loaded.model.state_dict() if ".router_" in n}
    assert routers == {str(i) for i in report.calibration.layers}
    with MemoryBank.create(tmp_path / "bank", loaded) as bank:
        bank.add([Document("a", TEXTS[0])])


def test_layers_are_those_given(sources, tmp_path):
    report = converted(sources / "llama", tmp_path / "out", layers=[0, 2])
    assert report.calibration.layers == (0, 2)
    assert load(tmp_path / "out").model.config.routing_layers == [0, 2]


def test_the_released_format_loads_again_as_the_same_model(sources, tmp_path):
    settings = {"layers": [1, 2], "query_reduction": "max", "top_k_documents": 5}
    converted(sources / "qwen3", tmp_path / "ours", **settings)
    converted(sources / "qwen3", tmp_path / "released", export="released", **settings)
    written = json.loads((tmp_path / "released" / "config.json").read_text())
    golden = json.loads((DATA / "golden" / "checkpoint" / "config.json").read_text())
    assert set(golden["msa_config"]) - set(written["msa_config"]) == {
        "ansloss_weight", "auxloss_weight", "lmloss_weigth", "recloss_weight"
    }  # fmt: skip
    assert "routing_layers" not in written
    ours, released = (load(tmp_path / name).model for name in ("ours", "released"))
    fields = ("chunk_size", "top_k_documents", "routing_layers", "routing_score", "query_reduction")
    for field in (*fields, "rope_parameters", "aux_temperature", "head_dim", "rms_norm_eps"):
        assert getattr(ours.config, field) == getattr(released.config, field), field
    for (name, a), (_, b) in zip(
        ours.state_dict().items(), released.state_dict().items(), strict=True
    ):  # routers are whitened on questions in the text format, which differs
        assert a.shape == b.shape if ".router_" in name else torch.equal(a, b), name


@pytest.mark.parametrize("method", ["INFONCE", "INFONCE_DECOUPLE"])
def test_a_released_configuration_comes_back_as_it_was(golden_folder, method):
    values = json.loads((golden_folder / "checkpoint" / "config.json").read_text())
    values["msa_config"]["aux_loss_method"] = method
    again = to_released(MSAConfig.from_dict(json.loads(json.dumps(values))))
    for name, value in values["msa_config"].items():
        assert again["msa_config"].get(name, value) == value, name
    for name in ("rope_theta", "rope_scaling", "head_dim", "sliding_window", "hidden_size"):
        assert again[name] == values[name], name


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("llama", {"export": "released"}, "backbone='llama': the released format has 'qwen3' only"),
        ("qwen3", {"export": "released"}, "query_reduction='pooled'"),
        ("qwen3", {"export": "gguf"}, "export='gguf': expected one of"),
        ("qwen3", {"layers": [9]}, r"routing_layers=\[9\]"),
        ("qwen3", {"texts": TEXTS[:9]}, "9 texts: routers are whitened on at least 64"),
        ("none", {}, "no such folder or file"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(
    sources, tmp_path, source, settings, message
):
    with pytest.raises(MSAError, match=message) as error:
        converted(sources / source, tmp_path / "out", **settings)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_too_few_positions_are_refused(sources, tmp_path):
    shutil.copytree(sources / "llama", tmp_path / "short")
    path = tmp_path / "short" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 512}))
    with pytest.raises(ConfigError, match=r"max_position_embeddings=512: .* at least 1024"):
        converted(tmp_path / "short", tmp_path / "out")


def test_a_folder_that_is_taken_is_left_alone(sources, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        converted(sources / "llama", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"GGUF" + bytes(40), "damaged or of a kind"), (b"nothing", "is no GGUF file")],
)
def test_a_damaged_gguf_is_said(tmp_path, content, message):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=message) as error:
        converted(tmp_path / "x.gguf", tmp_path / "out")
    assert "\n" not in str(error.value)


def test_a_gguf_file_is_read_as_the_weights_it_was_made_of(tiny_tokenizer, tmp_path):
    backbone = plain(
        LlamaConfig,
        LlamaForCausalLM,
        vocab_size=len(tiny_tokenizer) + 1,
        tie_word_embeddings=False,
    )
    path = write_gguf(tmp_path / "tiny.gguf", backbone, tiny_tokenizer)
    weights = read_weights(path)
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    report = converted(path, tmp_path / "out", layers=[1])
    assert report.logit_difference < 1e-5
    assert report.dtype == "float32"
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in written
    loaded = load(tmp_path / "out")
    ids = torch.randint(0, len(tiny_tokenizer), (1, 9))
    with torch.no_grad():
        logits = loaded.model(ids).logits[
            ..., : backbone.config.vocab_size
        ]  # it may have marks more
        assert torch.allclose(logits, backbone(ids).logits, atol=1e-5)


def test_a_gguf_file_of_another_architecture_is_said(tiny_tokenizer, tmp_path):
    backbone = plain(LlamaConfig, LlamaForCausalLM, vocab_size=len(tiny_tokenizer) + 1)
    path = write_gguf(tmp_path / "x.gguf", backbone, tiny_tokenizer, architecture="mystery")
    with pytest.raises(ModelError, match=r"of a kind that transformers cannot read .*mystery"):
        converted(path, tmp_path / "out")


def test_without_a_fast_tokenizer_there_is_no_conversion(sources, tmp_path):
    shutil.copytree(sources / "llama", tmp_path / "slow")
    for path in (tmp_path / "slow").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="slow"):
        converted(tmp_path / "slow", tmp_path / "out")
