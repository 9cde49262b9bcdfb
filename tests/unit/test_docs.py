"""What the pages name exists, what they show works, and their figures follow from the code."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import msa
from msa.memory.store.records import EncodedBatch
from msa.training import config as training_config

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in [ROOT / "README.md", *DOCS.glob("*.md")] if path.is_file())
# Pages whose Python blocks stand by themselves and are run, in order, in one namespace. A block
# below a line `<!-- not run: REASON -->` is left out.
RUN = ["concepts.md", "training.md", "walkthrough.md"]

FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]*?) -->\n+)?"
    r"^```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(([^()\s]+)\)")
DOTTED = re.compile(r"(?<![\w./-])msa(?:\.[A-Za-z_]\w*)+")
PATH = re.compile(r"(?<![\w./-])(?:\.\./)?((?:src|tests|configs|tools|benchmarks)/[\w./-]*[\w/])")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


class Block(NamedTuple):
    language: str
    body: str
    line: int
    runs: bool


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            match["language"],
            match["body"],
            text.count("\n", 0, match.start("body")) + 1,
            match["reason"] is None,
        )
        for match in FENCE.finditer(text)
    ]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def resolve(dotted: str) -> object:
    """What a dotted name means: a module, something in it, or a field of a class in it."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            fields = getattr(found, "__annotations__", {})
            found = fields[part] if part in fields else getattr(found, part)
        return found
    raise AttributeError(dotted)


@each_page
def test_relative_links_lead_somewhere(page):
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target} leads nowhere"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{page.name}: {target} has no such heading"


@each_page
def test_names_and_paths_exist(page):
    for dotted in sorted(set(DOTTED.findall(prose(page)))):
        try:
            resolve(dotted)
        except (AttributeError, KeyError):
            pytest.fail(f"{page.name} names {dotted}, which does not exist")
    for path in sorted(set(PATH.findall(page.read_text(encoding="utf-8")))):
        assert (ROOT / path).exists(), f"{page.name} names {path}, which does not exist"


@pytest.fixture(scope="module")
def tests() -> set[str]:
    """Names of all tests."""
    paths = (ROOT / "tests").rglob("test_*.py")
    texts = [path.read_text(encoding="utf-8") for path in paths]
    return {name for text in texts for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}


@each_page
def test_tests_that_a_page_names_exist(page, tests):
    assert set(re.findall(r"`(test_\w+)`", prose(page))) <= tests


@each_page
def test_python_blocks_compile_and_import_what_exists(page):
    for block in blocks(page):
        if block.language != "python":
            continue
        where = f"{page.name}:{block.line}"
        for node in ast.walk(ast.parse(block.body, where)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "msa":
                for alias in node.names:
                    assert resolve(f"{node.module}.{alias.name}") is not None, where


@pytest.mark.parametrize("name", RUN)
def test_python_blocks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(DOCS / name):
        if block.language == "python" and block.runs:
            exec(compile(block.body, f"{name}:{block.line}", "exec"), namespace)


@each_page
def test_formulas_are_balanced(page):
    formulas = [b.body for b in blocks(page) if b.language == "math"]
    inline = re.findall(r"\$`([^`]*)`\$", prose(page))
    for formula in [*formulas, *inline]:
        bare = re.sub(r"\\[{}]", "", formula)
        assert bare.count("{") == bare.count("}"), formula
        assert formula.count(r"\left") == formula.count(r"\right"), formula


def test_the_map_names_every_page():
    linked = set(LINK.findall(prose(DOCS / "index.md")))
    assert {path.name for path in DOCS.glob("*.md")} - {"index.md"} <= linked


def test_every_public_name_is_listed_and_leads_to_its_definition():
    text = prose(DOCS / "api.md")
    assert set(re.findall(r"`(msa\.\w+)`", text)) >= {f"msa.{name}" for name in msa.__all__}
    for name, file, anchor in re.findall(r"\[`([\w.]+)`\]\(\.\./(src/[\w/]+\.py)#(\w+)\)", text):
        assert name.endswith(f".{anchor}")
        assert anchor in defined_in(ROOT / file), f"docs/api.md: {file} does not define {anchor}"


# ---- the site


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_has_every_page_and_a_reference_of_every_room(hooks):
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1].split("\ntheme:")[0]
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert set(re.findall(r"[\w/]+\.md", nav)) == pages | {
        f"api/{room}.md" for room in hooks.modules()
    }


@pytest.mark.parametrize(
    ("page", "markdown", "shown"),
    [
        ("a.md", "$`x_i`$ and `$x`", r"\(x_i\) and `$x`"),
        ("a.md", "```math\nx^2\n```\n", "\\[\nx^2\n\\]\n"),
        ("a.md", "```sh\necho $`x`$ [a](../b.md)\n```\n", "```sh\necho $`x`$ [a](../b.md)\n```\n"),
        ("a.md", "[`e`](../src/msa/errors.py)", "[`e`](api/errors.md#msa.errors)"),
        ("a.md", "[d](../src/msa/types.py#Document)", "[d](api/types.md#msa.types.Document)"),
        ("results/a.md", "[e](../../src/msa/errors.py)", "[e](../api/errors.md#msa.errors)"),
        ("a.md", "[k](../src/msa/ops/kernels/__init__.py)", "[k](api/ops.md#msa.ops.kernels)"),
        ("a.md", "[m](../src/msa/cli/main.py), [t](../tests/x.py)", "m, t"),
        ("results/a.md", "[asking](../inference.md#tiers)", "[asking](../inference.md#tiers)"),
    ],
)
def test_what_is_written_for_github_is_shown_on_the_site(hooks, page, markdown, shown):
    about = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert hooks.on_page_markdown(markdown, about) == shown


# ---- docs/walkthrough.md


def modules_named() -> dict[Path, int]:
    """Modules below src/msa that the walk names, themselves or by their folder -> place."""
    named: dict[Path, int] = {}
    walk = (DOCS / "walkthrough.md").read_text(encoding="utf-8").split("## Adding a backbone")[0]
    for place, match in enumerate(re.finditer(r"`(src/msa/\S*?)`", walk)):
        path = ROOT / match[1]
        # headings name whole packages; only a link in a table stands for all files of a folder
        heading = walk[: match.start()].rsplit("\n", 1)[-1].startswith("#")
        files = [path] if path.is_file() else [] if heading else path.rglob("*.py")
        for file in files:
            named.setdefault(file, place)
    return named


def test_the_walk_names_every_module():
    every = {  # but those that are a docstring and nothing else
        path
        for path in (ROOT / "src" / "msa").rglob("*.py")
        if len(ast.parse(path.read_text(encoding="utf-8")).body) > 1
    }
    missing = every - modules_named().keys() - {ROOT / "src/msa/__init__.py"}
    assert not missing, f"give them a row in docs/walkthrough.md: {sorted(missing)}"


def test_the_walk_follows_the_imports():
    named = modules_named()
    for path, place in named.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("msa."):
                base = ROOT / "src" / Path(*node.module.split("."))
                target = base.with_suffix(".py")
                target = target if target.is_file() else base / "__init__.py"
                assert named.get(target, 0) <= place, (
                    f"docs/walkthrough.md: {path.name} stands above {target}, which it imports"
                )


def defined_in(file: Path) -> set[str]:
    """Functions, classes and `Class.method` of a module, and its file name."""
    found = {file.name}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            found |= {f"{node.name}.{method.name}" for method in methods}
    return found


def test_what_the_walk_says_to_read_is_there():
    rows = re.findall(r"^\|(.*src/msa/.*)\|$", prose(DOCS / "walkthrough.md"), re.MULTILINE)
    tables = [cells for row in rows if len(cells := row.split("|")) == 4]
    assert tables
    for first, *_, read in tables:
        paths = [ROOT / path for path in re.findall(r"`(src/msa/[^`]+)`", first)]
        files = [f for path in paths for f in ([path] if path.is_file() else path.rglob("*.py"))]
        wanted = set(re.findall(r"`([^`]+)`", read))
        assert wanted, first
        missing = wanted - set().union(*map(defined_in, files))
        assert not missing, f"{first.strip()}: {missing}"


# ---- docs/training.md


def test_the_yaml_blocks_are_valid_configs(tmp_path):
    found = [b for b in blocks(DOCS / "training.md") if b.language == "yaml"]
    assert found
    for block in found:
        path = tmp_path / f"{block.line}.yaml"
        path.write_text(block.body, encoding="utf-8")
        training_config.load_config(path)


@pytest.mark.parametrize(
    "name",
    [
        "TrainingConfig",
        "Stage",
        "WorldSettings",
        "SampleSettings",
        "LossSettings",
        "OptimizerSettings",
        "TokenizerSettings",
        "RealData",
        "QuestionStage",
        "QuestionSettings",
        "AdapterSettings",
        "RouterStage",
        "RouterSettings",
        "StateSettings",
        "PairSettings",
    ],
)
def test_every_key_of_the_configuration_is_explained_and_no_other(name):
    section = prose(DOCS / "training.md").split("## Configuration")[1].split("## Real data")[0]
    table = section.split(f"`msa.training.config.{name}`")[1].split("\n| key |")[1]
    rows = re.findall(r"^\| (`[^|]+`) \|", table.split("\n\n")[0], re.MULTILINE)
    keys = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    fields = {f.name for f in dataclasses.fields(getattr(training_config, name))}
    assert keys == fields


# ---- docs/concepts.md


def test_the_bytes_per_token_of_the_default_model_follow_from_its_config():
    model = training_config.load_config(ROOT / "configs" / "worlds.yaml").model
    values = 3 * len(model["routing_layers"]) * model["num_key_value_heads"] * model["head_dim"]
    per_token = values * 4 // model["chunk_size"]
    text = (DOCS / "concepts.md").read_text(encoding="utf-8")
    assert f"| **bytes per token** | **1728** | **{per_token}** |" in text
    assert f"| of these, routing keys | 576 | {per_token // 3} |" in text
    assert f"| 100 million tokens | 172.8 GB | {per_token / 10:.1f} GB |" in text


def test_the_formula_of_the_costs_is_that_of_the_code(tiny_model):
    config = tiny_model.config
    with torch.no_grad():
        states = tiny_model.encode_documents(torch.randint(2, 400, (2, 24)), torch.tensor([24, 16]))
    values = 3 * len(config.routing_layers) * config.num_key_value_heads * config.head_dim
    assert EncodedBatch((1, 2), states).num_bytes == values * 4 * (24 + 16) // config.chunk_size
