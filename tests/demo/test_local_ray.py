"""The demo's Ray head: only this machine reaches it, and nothing is left behind."""

import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from vlal_dist.demo.local_ray import local_ray
from vlal_dist.errors import VlalError


@pytest.mark.ray_cluster
@pytest.mark.long
def test_it_starts_requires_its_token_and_stops() -> None:
    programs = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    with local_ray(environment, num_cpus=1) as head:
        assert head.address.startswith("http://127.0.0.1:")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{head.address}/api/jobs/", timeout=10)
        assert refused.value.code in (401, 403)
        refused.value.close()
    assert head.process.poll() is not None
    assert not head.folder.exists()


def test_a_head_that_ends_at_once_is_an_error_with_its_last_lines(tmp_path: Path) -> None:
    ray = tmp_path / "ray"
    ray.write_text("#!/bin/sh\necho no such thing\nexit 3\n")
    ray.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    with (
        pytest.raises(VlalError, match="code 3\nno such thing"),
        local_ray(environment, num_cpus=1),
    ):
        pass
