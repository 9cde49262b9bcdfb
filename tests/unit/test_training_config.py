from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import yaml

from msa.errors import ConfigError
from msa.training import config as config_module
from msa.training.config import (
    LossSettings,
    QuestionStage,
    RealData,
    RouterStage,
    SampleSettings,
    Stage,
    TrainingConfig,
    WorldSettings,
    load_config,
)
from msa.training.overrides import override
from msa.training.settings import Settings

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


def load(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


def stage(**values):
    return yaml.safe_dump({"stages": [{"name": "a", "steps": 1, **values}]})


ONE = "stages: [{name: a, steps: 1}]\n"


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
        ("stages: [{name: a, steps: 1}]\nsteps: 3", "unknown key 'steps'; did you mean 'stages'?"),
        ("colour: red", "unknown key 'colour'; known are adapter, bfloat16, .*"),
        (stage(stepz=3), r"stages\[0\]: unknown key 'stepz'; did you mean 'steps'\?"),
        (stage(world={"docs": 3, 5: 1}), r"stages\[0\]\.world: unknown key 'docs'; did you mean"),
        (stage(world={5: 1}), r"stages\[0\]\.world: unknown key 5; known are breadth"),
        (stage(samples={"reed": 3}), r"samples: unknown key 'reed'; did you mean 'read'\?"),
        (stage(losses=[1]), r"stages\[0\]\.losses: expected a mapping, got \[1\]"),
        ("stages: [{steps: 3}]", r"stages\[0\]\.name: is missing"),
        ("seed: 1", "at least one entry under 'stages'"),
        ("stages: []", "at least one entry under 'stages'"),
        ("stages: 3", "stages: expected a list, got 3"),
        ("stages: {a: 1}", "stages: expected a list, got {'a': 1}"),
        ("stages: [a]", r"stages\[0\]: expected a mapping, got 'a'"),
        ("stages: [{name: a, steps: 1}, {name: a, steps: 2}]", "names of their own"),
        ("", "expected a mapping, got NoneType"),
        ("- 1", "expected a mapping, got list"),
        ("a: [", "cannot be read as YAML"),
        (stage(steps="many"), r"stages\[0\]\.steps: expected a whole number, got 'many'"),
        (stage(steps=1.5), "steps: expected a whole number, got 1.5"),
        (stage(steps=True), "steps: expected a whole number, got True"),
        (stage(steps=0), r"stages\[0\]\.steps: expected 1 or more, got 0"),
        (stage(name="a/b"), r"stages\[0\]\.name: expected letters.*, got 'a/b'"),
        (stage(name="adapter"), "got 'adapter'"),
        (stage(learning_rate="fast"), "learning_rate: expected a number, got 'fast'"),
        (stage(learning_rate=0), "learning_rate: expected more than 0.0, got 0"),
        (stage(losses={"routing": -1}), r"losses\.routing: expected 0.0 or more, got -1"),
        (stage(losses={"routing": float("nan")}), r"losses\.routing: expected a finite number"),
        (stage(world={"breadth": ["wide"]}), r"breadth\[0\]: expected a number, got 'wide'"),
        (stage(world={"breadth": []}), r"breadth: expected one or two numbers .*, got \[\]"),
        (stage(world={"breadth": 1.5}), r"breadth\[0\]: expected 1.0 or less, got 1.5"),
        (stage(world={"real": 2}), "real: expected 1.0 or less, got 2"),
        (stage(world={"documents": 0}), r"world\.documents: expected 1 or more, got 0"),
        (stage(world={"min_digits": 4, "max_digits": 3}), "min_digits=4, max_digits=3"),
        (stage(world={"max_digits": 9}), "max_digits: expected 8 or less, got 9"),
        (
            stage(world={"documents": 10, "min_digits": 1, "max_digits": 1}),
            r"stages\[0\]\.world: documents=10: only 9 numbers have 1 to 1 digits",
        ),
        (stage(kind="question"), r"stages\[0\]\.kind: expected one of 'worlds', .*'question'"),
        (stage(kind="questions"), "question_sets: name some"),
        (stage(kind="questions", world={}), r"stages\[0\]: unknown key 'world'"),
        ("stages: [{kind: routers, name: a}]", "'a' trains routers on nothing"),
        (
            "stages: [{kind: routers, name: a, texts: [x], training: {epochs: 0}}]",
            r"stages\[0\]\.training\.epochs: expected 1 or more, got 0",
        ),
        (ONE + "question_sets: [{path: a, wight: 2}]", r"question_sets\[0\]: unknown key 'wight'"),
        (ONE + "question_sets: [3]", r"question_sets\[0\]: expected a mapping, got 3"),
        (ONE + "adapter: {rank: 0}", "adapter.rank: expected 1 or more, got 0"),
        (ONE + "adapter: {rank: 4}", "adapter: needs start_from"),
        (ONE + "fsdp: true", "fsdp: Muon needs whole matrices; set optimizer.muon to false"),
        (ONE + "save_steps: 0", "save_steps: expected 1 or more, got 0"),
        (ONE + "bfloat16: 1", "bfloat16: expected true or false, got 1"),
        (ONE + "start_from: 1", "start_from: expected a text, got 1"),
        (ONE + "real_data: {questions: folder}", r"real_data\.questions: expected a list, got 'fo"),
        (ONE + "real_data: {texts: [1]}", r"real_data\.texts\[0\]: expected a text, got 1"),
        (ONE + "model: 3", "model: expected a mapping, got 3"),
        (stage(steps=0, learning_rate=0), r"steps: expected 1 or more, got 0 \(and 1 more\)"),
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


CLASSES = [
    value
    for value in vars(config_module).values()
    if isinstance(value, type) and issubclass(value, Settings) and value is not Settings
]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_nothing_is_taken_for_something_else(cls):
    """A text is no number, a number no switch: every field refuses what is of another kind."""
    needed = {"name": "a", "steps": 1, "path": "a"}
    names = {field.name for field in fields(cls)}
    good = {
        key: value for key, value in needed.items() if key in names and cls is not SampleSettings
    }
    made = cls(**good)
    for field in fields(cls):
        value = getattr(made, field.name)
        wrong = 7 if isinstance(value, str | bool | tuple | dict) or value is None else "7"
        if field.name == "breadth":
            wrong = "7"
        with pytest.raises(ConfigError, match=rf"^{field.name}"):
            cls(**{**good, field.name: wrong})
        with pytest.raises(FrozenInstanceError):
            setattr(made, field.name, value)


def test_settings_made_in_python_say_what_is_wrong_too():
    with pytest.raises(ConfigError, match=r"^steps: expected 1 or more, got 0$"):
        Stage(name="a", steps=0)
    with pytest.raises(ConfigError, match=r"^unknown key 'stepz'; did you mean 'steps'"):
        Stage(name="a", stepz=1)


def test_stages_of_every_kind_are_told_by_their_kind(tmp_path):
    config = load(
        tmp_path,
        """
question_sets: [a, {path: b, weight: 2}]
stages:
  - {name: one, steps: 4}
  - {kind: worlds, name: two, steps: 4}
  - {kind: questions, name: three, steps: 4}
  - {kind: routers, name: four}
""",
    )
    assert [type(s) for s in config.stages] == [Stage, Stage, QuestionStage, RouterStage]
    assert [(s.path, s.weight) for s in config.question_sets] == [("a", 1.0), ("b", 2.0)]


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("seed=3", ("seed",), 3),
        ("start_from=runs/base", ("start_from",), "runs/base"),
        ("stages[1].steps=7", ("stages", 1, "steps"), 7),
        ("stages[*].steps=7", ("stages", 0, "steps"), 7),
        ("stages[0].losses.routing=0.5", ("stages", 0, "losses", "routing"), 0.5),
        ("adapter={rank: 4}", ("adapter", "rank"), 4),
        ("adapter.base.pypi=x==1", ("adapter", "base", "pypi"), "x==1"),
        ("question_sets=[a, b]", ("question_sets", 1), "b"),
        ("question_sets=null", ("question_sets",), None),
        ("stages[1]={name: c, steps: 2}", ("stages", 1, "name"), "c"),
    ],
)
def test_an_override_puts_a_value_in_its_place_and_changes_nothing_else(text, path, value):
    values = {"seed": 1, "stages": [{"name": "a", "steps": 1}, {"name": "b", "steps": 1}]}
    override(values, text)
    found = values
    for part in path:
        found = found[part]
    assert found == value
    assert values["stages"][0]["name"] == "a"
    assert len(values["stages"]) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed", "expected KEY=VALUE"),
        ("a b=1", "expected KEY=VALUE"),
        ("stages.[0]=1", "expected KEY=VALUE"),
        ("=1", "expected KEY=VALUE"),
        ("seed=[", "the value is no YAML"),
        ("seed.x=1", "'x' stands in no mapping"),
        ("model[0]=1", r"\[0\] does not follow a list"),
        ("stages[2].steps=1", "the list has 1 entries, counted from 0"),
    ],
)
def test_an_override_that_leads_nowhere_is_one_clear_line(text, said):
    with pytest.raises(ConfigError, match=said) as caught:
        override({"seed": 1, "stages": [{"name": "a"}]}, text)
    assert str(caught.value).startswith(f"--set {text}")
    assert "\n" not in str(caught.value)


def test_what_an_override_gives_is_checked_like_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(ONE, encoding="utf-8")
    assert load_config(path, ["stages[0].steps=9"]).stages[0].steps == 9
    with pytest.raises(ConfigError, match=r"stages\[0\]: unknown key 'stepz'; did you mean"):
        load_config(path, ["stages[0].stepz=9"])
