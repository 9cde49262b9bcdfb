from __future__ import annotations

import base64
import hashlib

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("pydantic_settings")

from msa.errors import ConfigError
from msa.serve.errors import ServiceError
from msa.serve.keys import ANONYMOUS, Keys, principal_of
from msa.serve.settings import ServeSettings, named_folders


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
def keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text(
        "# who may what\n"
        f"{digest('a-key')}  alice  read,write  notes,team-*\n\n"
        f"{digest('root-key').upper()} root read,write,admin *\n"
    )
    return Keys.load(file)


def test_a_key_is_known_by_its_hash(keys):
    alice = principal_of(keys, {"authorization": "Bearer a-key"})
    assert alice.name == "alice"
    assert alice.allows("write", "notes")
    assert alice.allows("read", "team-1")
    assert not alice.allows("admin", "notes")
    assert not alice.allows("read", "other")
    assert not alice.sees_all
    assert principal_of(keys, {"authorization": "bearer  root-key "}).sees_all


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer ", "Bearer b", "a-key", "Token a-key"])
def test_no_key_and_a_wrong_key_are_refused_alike(keys, given):
    with pytest.raises(ServiceError) as refused:
        principal_of(keys, {"authorization": given})
    assert refused.value.status == 401
    assert refused.value.code == "invalid_api_key"
    assert "a-key" not in refused.value.message


def test_browsers_may_give_the_key_as_a_password_to_read_only(keys):
    header = {"authorization": "Basic " + base64.b64encode(b"any:a-key").decode()}
    assert principal_of(keys, header, "GET").name == "alice"
    with pytest.raises(ServiceError):
        principal_of(keys, header, "POST")


def test_without_keys_everybody_gets_in():
    assert principal_of(Keys.load(None), {}) is ANONYMOUS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("abc alice read notes", "no SHA-256"),
        (f"{'0' * 64} alice read", "has 3 words"),
        (f"{'0' * 64} alice read,fly notes", "scope 'fly'"),
        (f"{'0' * 64} a/b read notes", "'a/b' is no name"),
        (f"{'0' * 64} anonymous read notes", "is no name"),
        (f"{'0' * 64} alice read ../notes", "no names of banks"),
        (
            f"{'0' * 64} a read n\n{'1' * 64} a read n",
            "line 2: this key or name",
        ),
        ("# nobody", "holds no key"),
    ],
)
def test_a_bad_line_of_a_key_file_is_named(tmp_path, line, message):
    file = tmp_path / "keys"
    file.write_text(line)
    with pytest.raises(ConfigError, match=message):
        Keys.load(file)


def test_a_key_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys.load(tmp_path / "none")


def test_settings_come_from_the_environment_and_what_is_given_goes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("MSA_BANKS", f"a={tmp_path},b={tmp_path}/b")
    monkeypatch.setenv("MSA_PORT", "9")
    monkeypatch.setenv("MSA_ALLOWED_HOSTS", "one.example, two.example")
    settings = ServeSettings.load(port=10, host=None)
    assert list(settings.banks) == ["a", "b"]
    assert settings.port == 10
    assert {"one.example", "two.example", "localhost"} <= settings.known_hosts


def test_other_machines_are_let_in_only_with_keys_or_on_request(tmp_path):
    with pytest.raises(ConfigError, match="--api-key-file FILE, or --no-auth"):
        ServeSettings.load(host="0.0.0.0")
    assert not ServeSettings.load(host="0.0.0.0", no_auth=True).loopback
    assert not ServeSettings.load(host="0.0.0.0", api_key_file=tmp_path / "keys").loopback
    assert ServeSettings.load(host="::1").loopback
    assert ServeSettings.load(host="localhost").loopback


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"port": 70000}, "--port"),
        ({"banks": ["a b=x"]}, "'a b' is no name of a bank"),
        ({"banks": ["a=x", "a=y"]}, "two banks are named 'a'"),
        ({"public_url": "example.org"}, "'example.org' is no address"),
        ({"encode_share": 0}, "MSA_ENCODE_SHARE"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(given, message):
    with pytest.raises(ConfigError, match=message):
        ServeSettings.load(**given)


def test_a_bank_has_the_name_of_its_folder(tmp_path):
    assert named_folders([f"{tmp_path}/notes/", f"x={tmp_path}"]) == {
        "notes": tmp_path / "notes",
        "x": tmp_path,
    }
