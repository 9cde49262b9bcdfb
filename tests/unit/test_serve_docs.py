"""docs/serving.md and examples/serving say what the service is."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import typer
import yaml

from msa.cli.main import app

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
pytest.importorskip("mcp", reason="needs the extra 'serve'")

from msa.serve.app import create_app
from msa.serve.keys import Keys
from msa.serve.openai.requests import MsaOptions
from msa.serve.settings import ServeSettings

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "serving.md"
EXAMPLES = ROOT / "examples" / "serving"
# Read by the library itself, not by the service's settings.
OTHER_NAMES = {"MSA_HOME"}


@pytest.fixture(scope="module")
def conformance():
    pytest.importorskip("openai", reason="the table is made from the client's types")
    spec = importlib.util.spec_from_file_location("conformance", ROOT / "tools" / "conformance.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setitem(sys.modules, "conformance", module)  # its dataclass looks itself up
    spec.loader.exec_module(module)
    yield module
    monkeypatch.undo()


def names_of_settings() -> set[str]:
    return {f"MSA_{field.upper()}" for field in ServeSettings.model_fields}


def test_the_table_of_openais_endpoints_is_current(conformance):
    page = PAGE.read_text(encoding="utf-8")
    assert conformance.renewed(page) == page, "run: python tools/conformance.py docs/serving.md"


def test_lists_ignore_no_parameter_of_openais(conformance):
    """A query's unknown parameters are not refused, so every one has to be known."""
    schema = create_app(ServeSettings(banks={})).openapi()
    for endpoint in conformance.ENDPOINTS:
        method, path = endpoint.call.split()
        if method != "GET":
            continue
        shape = re.sub(r"{[^}]*}", "{}", path)
        found = [p for p in schema["paths"] if re.sub(r"{[^}]*}", "{}", p) == shape]
        for served in found:
            taken = conformance.ours(schema, schema["paths"][served]["get"])
            assert conformance.theirs(endpoint) <= taken.keys(), endpoint.call


def test_every_setting_is_in_the_page():
    page = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"MSA_[A-Z_]+", page)) >= names_of_settings()


def test_every_option_of_the_command_is_in_the_page():
    page = PAGE.read_text(encoding="utf-8")
    options = typer.main.get_command(app).commands["serve"].params
    names = {name for option in options for name in option.opts if name.startswith("--")}
    assert names
    assert not {name for name in names if f"`{name}" not in page}


def test_every_route_of_the_native_api_is_in_the_page():
    page = PAGE.read_text(encoding="utf-8")
    for path in create_app(ServeSettings(banks={})).openapi()["paths"]:
        if path.startswith("/api/"):
            last = re.split(r"[/:]", re.sub(r"/{[^}]*}", "", path))[-1]
            assert last in page, path


@pytest.mark.parametrize("name", ["compose.yaml", "Containerfile", "msa-serve.service"])
def test_examples_set_what_there_is_to_set(name):
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert set(re.findall(r"\bMSA_[A-Z_]+", text)) <= names_of_settings() | OTHER_NAMES


def test_the_example_of_a_key_file_is_one():
    keys = Keys.load(EXAMPLES / "keys.example")
    assert keys.find("example-reader").allows("read", "notes")
    assert not keys.find("example-reader").allows("write", "notes")
    assert keys.find("example-owner").allows("admin", "other")


def test_the_compose_file_mounts_what_the_image_reads():
    services = yaml.safe_load((EXAMPLES / "compose.yaml").read_text(encoding="utf-8"))["services"]
    image = (EXAMPLES / "Containerfile").read_text(encoding="utf-8")
    targets = [volume.split(":")[1] for volume in services["msa"]["volumes"]]
    assert f"MSA_API_KEY_FILE={targets[1]}" in image
    assert f"MSA_BANKS_FOLDER={targets[0]}/" in image
    assert services["msa"]["build"]["dockerfile"] == "examples/serving/Containerfile"


INSTRUCTIONS = {
    *("FROM", "ARG", "WORKDIR", "RUN", "COPY", "ENV", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK"),
    *("STOPSIGNAL", "CMD"),
}


def instructions() -> list[tuple[str, str]]:
    """Those of the Containerfile, each with its arguments on one line."""
    text = (EXAMPLES / "Containerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in joined.splitlines()]


def test_the_containerfile_is_built_from_what_there_is():
    found = instructions()
    assert {word for word, _ in found} == INSTRUCTIONS
    stages: set[str] = set()
    ignored = (EXAMPLES / "Containerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    given = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    for word, rest in found:
        if word == "FROM":
            image, *name = rest.split(" AS ")
            assert re.fullmatch(r"[\w./-]+:[\w.-]+", image), "an image without a tag"
            stages.update(name)
        if word == "COPY":
            *sources, _target = rest.split()
            if sources[0].startswith("--from="):
                assert sources[0].removeprefix("--from=") in stages
            else:
                assert set(sources) <= given
                assert all((ROOT / source).exists() for source in sources), rest
        if word == "CMD" or " CMD" in rest:
            command = json.loads(rest[rest.index("[") :])
            assert all(isinstance(part, str) for part in command)
            if command[0] == "python":
                ast.parse(command[2])


def test_the_image_installs_the_pinned_torch_and_extras_that_there_are():
    text = (EXAMPLES / "Containerfile").read_text(encoding="utf-8")
    (pattern,) = re.findall(r"grep '([^']+)' constraints\.txt", text)
    pinned = re.findall(rf"(?m){pattern}.*$", (ROOT / "constraints.txt").read_text("utf-8"))
    assert len(pinned) == 1
    (extras,) = re.findall(r"'\.\[([\w,-]+)\]'", text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()


def test_the_image_runs_as_the_user_that_the_page_names():
    users = [rest for word, rest in instructions() if word == "USER"]
    assert users == ["10001"], "a number, so that an orchestrator sees that it is not root"
    runs = [rest for word, rest in instructions() if word == "RUN"]
    assert any(f"--uid {users[0]} " in rest for rest in runs)
    assert f"(id {users[0]})" in PAGE.read_text(encoding="utf-8")


def test_the_compose_file_names_only_what_there_is():
    compose = yaml.safe_load((EXAMPLES / "compose.yaml").read_text(encoding="utf-8"))
    assert compose.keys() == {"services", "volumes"}
    for service in compose["services"].values():
        if "build" in service:
            context = (EXAMPLES / service["build"]["context"]).resolve()
            assert context == ROOT
            assert (context / service["build"]["dockerfile"]).is_file()
        if "env_file" in service:
            assert (EXAMPLES / service["env_file"]).is_file()
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:"), "open to the network"
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source.startswith("./") or source in compose["volumes"]
        assert set(service.get("depends_on", ())) <= compose["services"].keys()
    seconds = compose["services"]["msa"]["stop_grace_period"]
    assert int(seconds.removesuffix("s")) > ServeSettings.model_fields["shutdown_seconds"].default


def test_chat_programs_are_told_where_the_service_is():
    (endpoint,) = yaml.safe_load((EXAMPLES / "librechat.yaml").read_text("utf-8"))["endpoints"][
        "custom"
    ]
    compose = yaml.safe_load((EXAMPLES / "compose.yaml").read_text(encoding="utf-8"))["services"]
    settings = (EXAMPLES / "open-webui.env").read_text(encoding="utf-8")
    assert f"OPENAI_API_BASE_URLS={endpoint['baseURL']}\n" in settings
    host = urlsplit(endpoint["baseURL"]).hostname
    assert host in compose
    assert host in compose["msa"]["environment"]["MSA_ALLOWED_HOSTS"].split(",")
    MsaOptions.model_validate(endpoint["addParams"]["msa"])


def test_the_unit_gives_a_stop_more_time_than_the_service_takes():
    unit = (EXAMPLES / "msa-serve.service").read_text(encoding="utf-8")
    seconds = int(re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[1])
    assert seconds > ServeSettings.model_fields["shutdown_seconds"].default


def test_what_the_example_of_the_client_calls_exists():
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="none")
    tree = ast.parse((EXAMPLES / "openai_client.py").read_text(encoding="utf-8"))
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    calls = [name.split(".")[1:] for name in called if name.startswith("client.")]
    assert len(calls) == 3
    for parts in calls:
        found = client
        for part in parts:
            found = getattr(found, part)
        assert callable(found)
    client.close()
