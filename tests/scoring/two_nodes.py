"""Two Ray nodes of one CPU each on this machine, for tests: `python -m tests.scoring.two_nodes`.

Prints one line of JSON, `address` and the raylet's pid of the `second` node, and ends both nodes
when its standard input is closed. Started in an environment as `on_ray.py` makes it.
"""

import json
import sys
import threading
from typing import Any


def main() -> None:
    """Start, tell, wait, end."""
    from ray.cluster_utils import Cluster

    one: dict[str, Any] = {
        "num_cpus": 1,
        "object_store_memory": 100_000_000,
        "node_ip_address": "127.0.0.1",
    }
    cluster: Any = Cluster(initialize_head=True, head_node_args={**one, "include_dashboard": False})
    second = cluster.add_node(**one)
    (raylet,) = second.all_processes["raylet"]
    # Its workers end when it is gone, which it is only once somebody has asked for its exit code.
    threading.Thread(target=raylet.process.wait, daemon=True).start()
    told = {"address": cluster.address, "second": raylet.process.pid}
    print(json.dumps(told), flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
