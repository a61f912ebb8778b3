import pickle

import pytest
from pydantic import ValidationError

from app.settings import Settings, refuse_unknown_variables


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    import os

    for name in [name for name in os.environ if name.startswith("TISSUE_")]:
        monkeypatch.delenv(name)


def test_defaults_are_safe():
    settings = Settings()
    assert (settings.host, settings.port, settings.device, settings.precision) == ("127.0.0.1", 8000, "auto", "auto")
    assert (settings.max_body_mib, settings.max_megapixels, settings.workers) == (32, 50, 1)
    assert settings.read_keys() == frozenset() and settings.cors_origins == ()


def test_variables_are_read(monkeypatch):
    monkeypatch.setenv("TISSUE_MAX_QUEUE", "7")
    monkeypatch.setenv("TISSUE_CORS_ORIGINS", "https://a.example, https://b.example")
    settings = Settings()
    assert settings.max_queue == 7
    assert settings.cors_origins == ("https://a.example", "https://b.example")


@pytest.mark.parametrize(
    ("name", "nearest"), [("TISSUE_PROT", "TISSUE_PORT"), ("TISSUE_MAX_BODY_MB", "TISSUE_MAX_BODY_MIB")]
)
def test_an_unknown_variable_is_refused_with_the_nearest_known_one(monkeypatch, name, nearest):
    monkeypatch.setenv(name, "1")
    with pytest.raises(ValidationError, match=f"no setting is called {name}; the nearest is {nearest}"):
        Settings()


@pytest.mark.parametrize("name", ["TISSUE_SERVICE_HOST", "TISSUE_PORT_8000_TCP_ADDR"])
def test_what_kubernetes_adds_is_explained(name):
    with pytest.raises(ValueError, match="enableServiceLinks: false"):
        refuse_unknown_variables({name: "10.0.0.1"})


def test_the_port_that_kubernetes_sets_is_explained(monkeypatch):
    monkeypatch.setenv("TISSUE_PORT", "tcp://10.0.0.1:8000")
    with pytest.raises(ValidationError, match="Service named 'tissue'"):
        Settings()


@pytest.mark.parametrize(
    "wrong", [{"port": 70000}, {"device": "tpu"}, {"max_queue": 0}, {"workers": 0}, {"log_format": "xml"}]
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        Settings(**wrong)


def test_keys_come_from_both_places_and_are_never_shown(monkeypatch, tmp_path):
    (tmp_path / "keys").write_text("third\n\n  fourth \n")
    monkeypatch.setenv("TISSUE_API_KEYS", "first,second")
    monkeypatch.setenv("TISSUE_API_KEYS_FILE", str(tmp_path / "keys"))
    settings = Settings()
    assert settings.read_keys() == {"first", "second", "third", "fourth"}
    assert "first" not in repr(settings) and "first" not in settings.model_dump_json()


def test_a_file_without_keys_would_leave_the_door_open(tmp_path):
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(ValidationError, match="holds no key"):
        Settings(api_keys_file=tmp_path / "keys")


@pytest.mark.parametrize("nothing", ["", " , "])
def test_a_variable_without_keys_would_leave_the_door_open(monkeypatch, nothing):
    monkeypatch.setenv("TISSUE_API_KEYS", nothing)
    with pytest.raises(ValidationError, match="holds no key"):
        Settings()


@pytest.mark.parametrize("key", ["\udcff", "a\nb"])
def test_a_key_that_no_header_can_carry_is_refused(monkeypatch, tmp_path, key):
    with pytest.raises(ValidationError, match="no header can carry") as refused:
        Settings(api_keys=(key, "another"))
    assert "another" not in str(refused.value)
    (tmp_path / "keys").write_text("good\nb\x01d\n")
    with pytest.raises(ValidationError, match="no header can carry"):
        Settings(api_keys_file=tmp_path / "keys")


@pytest.mark.parametrize("origin", ["viewer.example", "https://viewer.example/", "https://a.example/page"])
def test_what_no_browser_sends_as_origin_is_refused(origin):
    with pytest.raises(ValidationError, match="is no origin"):
        Settings(cors_origins=("https://b.example", origin))
    assert Settings(cors_origins=("*", "https://a.example:8443", "http://localhost:3000")).cors_origins


def test_every_setting_is_described():
    assert all(field.description for field in Settings.model_fields.values())


def test_settings_travel_to_worker_processes():
    settings = Settings(api_keys=("secret",), port=1234)
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_keys_are_read_once_from_a_file_as_any_editor_writes_it(tmp_path):
    keys = tmp_path / "keys"
    keys.write_bytes("\ufefffirst\r\n\r\nzweiter-schlüssel\r\n".encode())
    settings = Settings(api_keys_file=keys)
    keys.write_text("")  # what a worker that is started later would find
    later = pickle.loads(pickle.dumps(settings))
    assert settings.read_keys() == later.read_keys() == {"first", "zweiter-schlüssel"}
    assert "first" not in repr(later) and "first" not in later.model_dump_json()


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_keys_file_that_cannot_be_read_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ValidationError, match=r"keys, which --api-keys-file .* names, can't be read as UTF-8"):
        Settings(api_keys_file=tmp_path / "keys")
