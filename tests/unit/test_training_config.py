from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from msa.errors import ConfigError
from msa.training.config import (
    LossSettings,
    RealData,
    SampleSettings,
    Stage,
    TrainingConfig,
    WorldSettings,
    load_config,
)

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


def load(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


def stage(**values):
    return yaml.safe_dump({"stages": [{"name": "a", "steps": 1, **values}]})


def test_there_are_shipped_configs():
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_loads_and_its_model_can_be_made(path):
    from msa import MSAConfig

    config = load_config(path)
    assert MSAConfig(**config.model).top_k_documents >= 1
    unknown = set(config.model) - set(MSAConfig().to_dict())
    assert not unknown  # transformers keeps what it does not know without a word


def test_every_value_of_a_file_arrives(tmp_path):
    config = load(
        tmp_path,
        """
seed: 7
save_steps: 3
log_steps: 2
bfloat16: true
threads: 1
model: {hidden_size: 8, routing_layers: [1]}
tokenizer: {vocab_size: 300, path: null}
real_data: {questions: [a, b], texts: []}
optimizer: {weight_decay: 0}
stages:
  - {name: one, steps: 4, world: {breadth: 1, real: 0.5}}
  - name: two
    steps: 5
    learning_rate: 1.0e-3
    world: {breadth: [0, 0.5]}
    samples: {name: 1, hop: 2}
    losses: {routing: 1}
""",
    )
    assert (config.seed, config.save_steps, config.log_steps, config.threads) == (7, 3, 2, 1)
    assert config.bfloat16 is True
    assert config.model == {"hidden_size": 8, "routing_layers": [1]}
    assert (config.tokenizer.vocab_size, config.tokenizer.path) == (300, None)
    assert config.real_data == RealData(questions=("a", "b"))
    assert config.optimizer.weight_decay == 0.0
    assert config.stages == (
        Stage(name="one", steps=4, world=WorldSettings(breadth=(1.0,), real=0.5)),
        Stage(
            name="two",
            steps=5,
            learning_rate=0.001,
            world=WorldSettings(breadth=(0.0, 0.5)),
            samples=SampleSettings(name=1, hop=2),
            losses=LossSettings(routing=1.0),
        ),
    )
    assert isinstance(config.stages[0].world.breadth[0], float)


def test_a_mapping_that_is_left_out_has_its_defaults(tmp_path):
    config = load(tmp_path, stage())
    assert config == TrainingConfig(stages=(Stage(name="a", steps=1),))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stages: [{name: a, steps: 1}]\nsteps: 3", r"unknown \['steps'\]; known are .*'stages'"),
        (stage(stepz=3), r"stages\[0\]: unknown \['stepz'\]"),
        (stage(world={"docs": 3, 5: 1}), r"stages\[0\]: world: unknown \[5, 'docs'\]"),
        (stage(samples={"reed": 3}), r"samples: unknown \['reed'\]"),
        (stage(losses=[1]), "losses: expected a mapping, got list"),
        ("stages: [{steps: 3}]", r"stages\[0\]: missing \['name'\]"),
        ("seed: 1", "at least one entry under 'stages'"),
        ("stages: []", "at least one entry under 'stages'"),
        ("stages: 3", "stages: expected a list, got 3"),
        ("stages: {a: 1}", "stages: expected a list"),
        ("stages: [a]", r"stages\[0\]: expected a mapping, got str"),
        ("stages: [{name: a, steps: 1}, {name: a, steps: 2}]", "names of their own"),
        ("", "expected a mapping, got NoneType"),
        ("- 1", "expected a mapping, got list"),
        ("a: [", "cannot be read as YAML"),
        (stage(steps="many"), "steps: expected int, got 'many'"),
        (stage(steps=1.5), "steps: expected int, got 1.5"),
        (stage(steps=True), "steps: expected int, got True"),
        (stage(steps=0), r"stages\[0\]: steps=0: expected a whole number from 1"),
        (stage(name="a/b"), "name='a/b': expected letters"),
        (stage(name="model"), "name='model'"),
        (stage(learning_rate="fast"), "learning_rate: expected float, got 'fast'"),
        (stage(world={"breadth": ["wide"]}), "breadth: expected float, got 'wide'"),
        (stage(world={"breadth": []}), r"breadth=\[\]: expected one or two numbers from 0 to 1"),
        (stage(world={"breadth": 1.5}), r"breadth=\[1.5\]"),
        (stage(world={"real": 2}), "real=2.0: expected a share"),
        (stage(world={"documents": 0}), "documents=0: expected a whole number from 1"),
        (stage(world={"min_digits": 4, "max_digits": 3}), "min_digits=4, max_digits=3"),
        (stage(world={"max_digits": 9}), "max_digits=9"),
        (
            stage(world={"documents": 10, "min_digits": 1, "max_digits": 1}),
            "documents=10: only 9 numbers have 1 to 1 digits",
        ),
        ("save_steps: 0\nstages: [{name: a, steps: 1}]", "save_steps=0"),
        ("bfloat16: 1\nstages: [{name: a, steps: 1}]", "bfloat16: expected bool, got 1"),
        ("start_from: 1\nstages: [{name: a, steps: 1}]", "start_from: expected str"),
        ("real_data: {questions: folder}\nstages: [{name: a, steps: 1}]", "questions: expected"),
        ("real_data: {texts: [1]}\nstages: [{name: a, steps: 1}]", "texts: expected str, got 1"),
        ("model: 3\nstages: [{name: a, steps: 1}]", "model: expected Mapping"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path, text, said):
    with pytest.raises(ConfigError, match=said) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "config.yaml"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"], ids=["missing", "no text"])
def test_an_unreadable_file_is_one_clear_line(tmp_path, content):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(path)


def test_all_documents_of_a_world_can_be_numbered():
    """Exactly as many numbers as documents is enough, and they are found."""
    import random

    from msa.training.samples import draw_numbers

    settings = WorldSettings(documents=90, min_digits=2, max_digits=2)
    numbers = draw_numbers(random.Random(0), settings.documents, 2, 2)
    assert sorted(numbers) == list(range(10, 100))
