"""The model `msa` of lm-evaluation-harness, asked and scored by the harness itself."""

from __future__ import annotations

import json
import logging
import warnings
from types import SimpleNamespace

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that the harness imports
    pytest.importorskip("lm_eval", reason="the extra 'harness' (lm-eval) is not installed")
    import lm_eval
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    from msa.integrations.lm_eval import MSAHarnessModel

import torch

from msa.demo.material import load_material
from msa.errors import ConfigError, InputError
from msa.inference.engine import MemoryEngine
from msa.memory.bank import MemoryBank
from msa.types import Document

pytestmark = pytest.mark.filterwarnings("ignore")

ASKED = {
    "task": "tiny_memory",
    "output_type": "generate_until",
    "doc_to_text": "Read this.\n{{context}}\n\nQuestion: {{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "do_sample": False},
    "metric_list": [
        {"metric": "exact_match", "ignore_case": True, "ignore_punctuation": True,
         "aggregation": "mean", "higher_is_better": True}
    ],
}  # fmt: skip
SCORED = {
    "task": "tiny_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": ["was born in", "zebra zebra zebra"],
    "doc_to_target": 0,
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def model():
    return MSAHarnessModel("worlds", batch_size="2")


@pytest.fixture(scope="module")
def facts():
    """Texts of invented people, as a prompt holds them."""
    return "\n\n".join(document.text for document in load_material("worlds").documents[:40])


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two tasks of a few lines, as files of the harness, and their data."""
    import yaml

    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "context": f"{name} was born in {town}. {name} was a {trade}.\n\n"
            "Martin Watts was born in Halden.",
            "question": f"Where was {name} born?",
            "answer": town,
        }
        for name, town, trade in (
            ("Erik Watts", "Larvik", "baker"),
            ("Deborah Eastbury", "Halden", "painter"),
        )
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task in (ASKED, SCORED):
        source = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "c")},
            "test_split": "test",
        }
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**task, **source}))
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluated(model, tasks, name):
    found = lm_eval.simple_evaluate(
        model=model, tasks=[name], task_manager=tasks, bootstrap_iters=0, log_samples=True
    )
    return found["results"][name], found["samples"][name]


def test_the_harness_knows_it_by_name():
    assert get_model("msa") is MSAHarnessModel


def test_a_prompt_becomes_a_bank_that_is_thrown_away(model, tasks, monkeypatch):
    banks = []
    create = MemoryBank.create.__func__

    def watched(cls, path, *args, **options):
        bank = create(cls, path, *args, **options)
        banks.append((path, options))
        return bank

    monkeypatch.setattr(MemoryBank, "create", classmethod(watched))
    results, samples = evaluated(model, tasks, "tiny_memory")
    assert len(samples) == 2
    assert all(sample["resps"][0][0].strip() for sample in samples)
    right = [s["resps"][0][0].strip(" .") == s["doc"]["answer"] for s in samples]
    assert results["exact_match,none"] == sum(right) / 2 > 0
    assert [options for _, options in banks] == [{"max_document_tokens": 256}] * 2
    assert not any(path.exists() for path, _ in banks)


def test_what_it_answers_is_what_the_engine_answers(model, facts, tmp_path):
    question = "Who was the employer of Renata Clements?"
    (found,) = model.generate_until([request(f"{facts}\n\n{question}", {"max_gen_toks": 32})])
    with MemoryBank.create(tmp_path / "bank", model._checkpoint, max_document_tokens=256) as bank:
        bank.add([Document("prompt", facts)])
        engine = MemoryEngine(bank)
        assert engine.ask(question, max_new_tokens=32).text == found
        engine.close()


def request(*args):
    return SimpleNamespace(args=args)


def test_prompts_with_one_context_share_a_bank_and_keep_their_order(model, facts, monkeypatch):
    made = []

    def watched(self, context, questions, settings):
        made.append(len(questions))
        return [f"{question} asked\nand more" for question in questions]

    monkeypatch.setattr(MSAHarnessModel, "_ask", watched)
    prompts = [f"{facts}\nA?", "B is here.\nB?", f"{facts}\nC?"]
    found = model.generate_until([request(p, {"until": ["\n"]}) for p in prompts])
    assert found == ["A? asked", "B? asked", "C? asked"]
    assert made == [2, 1]


def test_a_question_without_a_context_is_asked_without_a_memory_and_said(model, caplog):
    with caplog.at_level(logging.WARNING):
        (answer,) = model.generate_until([request("Where was Ada born?", {"max_gen_toks": 8})])
    assert isinstance(answer, str)
    assert "1 prompts are questions only, asked without a memory" in caplog.text


def test_scores_are_those_of_the_plain_backbone(model):
    context, continuation = "Erik Watts was born in", " Larvik"
    ((score, greedy),) = model.loglikelihood([request(context, continuation)])
    tokens = model.tok_encode(context + continuation)
    first = len(model.tok_encode(context))
    with torch.no_grad():
        logits = model._checkpoint.model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    each = [logits[i - 1, tokens[i]].item() for i in range(first, len(tokens))]
    assert score == pytest.approx(sum(each), abs=1e-4)
    assert greedy == all(
        logits[i - 1].argmax().item() == tokens[i] for i in range(first, len(tokens))
    )


def test_choices_are_scored_by_the_harness(model, tasks):
    results, samples = evaluated(model, tasks, "tiny_choice")
    assert len(samples) == 2
    assert results["acc,none"] == 1.0  # three zebras are no way to go on


def test_texts_longer_than_the_backbone_are_scored_in_windows(model, monkeypatch):
    text = "Erik Watts was born in Larvik. " * 12
    (whole,) = model.loglikelihood_rolling([request(text)])
    monkeypatch.setattr(MSAHarnessModel, "max_length", 32)
    (parts,) = model.loglikelihood_rolling([request(text)])
    assert parts < whole < 0  # less is read before each token
    tokens = len(model.tok_encode(text))
    assert -parts / tokens < 20


def test_a_context_that_is_cut_is_said(model, monkeypatch, caplog):
    monkeypatch.setattr(MSAHarnessModel, "max_length", 16)
    with caplog.at_level(logging.WARNING):
        model.loglikelihood([request("Erik Watts was born in Larvik. " * 5, " Halden")])
    assert "scored without a memory, and 1 of 1 contexts are longer than the 16" in caplog.text
    with pytest.raises(InputError, match=r"a continuation of \d+ tokens is to be scored"):
        model.loglikelihood([request("A", " Larvik" * 40)])


def test_settings_that_are_not_looked_at_are_named(model, monkeypatch, caplog):
    monkeypatch.setattr(MSAHarnessModel, "_ask", lambda *_: ["x"])
    with caplog.at_level(logging.WARNING):
        model.generate_until([request("A.\nB?", {"until": [], "num_beams": 4})])
    assert "not looked at: num_beams" in caplog.text


def test_where_there_is_no_gpu_it_runs_on_the_cpu(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert MSAHarnessModel("worlds", device="cuda:0").device.type == "cpu"
    assert "there is no GPU, cuda:0" in caplog.text


def test_an_option_that_there_is_not_is_named():
    with pytest.raises(ConfigError, match="lexical_wait"):
        MSAHarnessModel("worlds", lexical_wait=1)
