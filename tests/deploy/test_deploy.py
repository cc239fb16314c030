"""The deployment files: consistent with each other and valid for the tools that read them."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from express_vllm.config import ServerConfig

ROOT = Path(__file__).parents[2]
DEPLOY, CHART = ROOT / "deploy", ROOT / "deploy" / "helm" / "express-vllm"
OPERATIONS = ROOT / "docs" / "operations.md"
VERSION = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
ENVIRONMENT = {"MODEL": "/models/m", "GRAFANA_PASSWORD": "secret"}


def between(text, name):
    return text.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]


def interpolated(text, environment=ENVIRONMENT):
    """`${NAME}`, `${NAME:-default}` and `${NAME:?error}` as docker compose replaces them."""

    def value(match):
        found = environment.get(match["name"], "")
        if not found and match["kind"] == ":?":
            raise KeyError(f"{match['name']}: {match['rest']}")
        return found or (match["rest"] if match["kind"] == ":-" else "")

    return re.sub(r"\$\{(?P<name>\w+)(?P<kind>:[-?])?(?P<rest>[^}]*)\}", value, text)


def compose(name):
    return yaml.safe_load(interpolated((DEPLOY / name).read_text()))


def test_the_page_of_models_is_vllms_registry():
    page = runpy.run_path(str(DEPLOY / "models.py"))["page"]()
    assert (ROOT / "docs" / "models.md").read_text() == page, "deploy/models.py > docs/models.md"


def test_the_sizing_tables_are_what_the_code_computes():
    tables = runpy.run_path(str(DEPLOY / "sizing.py"))["tables"]()
    page = between(OPERATIONS.read_text(), "sizing")
    assert page.strip() == tables.strip(), "run: .venv/bin/python deploy/sizing.py"


def test_operations_names_only_files_that_exist():
    for name in set(re.findall(r"`(deploy/[\w./-]+)`", OPERATIONS.read_text())):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\((images/[\w./-]+)\)", OPERATIONS.read_text()):
        assert (OPERATIONS.parent / name).exists(), name


def test_versions_agree():
    for name in ("deploy/Dockerfile", "deploy/Dockerfile.cpu", "deploy/compose.yaml"):
        found = set(re.findall(r"express-vllm:(\d+\.\d+\.\d+)", (ROOT / name).read_text()))
        assert found == {VERSION}, name
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == VERSION


def test_the_cpu_image_installs_what_setup_installs():
    setup = (DEPLOY / "setup.py").read_text()
    image = (DEPLOY / "Dockerfile.cpu").read_text()
    assert re.search(r'TORCH_CPU = "torch==(\S+)"', setup)[1] == re.search(r"TORCH=(\S+)", image)[1]
    assert "--overrides deploy/cpu-overrides.txt ./deploy/vllm-cpu-shim" in image
    minor = re.search(r"vllm/vllm-openai:v(\d+\.\d+)\.", (DEPLOY / "Dockerfile").read_text())[1]
    assert f'"vllm=={minor}.*"' in (ROOT / "pyproject.toml").read_text()


def test_images_get_every_file_that_they_copy():
    """.dockerignore lets through exactly what the Dockerfiles copy."""
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    }
    for name in ("Dockerfile", "Dockerfile.cpu"):
        for line in (DEPLOY / name).read_text().splitlines():
            if line.startswith("COPY ") and "--from" not in line:
                for source in line.split()[1:-1]:
                    assert source in allowed and (ROOT / source).exists(), (name, source)


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_images_do_not_run_as_root(name):
    text = (DEPLOY / name).read_text()
    assert re.findall(r"^USER (.*)", text, re.M)[-1] == "10001:10001"
    assert "HEALTHCHECK" in text and '"--attention-backend", "express"' in text


def test_compose_mounts_files_that_exist_and_hardens_every_service():
    services = compose("compose.yaml")["services"]
    assert set(services) == {"server", "prometheus", "grafana"}
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists(), volume
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
    json.loads(services["server"]["command"][-1].split("=", 1)[1])
    with pytest.raises(KeyError, match="GRAFANA_PASSWORD"):
        interpolated((DEPLOY / "compose.yaml").read_text(), {"MODEL": "/m"})


def test_compose_follows_the_specification():
    """Parsed by compose-spec, which refuses unknown fields and wrong values."""
    spec = pytest.importorskip("compose_spec", reason="make setup installs compose-spec")
    for name in ("compose.yaml", "compose.gpu.yaml"):
        text = yaml.safe_dump(compose(name))  # without merge keys, which it does not know
        assert "server" in spec.PyCompose.from_yaml(text).service_names()
        with pytest.raises(ValueError, match="imagee"):
            spec.PyCompose.from_yaml(text.replace("image:", "imagee:", 1))


def test_grafana_is_provisioned_with_what_compose_mounts():
    source = yaml.safe_load(
        (DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text()
    )["datasources"][0]
    assert source["url"] == "http://prometheus:9090" and source["type"] == "prometheus"
    provider = yaml.safe_load(
        (DEPLOY / "grafana/provisioning/dashboards/express.yaml").read_text()
    )["providers"][0]
    mounts = compose("compose.yaml")["services"]["grafana"]["volumes"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounts


def test_the_chart_knows_exactly_the_servers_settings():
    schema = json.loads((CHART / "values.schema.json").read_text())
    spec = schema["properties"]["servingEngineSpec"]["properties"]
    express = spec["modelSpec"]["items"]["properties"]["express"]
    assert set(express["properties"]) == {field.name for field in fields(ServerConfig)}
    assert express["additionalProperties"] is False


@pytest.mark.parametrize("name", ["values-gpu", "values-cpu"])
def test_example_values_pass_the_schema_and_the_servers_own_check(name):
    import jsonschema

    values = yaml.safe_load((DEPLOY / "helm" / f"{name}.yaml").read_text())
    jsonschema.validate(values, json.loads((CHART / "values.schema.json").read_text()))
    for model in values["servingEngineSpec"]["modelSpec"]:
        ServerConfig.parse(model["express"])


def test_production_stack_values_start_express():
    values = yaml.safe_load((DEPLOY / "helm" / "production-stack-values.yaml").read_text())
    arguments = values["servingEngineSpec"]["modelSpec"][0]["vllmConfig"]["extraArgs"]
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert given["--attention-backend"] == "express"
    ServerConfig.parse(json.loads(given["--additional-config"])["express"])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing")
def test_the_unit_is_valid_and_hardened(tmp_path):
    text = (DEPLOY / "systemd" / "express-vllm.service").read_text()
    unit = tmp_path / "express-vllm.service"
    unit.write_text(text.replace("/opt/express-vllm/.venv/bin/vllm", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", unit], text=True, capture_output=True)
    mine = [line for line in done.stderr.splitlines() if "express-vllm" in line]
    assert done.returncode == 0 and not mine, done.stderr
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", unit],
        text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, "exposure above 2.0:\n" + done.stdout[-3000:]


def test_the_units_settings_are_in_its_environment_file():
    unit = (DEPLOY / "systemd" / "express-vllm.service").read_text()
    command = re.search(r"^ExecStart=(.*)", unit, re.M)[1]
    settings = dict(
        line.split("=", 1)
        for line in (DEPLOY / "systemd" / "express-vllm.env").read_text().splitlines()
        if line and line[0] != "#"
    )
    assert set(re.findall(r"\$\{?(\w+)", command)) <= set(settings)
    ServerConfig.parse(json.loads(settings["EXPRESS_CONFIG"].strip("'"))["express"])


@pytest.mark.parametrize("script", ["serve.sh", "mypy.sh", "bundle.sh"])
def test_scripts_parse(script):
    done = subprocess.run(["bash", "-n", DEPLOY / script], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert os.access(DEPLOY / script, os.X_OK)


def served(folder, device, flags, **environment):
    """The arguments that serve.sh gives to vllm on such a machine, and what it prints."""
    checkout = folder / "checkout"
    for name, text in {
        "deploy/serve.sh": (DEPLOY / "serve.sh").read_text(),
        ".venv/express-setup": f"{device} 3.12\n",
        ".venv/bin/python": "#!/bin/sh\necho /models/small\n",
        ".venv/bin/vllm": '#!/bin/sh\nfor argument; do echo "given: $argument"; done\n',
        "cpuinfo": f"flags : fpu {flags} sse\n",
    }.items():
        path = checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    given = {"PATH": os.environ["PATH"], "CPUINFO": str(checkout / "cpuinfo"), **environment}
    done = subprocess.run(
        [checkout / "deploy" / "serve.sh"], env=given, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return re.findall("^given: (.*)", done.stdout, re.M), done.stdout


@pytest.mark.parametrize(
    ("device", "flags", "environment", "dtypes"),
    [
        ("cpu", "avx2 avx512f", {}, ["float32"]),
        ("cpu", "avx512f avx512_bf16", {}, []),
        ("cpu", "amx_bf16", {}, []),
        ("cpu", "asimd i8mm bf16", {}, []),
        ("cuda", "avx2", {}, []),
        ("cpu", "avx2", {"MODEL": "/models/other"}, []),
        ("cpu", "avx2", {"ARGS": "--dtype bfloat16"}, ["bfloat16"]),
        ("cpu", "avx2", {"ARGS": "--seed 1 --dtype=half"}, []),
        ("cpu", "avx2", {"ARGS": "--additional-config '{\"a\": 1}'"}, ["float32"]),
    ],
)
def test_the_small_model_runs_in_the_type_that_is_fast(
    tmp_path, device, flags, environment, dtypes
):
    """Without bf16 instructions in float32, unless another type is asked for."""
    given, printed = served(tmp_path, device, flags, **environment)
    asked = [given[i + 1] for i, argument in enumerate(given) if argument == "--dtype"]
    assert asked == dtypes
    assert ("adding --dtype float32" in printed) == (dtypes == ["float32"])
    assert "ARGS" not in environment or given[-1] in environment["ARGS"]


@pytest.mark.ops
def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint is missing: python3 deploy/setup.py lint-deploy")
    files = [DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.cpu"]
    done = subprocess.run([hadolint, *files], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.ops
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="apt install shellcheck")
def test_shellcheck_finds_nothing():
    files = [DEPLOY / name for name in ("serve.sh", "mypy.sh", "bundle.sh")]
    # `more` is assigned by eval.
    done = subprocess.run(
        ["shellcheck", "--exclude=SC2154", *files], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout
