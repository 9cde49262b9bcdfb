"""Data flows down the layout: a file imports only what stands above it."""

from __future__ import annotations

import ast
import functools
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"
PACKAGE = SOURCE / "msa"

# Packages and modules of the first level, in the order in which data flows.
ORDER = [
    "errors",
    "build",
    "types",
    "ops",
    "text",
    "model",
    "memory",
    "inference",
    "synthetic_worlds",
    "training",
    "evaluation",
    "demo",
    "integrations",
    "serve",
    "cli",
]
# The order within packages, where one is laid down. Names on one floor do not import each other.
# Of `memory` every file has its floor; elsewhere those not named here are only kept from cycles.
WITHIN = {
    "ops": [{"pooling"}, {"routing"}, {"attention"}, {"kernels"}],
    "model": [
        {"configuration_msa"},
        {"home"},
        {"modeling_msa"},
        {"identity"},
        {"precision"},
        {"pretrained"},
        {"bases"},
        {"origin"},
        {"adapters"},
        {"calibrate"},
        {"convert"},
        {"loading"},
    ],
    "text": [
        {"prompts"},
        {"decoding"},
        {"conversion", "files", "tables"},
        {"loaders"},
        {"splitting"},
    ],
    "memory": [
        {"latent"},
        {"store"},
        {"ingest", "search"},
        {"maintenance", "stored_documents"},
        {"bank"},
        {"loaded"},
        {"distributed"},
    ],
    "inference": [{"interleave"}, {"scheduler"}, {"engine"}],
}
# Values that need nothing but errors, and so stand with `types` wherever their file lies.
VALUES = {"msa.inference.options"}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def parse(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(module: str, *, types_too: bool = True) -> dict[str, int]:
    """Modules of this package that a module imports, anywhere in the file -> line."""
    found: dict[str, int] = {}
    skipped: set[ast.AST] = set()
    for node in ast.walk(parse(module)):
        if not types_too and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            skipped |= {child for statement in node.body for child in ast.walk(statement)}
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if not only_asks_the_version(module, alias)]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: write imports in full, not relative"
            base = node.module or ""
            # `from msa.ops import pooling` is the module, `from msa.ops.pooling import f` is too
            full = [f"{base}.{alias.name}" for alias in node.names]
            full = [name for name in full if name != "msa.__version__"]
            names = [name if name in MODULES else base for name in full]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "msa" and name != module:
                found.setdefault(name, node.lineno)
    return found


def only_asks_the_version(module: str, alias: ast.alias) -> bool:
    """True for `import msa` where nothing but `msa.__version__` is used."""
    used = {
        node.attr
        for node in ast.walk(parse(module))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "msa"
    }
    return alias.name == "msa" and used <= {"__version__"}


def test_every_module_has_its_place_in_the_order():
    first_level = {name.split(".")[1] for name in MODULES if "." in name}
    assert first_level == set(ORDER), f"place or remove: {first_level ^ set(ORDER)}"


@pytest.mark.parametrize("package", WITHIN)
def test_the_order_within_a_package_names_what_exists(package):
    inside = {name.split(".")[2] for name in MODULES if name.startswith(f"msa.{package}.")}
    placed = set().union(*WITHIN[package])
    assert placed <= inside, f"remove: {placed - inside}"
    assert package != "memory" or placed == inside, f"give them a floor: {inside - placed}"


def floor(package: str, name: str) -> int | None:
    """The floor of a file or folder of a package; None where none is laid down."""
    return next((i for i, names in enumerate(WITHIN.get(package, [])) if name in names), None)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"msa"}))
def test_a_file_imports_only_what_stands_above_it(module):
    package, *rest = module.split(".")[1:]
    for imported, line in imports(module).items():
        where = f"{module}:{line} imports {imported}"
        if imported == "msa":
            # The face gives lazy access to everything; only the command line, below all, uses it.
            assert package == "cli", f"{where}; import from the file that defines the name"
            continue
        if imported in VALUES:
            continue
        other, *other_rest = imported.split(".")[1:]
        assert ORDER.index(other) <= ORDER.index(package), f"{where}, which stands below it"
        if other == package and rest and other_rest and rest[0] != other_rest[0]:
            mine, theirs = floor(package, rest[0]), floor(package, other_rest[0])
            if mine is not None and theirs is not None:
                assert theirs < mine, f"{where}, which does not stand above it"


@pytest.mark.parametrize("module", sorted(VALUES))
def test_values_need_nothing_but_errors(module):
    assert set(imports(module)) <= {"msa.errors"}


def test_there_are_no_cycles():
    graph = {module: set(imports(module, types_too=False)) - {"msa"} for module in MODULES}
    graph.pop("msa")
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module in done or module not in graph:
            return
        for other in graph[module]:
            visit(other, (*trail, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_is_unpickled_or_evaluated(module):
    """Banks and checkpoints come from strangers: safetensors and JSON only."""
    for node in ast.walk(parse(module)):
        where = f"{module}:{getattr(node, 'lineno', '?')}"
        if isinstance(node, ast.Import):
            assert not {a.name.split(".")[0] for a in node.names} & {"pickle", "dill", "shelve"}, (
                where
            )
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in {"pickle", "dill", "shelve"}, where
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in {"eval", "exec", "torch.load", "torch.save", "pd.read_pickle"}, where
        if isinstance(node, ast.keyword) and node.arg in {"weights_only", "allow_pickle"}:
            assert ast.unparse(node.value) != {"weights_only": "False"}.get(node.arg, "True"), where


def run_python(code: str) -> str:
    environment = dict(os.environ, PYTHONPATH=str(SOURCE))
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


HEAVY = "sorted({'torch', 'transformers', 'numpy', 'markitdown'} & set(sys.modules))"


@pytest.mark.parametrize("module", ["msa", "msa.errors", "msa.types", "msa.cli.main"])
def test_importing_it_imports_nothing_heavy(module):
    assert run_python(f"import sys, {module}; print({HEAVY})") == "[]"


def test_loading_documents_needs_no_torch():
    code = f"import sys, msa.text.loaders, msa.text.splitting; print({HEAVY})"
    assert run_python(code) == "[]"


def test_help_is_there_within_a_second_and_imports_no_torch():
    code = (
        "import sys; from msa.cli.main import main\n"
        "try: main(['--help'])\n"
        f"except SystemExit: print({HEAVY})"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run_python(code).endswith("[]")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Time of the processor, not of the wall: the machine may be busy with other things.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_every_public_name_is_found():
    import msa

    for name in msa.__all__:
        assert getattr(msa, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = msa.nothing


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_file_needs_what_windows_lacks(module):
    names = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in parse(module).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not names & {"fcntl", "grp", "posix", "pwd", "resource", "termios"}
