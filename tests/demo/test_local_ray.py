"""A Ray head that only this machine reaches, and that leaves nothing behind."""

import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from vlal_dist.demo import local_ray
from vlal_dist.errors import VlalError


@pytest.mark.ray_cluster
@pytest.mark.long
def test_it_starts_asks_for_its_token_and_stops() -> None:
    programs = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    head = local_ray.start(environment, num_cpus=1)
    try:
        assert head.address.startswith("http://127.0.0.1:")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{head.address}/api/jobs/", timeout=10)
        assert refused.value.code in (401, 403)
        refused.value.close()
    finally:
        local_ray.stop(head)
    assert head.process.poll() is not None
    assert not head.folder.exists()


def test_a_head_that_ends_at_once_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    ray = tmp_path / "ray"
    ray.write_text("#!/bin/sh\necho no such thing\nexit 3\n")
    ray.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    with pytest.raises(VlalError, match="code 3\nno such thing"):
        local_ray.start(environment, num_cpus=1)
