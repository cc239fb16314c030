"""The Helm chart, rendered by Helm itself and held against Kubernetes' schemas."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.ops

HELM = Path(__file__).parents[2] / "deploy" / "helm"
CHART = HELM / "express-vllm"
MISSING = "python3 deploy/setup.py lint-deploy installs what renders and checks the chart"
#: The oldest that Chart.yaml accepts, and a recent one.
KUBERNETES = ("1.27", "1.33")


@pytest.fixture(scope="module")
def helm():
    return pytest.importorskip("helm_python.chart", reason=MISSING)


@pytest.fixture(scope="module")
def render(helm):
    def rendered(values):
        with helm.Chart.load(CHART) as chart:
            files = chart.render(values=values, name="r", namespace="llm")
        texts = [text for name, text in files.items() if not name.endswith("NOTES.txt")]
        return [doc for text in texts for doc in yaml.safe_load_all(text) if doc]

    return rendered


def example(name):
    return yaml.safe_load((HELM / f"values-{name}.yaml").read_text())


def one(documents, kind):
    found = [doc for doc in documents if doc["kind"] == kind]
    assert len(found) == 1, kind
    return found[0]


def container(documents):
    return one(documents, "Deployment")["spec"]["template"]["spec"]["containers"][0]


def test_lint_has_no_errors(helm):
    report = helm.lint(CHART)
    assert report["errors"] == []
    assert [m for m in report["messages"] if "icon" not in m["error"]] == []


@pytest.mark.parametrize("name", ["gpu", "cpu"])
@pytest.mark.parametrize("version", KUBERNETES)
def test_manifests_follow_kubernetes_schemas(render, name, version):
    validate = pytest.importorskip("kubernetes_validate", reason=MISSING)
    documents = render(example(name))
    checked = 0
    for document in documents:
        if "monitoring.coreos.com" in document["apiVersion"]:
            continue  # custom resources: their schemas come with the operator
        validate.validate(document, version, strict=True)
        checked += 1
    assert checked >= 2
    broken = copy.deepcopy(one(documents, "Deployment"))
    broken["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(validate.ValidationError):
        validate.validate(broken, version, strict=True)


def test_nothing_is_rendered_for_no_model(render):
    assert render({}) == []


def test_the_server_gets_its_arguments(render):
    arguments = container(render(example("gpu")))["args"]
    assert arguments[0] == "meta-llama/Llama-3.1-8B-Instruct"
    given = dict(argument.split("=", 1) for argument in arguments[1:])
    assert given["--attention-backend"] == "express"
    assert json.loads(given["--additional-config"]) == {
        "express": {"memory_tokens": 2048, "max_memory_tokens": 16384}
    }
    assert given["--tensor-parallel-size"] == "2" and given["--data-parallel-size"] == "2"
    assert given["--max-model-len"] == "131072" and given["--gpu-memory-utilization"] == "0.9"


def test_a_rollback_is_one_value(render):
    values = example("gpu")
    values["servingEngineSpec"]["modelSpec"][0]["attentionBackend"] = ""
    text = " ".join(container(render(values))["args"])
    assert "--attention-backend" not in text and "--additional-config" not in text


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_pods_are_hardened(render, name):
    documents = render(example(name))
    pod = one(documents, "Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    security = container(documents)["securityContext"]
    assert security["readOnlyRootFilesystem"] and security["capabilities"] == {"drop": ["ALL"]}
    assert security["allowPrivilegeEscalation"] is False
    mounts = {mount["mountPath"] for mount in container(documents)["volumeMounts"]}
    assert {"/cache", "/tmp", "/dev/shm"} <= mounts, "what a read-only system still must write"


def test_services_and_monitors_select_the_pods(render):
    documents = render(example("gpu"))
    labels = one(documents, "Deployment")["spec"]["template"]["metadata"]["labels"]
    service = one(documents, "Service")
    for selector in (
        service["spec"]["selector"],
        one(documents, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one(documents, "Deployment")["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    monitor = one(documents, "ServiceMonitor")["spec"]
    wanted = monitor["selector"]["matchLabels"].items()
    assert wanted <= service["metadata"]["labels"].items()
    assert service["metadata"]["labels"][monitor["jobLabel"]] == "express-vllm"
    assert monitor["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"] == "http"
    # production-stack's router finds engines by these.
    assert labels["environment"] == "production" and labels["model"] == "llama"


def test_rules_and_dashboards_are_the_repositorys(render):
    documents = render(example("gpu"))
    groups = []
    for name in ("recording.yml", "alerts.yml"):
        text = (HELM.parent / "prometheus" / name).read_text()
        groups += yaml.safe_load(text)["groups"]
    assert one(documents, "PrometheusRule")["spec"]["groups"] == groups
    maps = [doc for doc in documents if doc["kind"] == "ConfigMap"]
    contents = {name: text for doc in maps for name, text in doc["data"].items()}
    for path in (HELM.parent / "grafana" / "dashboards").iterdir():
        assert json.loads(contents.pop(path.name)) == json.loads(path.read_text())
    assert not contents


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"express": {"memory": 512}}, "memory"),
        ({"express": {"memory_tokens": 12}}, "memory_tokens"),
        ({"vllmConfig": {"tensorParalelSize": 2}}, "tensorParalelSize"),
        ({"requestGPU": 3}, "requestGPU is 3"),
        ({"name": "Llama_3"}, "name"),
    ],
)
def test_values_that_cannot_work_are_refused(render, change, words):
    values = example("gpu")
    values["servingEngineSpec"]["modelSpec"][0].update(change)
    with pytest.raises(Exception, match=words):
        render(values)
