"""What the images guarantee to their users."""

import re
from pathlib import Path

import pytest

from components.images import CPU_IMAGE, GPU_IMAGE, LAUNCHER_IMAGE, VERSION

ROOT = Path(__file__).parents[2]
HARDENED = {"network_mode": "none", "read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges"]}


@pytest.fixture(scope="module", params=[CPU_IMAGE, GPU_IMAGE, LAUNCHER_IMAGE])
def image(request, built):
    return built(request.param)


@pytest.fixture
def run(daemon, image):
    """Run a command in the image as in a pod: no network, no capabilities, only /tmp writable."""

    def start(*command, user=None):
        output = daemon.containers.run(image, command, user=user, remove=True, tmpfs={"/tmp": ""}, stderr=True, **HARDENED)
        return output.decode().strip()

    return start


def kind(image):
    return image.labels["org.opencontainers.image.title"].removeprefix("sparse-distill ")


def test_the_user_is_a_number_other_than_root(image, run):
    assert image.attrs["Config"]["User"] == "1000:0"  # Kubernetes' runAsNonRoot cannot check a user name
    assert run("id", "-u") == "1000"


def test_nothing_runs_but_what_the_pod_asks_for(image):
    assert not image.attrs["Config"].get("Entrypoint")


def test_labels_tell_what_it_is(image):
    labels = {name.removeprefix("org.opencontainers.image."): text for name, text in image.labels.items()}
    assert f"sparse-distill/{kind(image)}:{VERSION}" in image.tags
    assert labels["version"] == VERSION
    assert re.fullmatch(r"[0-9a-f]{40}", labels["revision"])
    assert labels["licenses"] == "Apache-2.0"


def test_it_holds_no_secret_of_the_build(image):
    names = {line.partition("=")[0] for line in image.attrs["Config"]["Env"]}
    assert not [name for name in names if re.search("TOKEN|SECRET|PASSWORD|KEY", name)]


def test_every_package_has_the_version_of_the_constraints(run):
    code = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()), sep='\\n')"

    def versions(lines):
        pairs = [line.split("==") for line in lines if re.match(r"[\w.-]+==", line)]
        return {re.sub(r"[-_.]+", "-", name).lower(): version.partition("+")[0] for name, version in pairs}

    installed = versions(run("python3", "-c", code).splitlines())
    pinned = versions((ROOT / "constraints.txt").read_text().splitlines())
    assert "kfp" in installed
    assert installed == {name: pinned.get(name) for name in installed}


def test_it_has_neither_pip_nor_a_compiler(image, run):
    tools = ["make", "cmake"] + ["cc", "gcc", "g++"] * (kind(image) != "gpu")
    assert run("sh", "-c", f"for tool in {' '.join(tools)}; do command -v $tool; done; echo none else") == "none else"
    code = "from importlib.util import find_spec; print(find_spec('pip'))"
    assert run("python3", "-c", code) == "None"


def test_torch_is_where_it_is_needed(image, run):
    code = "from importlib.util import find_spec; print(*(find_spec(name) is not None for name in ('torch', 'deepspeed')))"
    expected = {"cpu": "True False", "gpu": "True True", "launcher": "False False"}
    assert run("python3", "-c", code) == expected[kind(image)]


def test_any_user_writes_only_below_tmp(run):
    code = """
import getpass, pathlib, tempfile
from huggingface_hub.constants import HF_HUB_CACHE
pathlib.Path(HF_HUB_CACHE).mkdir(parents=True)
print(getpass.getuser(), pathlib.Path.home(), HF_HUB_CACHE, tempfile.mkdtemp())
"""
    user, *folders = run("python3", "-c", code, user="123456:0").split()
    assert user == "sparse-distill"
    assert all(Path(folder).is_relative_to("/tmp") for folder in folders)


def test_a_stage_starts_for_any_user(image, run):
    stage = "publish" if kind(image) == "launcher" else "report"
    shown = run("python3", "-m", f"components.{stage}", "--help", user="123456:0")
    assert shown.startswith("usage:")
    code = f"import components.{stage}.stage, components.{stage}.component; print('imported')"
    assert run("python3", "-c", code, user="123456:0").endswith("imported")
