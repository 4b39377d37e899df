"""Two ranks that train, each as on a machine of its own; run by test_agreement.py.

Arguments: FOLDER with 0.yaml, 1.yaml, and for each rank what it says and its exit code.
"""

import contextlib
import os
import sys
from pathlib import Path

from vlal_dist.train import main

if __name__ == "__main__":
    # As on a machine of its own, but for the interface.
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_SIZE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    with (folder / f"{rank}.txt").open("w") as file, contextlib.redirect_stderr(file):
        code = main(["--config", str(folder / f"{rank}.yaml"), *sys.argv[2:]])
    (folder / f"{rank}.code").write_text(str(code))
