"""The images, if there is a Docker daemon and they have been built."""

import docker
import pytest
from docker.errors import DockerException, ImageNotFound


@pytest.fixture(scope="session")
def daemon():
    """The Docker daemon."""
    try:
        client = docker.from_env()
    except DockerException as error:
        pytest.skip(f"no Docker daemon answers, `dockerd` starts one: {error}")
    yield client
    client.close()


@pytest.fixture(scope="session")
def built(daemon):
    """A function that finds an image by name."""

    def find(name):
        try:
            return daemon.images.get(name)
        except ImageNotFound:
            kind = name.partition("/")[2].partition(":")[0]
            pytest.skip(
                f"{name} is not built: `make images IMAGES={kind}` or, without a registry, `tests/docker/build.sh {kind}`"
            )

    return find
