"""What hadolint, `docker compose config`, promtool and a first deployment would find, without any of them."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml  # type: ignore[import-untyped]
from packaging.requirements import Requirement

from app.errors import HTTP_KINDS, KINDS
from app.metrics import Metrics
from app.server import KEEP_ALIVE_S
from app.settings import Settings, refuse_unknown_variables
from tests.app.conftest import PATIENCE_S, start

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
GUIDE = (ROOT / "docs" / "deployment.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEFAULTS = {name: field.default for name, field in Settings.model_fields.items()}
LONGEST_STOP_S = (DEFAULTS["drain_ms"] + DEFAULTS["deadline_ms"]) / 1000

Instructions = list[tuple[str, str]]


def read_stages() -> dict[str, Instructions]:
    """The Dockerfile's stages with their instructions, those of the stage they build on first."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    stages: dict[str, Instructions] = {}
    for line in filter(str.strip, text.splitlines()):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stages[name] = [*stages.get(base, [("FROM", base)])]
        elif stages:
            stages[name].append((word, rest))
    return stages


STAGES = read_stages()


def find(stage: str, word: str) -> list[str]:
    return [rest for found, rest in STAGES[stage] if found == word]


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def read_compose(**variables: str) -> Any:
    return yaml.safe_load(interpolate((ROOT / "docker-compose.yml").read_text(), variables))


def interpolate(text: str, variables: dict[str, str]) -> str:
    """As compose does: ${NAME:-default} and ${NAME:+replacement}, the innermost first."""

    def replace(match: re.Match[str]) -> str:
        value = variables.get(match["name"], "")
        return (match["word"] if value else "") if match["sign"] == "+" else value or match["word"]

    inner = re.compile(r"\$\{(?P<name>\w+):(?P<sign>[-+])(?P<word>[^${}]*)\}")
    while inner.search(text):
        text = inner.sub(replace, text)
    assert "${" not in text
    return text


def read_lock(name: str) -> dict[str, list[Requirement]]:
    pins: dict[str, list[Requirement]] = {}
    for line in (ROOT / name).read_text().splitlines():
        if line and line[0] not in " #":
            pin = Requirement(line.removesuffix(" \\"))
            pins.setdefault(pin.name, []).append(pin)
    return pins


class TestDockerfile:
    @pytest.mark.parametrize("target", ["cpu", "gpu"])
    def test_runs_as_a_numbered_user_from_one_slim_base(self, target):
        assert find(target, "FROM") == ["python:${PYTHON}-slim"]
        assert find(target, "USER") == ["10001:10001"]

    @pytest.mark.parametrize("target", ["cpu", "gpu"])
    def test_the_server_itself_gets_the_signal(self, target):
        assert [json.loads(command) for command in find(target, "ENTRYPOINT")] == [["tissue"]]
        assert [json.loads(command) for command in find(target, "CMD")] == [["serve"]]
        assert find(target, "STOPSIGNAL") == ["SIGTERM"]

    @pytest.mark.parametrize("target", ["cpu", "gpu"])
    def test_nothing_is_built_in_what_is_shipped(self, target):
        assert not find(target, "RUN")
        assert find(target, "COPY")[-2:] == [
            f"--from={target}-dependencies /opt/tissue /opt/tissue",
            "--from=package /opt/tissue /opt/tissue",
        ]

    @pytest.mark.parametrize(
        ("stage", "lock"), [("cpu-dependencies", "requirements.lock"), ("gpu-dependencies", "requirements-gpu.lock")]
    )
    def test_code_does_not_touch_the_layer_of_dependencies(self, stage, lock):
        assert find(stage, "COPY") == [f"{lock} /build/"]
        assert f"--require-hashes --no-deps --requirement /build/{lock}" in find(stage, "RUN")[-1]

    def test_only_the_gpu_image_insists_on_a_gpu(self):
        assert any("TISSUE_DEVICE=cuda" in env for env in find("gpu", "ENV"))
        assert not any("TISSUE_DEVICE" in env for env in find("cpu", "ENV"))

    @pytest.mark.parametrize("target", ["cpu", "gpu"])
    def test_sets_no_variable_that_the_service_would_refuse(self, target):
        names = {name for env in find(target, "ENV") for name in re.findall(r"(\w+)=", env)}
        assert "TISSUE_HOST" in names
        refuse_unknown_variables(dict.fromkeys(names, ""))

    @pytest.mark.parametrize("target", ["cpu", "gpu"])
    def test_nothing_is_told_to_anybody(self, target):
        assert any("ORT_DISABLE_TELEMETRY=1" in env for env in find(target, "ENV"))

    def test_the_version_is_that_of_the_package(self):
        assert f"VERSION={PROJECT['version']}" in find("cpu", "ARG")

    def test_cpu_is_what_is_built_unless_asked(self):
        assert list(STAGES)[-1] == "cpu"

    def test_the_context_has_what_is_copied_and_nothing_private(self):
        lines = (ROOT / ".dockerignore").read_text().splitlines()
        let_in = [line[1:] for line in lines if line.startswith("!")]
        assert "*" in lines
        copied = [source for stage in STAGES for copy in find(stage, "COPY") for source in copy.split()[:-1]]
        from_context = {source for source in copied if not source.startswith(("--from", "/"))}
        assert from_context == set(let_in)
        assert not any(fnmatch(name, path) for name in (".git", ".venv", "data", "runs", "tests") for path in let_in)


class TestLocks:
    @pytest.mark.parametrize("name", ["requirements.lock", "requirements-gpu.lock"])
    def test_every_version_is_fixed_and_hashed_and_no_index_named(self, name):
        text = (ROOT / name).read_text()
        assert "://" not in text
        assert "--index" not in text
        for block in re.split(r"\n(?=[a-z])", text.partition("\n\n#")[0])[1:]:
            assert re.match(r"[\w.-]+==[\w.]+ (; .*)?\\\n", block), block
            assert "--hash=sha256:" in block, block

    @pytest.mark.parametrize(
        ("name", "extra", "stand_in"),
        [("requirements.lock", [], {"onnxruntime-gpu": "onnxruntime"}), ("requirements-gpu.lock", ["cuda"], {})],
    )
    def test_holds_what_the_package_asks_for(self, name, extra, stand_in):
        """Else a dependency was changed without `make lock`."""
        pins = read_lock(name)
        wanted = PROJECT["dependencies"] + [line for e in extra for line in PROJECT["optional-dependencies"][e]]
        here = {"sys_platform": "linux", "platform_machine": "x86_64", "python_full_version": "3.13.0"}
        for requirement in map(Requirement, wanted):
            if requirement.marker is None or requirement.marker.evaluate(here):
                found = pins[stand_in.get(requirement.name, requirement.name)]
                versions = [next(iter(pin.specifier)).version for pin in found]
                assert all(requirement.specifier.contains(version) for version in versions), requirement

    def test_each_image_has_one_onnxruntime(self):
        cpu, gpu = read_lock("requirements.lock"), read_lock("requirements-gpu.lock")
        assert "onnxruntime-gpu" not in cpu
        assert "onnxruntime" not in gpu
        for library in ("nvidia-cublas", "nvidia-cudnn", "nvidia-cuda-runtime"):
            assert any(name.startswith(library) for name in gpu), library

    @pytest.mark.parametrize("name", ["requirements.lock", "requirements-gpu.lock"])
    def test_training_and_testing_stay_outside(self, name):
        assert not {"torch", "onnx", "pytest", "matplotlib"} & set(read_lock(name))


class TestCompose:
    def test_is_whole_without_any_variable(self):
        compose = read_compose()
        assert set(compose["services"]) == {"tissue", "tissue-gpu", "prometheus"}
        assert {name: service.get("profiles") for name, service in compose["services"].items()} == {
            "tissue": None,
            "tissue-gpu": ["gpu"],
            "prometheus": ["observe"],
        }

    @pytest.mark.parametrize("name", ["tissue", "tissue-gpu", "prometheus"])
    def test_every_service_is_locked_up_and_limited(self, name):
        service = read_compose()["services"][name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["restart"] == "unless-stopped"
        assert service["mem_limit"] and service["cpus"] and service["pids_limit"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["healthcheck"]["test"][0] == "CMD"

    @pytest.mark.parametrize("name", ["tissue", "tissue-gpu"])
    def test_the_service_may_write_only_to_tmp(self, name):
        service = read_compose()["services"][name]
        assert [path.partition(":")[0] for path in service["tmpfs"]] == ["/tmp"]
        assert all(volume["read_only"] for volume in service["volumes"])

    def test_asks_for_health_as_the_image_does(self):
        (command,) = find("cpu", "HEALTHCHECK")
        assert read_compose()["services"]["tissue"]["healthcheck"]["test"][1:] == json.loads(
            command.partition("CMD ")[2]
        )

    def test_lets_it_finish_its_work(self):
        assert int(read_compose()["services"]["tissue"]["stop_grace_period"].removesuffix("s")) > LONGEST_STOP_S

    @pytest.mark.parametrize("variables", [{}, {"TISSUE_ARTIFACT": "/mine", "TISSUE_API_KEYS_FILE": "/keys"}])
    def test_passes_nothing_on_that_the_service_would_refuse(self, variables):
        environment = read_environment(**variables)
        refuse_unknown_variables(environment)
        assert {name for name in variables if name in environment} == set(variables)

    def test_passes_every_setting_on(self):
        own = {"TISSUE_HOST", "TISSUE_PORT", "TISSUE_DEVICE"}  # of the image, and the port
        given = set(read_environment(TISSUE_ARTIFACT="/mine", TISSUE_API_KEYS_FILE="/keys"))
        assert given == {f"TISSUE_{name.upper()}" for name in Settings.model_fields} - own

    def test_an_artefact_and_keys_of_ones_own_lie_where_the_service_looks(self):
        compose = read_compose(TISSUE_ARTIFACT="/mine", TISSUE_API_KEYS_FILE="/keys")
        (volume,) = compose["services"]["tissue"]["volumes"]
        environment = read_environment(TISSUE_ARTIFACT="/mine", TISSUE_API_KEYS_FILE="/keys")
        assert (volume["source"], volume["target"]) == ("/mine", environment["TISSUE_ARTIFACT"])
        assert compose["services"]["tissue"]["secrets"] == [Path(environment["TISSUE_API_KEYS_FILE"]).name]
        assert compose["secrets"]["api_keys"] == compose["secrets"]["metrics_key"] == {"file": "/keys"}

    def test_every_variable_that_is_no_setting_is_documented(self):
        names = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
        own = {name for name in names if not name.startswith("TISSUE_")}
        assert own == {"LIMIT_CPUS", "LIMIT_MEMORY", "PROMETHEUS_PORT", "METRICS_KEY_FILE"}
        assert all(f"| `{name}` |" in GUIDE for name in own)

    def test_the_gpu_is_reserved(self):
        service = read_compose()["services"]["tissue-gpu"]
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
        assert service["build"]["target"] == "gpu"


@pytest.mark.parametrize("command", ["docker compose", "podman-compose"])
def test_an_engine_reads_the_compose_file(command):
    config = [*command.split(), "--file", str(ROOT / "docker-compose.yml"), "--profile", "gpu", "config"]
    if not shutil.which(config[0]) or subprocess.run([*config, "--help"], capture_output=True).returncode:
        pytest.skip(f"there is no `{command}` here that can show what it read")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TISSUE_")}
    done = subprocess.run(config, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    service = yaml.safe_load(done.stdout)["services"]["tissue"]
    assert service["read_only"] is True
    assert not any(name.startswith("TISSUE_A") for name in service["environment"])


def read_environment(**variables: str) -> dict[str, str]:
    """What the service's container gets, with the names that are passed on where they are set."""
    entries = read_compose(**variables)["services"]["tissue"]["environment"]
    environment = {name: value for name, _, value in (entry.partition("=") for entry in entries)}
    return {name: value for name, value in environment.items() if name.startswith("TISSUE_")}


class TestKubernetes:
    text = (DEPLOY / "kubernetes.yaml").read_text()
    documents: ClassVar = {document["kind"]: document for document in yaml.safe_load_all(text)}
    pod = documents["Deployment"]["spec"]["template"]["spec"]
    container = pod["containers"][0]

    def test_its_service_does_not_break_the_settings(self):
        assert self.pod["enableServiceLinks"] is False
        refuse_unknown_variables({entry["name"]: entry["value"] for entry in self.container["env"]})

    def test_is_locked_up_as_the_image_expects(self):
        security = self.pod["securityContext"]
        assert f"{security['runAsUser']}:{security['runAsGroup']}" == find("cpu", "USER")[0]
        assert self.container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert [mount["mountPath"] for mount in self.container["volumeMounts"]] == ["/tmp"]

    def test_a_busy_service_is_not_killed_and_an_unready_one_gets_nothing(self):
        paths = {name: probe["httpGet"]["path"] for name, probe in self.container.items() if name.endswith("Probe")}
        assert paths == {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}

    def test_a_stopped_pod_leaves_the_service_before_it_closes(self):
        drain_s = int({entry["name"]: entry["value"] for entry in self.container["env"]}["TISSUE_DRAIN_MS"]) / 1000
        probe = self.container["readinessProbe"]
        assert drain_s > probe["periodSeconds"] * probe["failureThreshold"]
        assert self.pod["terminationGracePeriodSeconds"] > drain_s + DEFAULTS["deadline_ms"] / 1000

    def test_the_parts_find_each_other(self):
        labels = self.documents["Deployment"]["spec"]["template"]["metadata"]["labels"]
        assert self.documents["Service"]["spec"]["selector"] == labels
        assert self.documents["Deployment"]["spec"]["selector"]["matchLabels"] == labels
        assert self.documents["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
        assert self.documents["Service"]["spec"]["ports"][0]["targetPort"] == self.container["ports"][0]["name"]


class TestPrometheus:
    config = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")
    rules: ClassVar = read_yaml(DEPLOY / "prometheus" / "alerts.yml")["groups"][0]["rules"]

    def test_scrapes_the_service_of_the_compose_file_with_its_key(self):
        (job,) = self.config["scrape_configs"]
        assert job["static_configs"] == [{"targets": ["tissue:8000"]}]
        (secret,) = read_compose()["services"]["prometheus"]["secrets"]
        assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"

    def test_rules_ask_for_series_that_exist(self):
        known = set(re.findall(r"^# TYPE (\w+) ", Metrics().expose().decode(), re.M))
        asked = {name for rule in self.rules for name in re.findall(r"\btissue_\w+", rule["expr"])}
        assert len(asked) > 4
        assert {name.removesuffix("_bucket") for name in asked} <= known

    def test_rules_ask_for_codes_and_statuses_that_exist(self):
        kinds = [*KINDS.values(), *HTTP_KINDS.values()]
        expressions = " ".join(rule["expr"] for rule in self.rules)
        codes = {code for value in re.findall(r'code=~?"([^"]+)"', expressions) for code in value.split("|")}
        assert codes and codes <= {kind.code for kind in kinds}
        assert set(re.findall(r'status="(\d+)"', expressions)) <= {str(kind.status) for kind in kinds}

    def test_every_alert_is_explained(self):
        assert all(f"| `{rule['alert']}` |" in GUIDE for rule in self.rules)

    def test_every_rule_is_tried_both_ways(self):
        tests = read_yaml(DEPLOY / "prometheus" / "alerts.test.yml")["tests"]
        names = {rule["alert"] for rule in self.rules}
        fires = [{case["alertname"] for case in test["alert_rule_test"] if "exp_alerts" in case} for test in tests]
        silent = [{case["alertname"] for case in test["alert_rule_test"] if "exp_alerts" not in case} for test in tests]
        assert names in fires
        assert names in silent

    @pytest.mark.skipif(not shutil.which("promtool"), reason="there is no promtool: Debian's package is `prometheus`")
    def test_promtool_agrees(self):
        subprocess.run(["promtool", "test", "rules", DEPLOY / "prometheus" / "alerts.test.yml"], check=True)
        config = str(DEPLOY / "prometheus" / "prometheus.yml")
        subprocess.run(["promtool", "check", "config", "--syntax-only", config], check=True)


class TestProxy:
    text = (DEPLOY / "nginx.conf").read_text()

    def test_the_proxy_never_closes_later_nor_refuses_earlier_than_the_service(self):
        assert self.read_number(r"keepalive_timeout (\d+)s") < KEEP_ALIVE_S
        assert self.read_number(r"client_max_body_size (\d+)m") > DEFAULTS["max_body_mib"]
        assert self.read_number(r"proxy_read_timeout (\d+)s") > DEFAULTS["deadline_ms"] / 1000

    def test_no_picture_reaches_a_disk(self):
        assert "proxy_request_buffering off;" in self.text
        assert "proxy_max_temp_file_size 0;" in self.text

    def read_number(self, pattern: str) -> int:
        match = re.search(pattern, self.text)
        assert match
        return int(match[1])


@pytest.fixture(scope="module")
def url(tiny_artifact, tmp_path_factory) -> Iterator[str]:
    """Of a service that asks for the key `sesame`."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("sesame\n")
    with start(artifact=tiny_artifact, api_keys_file=keys) as process:
        yield process.url


class TestSmoke:
    def test_a_service_that_works_passes(self, url):
        done = run_smoke(url, "--api-key", "sesame")
        assert done.returncode == 0, done.stderr
        assert "answers" in done.stdout

    def test_a_refusal_is_told(self, url):
        done = run_smoke(url)
        assert done.returncode == 1
        assert "unauthorized" in done.stderr

    def test_another_server_does_not_pass(self):
        with answering(200) as port:
            done = run_smoke(f"http://127.0.0.1:{port}")
        assert done.returncode == 1
        assert "expected 200 text/html" in done.stderr

    def test_health_is_that_of_the_service(self, url):
        assert run_healthcheck(url.rpartition(":")[2]).returncode == 0

    def test_a_service_that_is_not_ready_is_not_healthy(self):
        with answering(503) as port:
            assert run_healthcheck(str(port)).returncode == 1

    def test_no_service_is_not_healthy(self):
        with answering(200) as port:
            pass
        assert run_healthcheck(str(port)).returncode == 1


def run_smoke(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEPLOY / "smoke.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)


def run_healthcheck(port: str) -> subprocess.CompletedProcess[bytes]:
    (command,) = find("cpu", "HEALTHCHECK")
    python, *options, _ = json.loads(command.partition("CMD ")[2])
    assert python == "python"
    environ = {**os.environ, "TISSUE_PORT": port}
    return subprocess.run(
        [sys.executable, *options, str(DEPLOY / "healthcheck.py")], env=environ, capture_output=True, timeout=PATIENCE_S
    )


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A stranger that gives every request the same status and nothing else; its port."""

    class Stranger(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Stranger) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()
