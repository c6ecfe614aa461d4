"""Take down what Serve runs on this machine's Ray, after the requests in flight: `python -m scripts.stop`.

`serve shutdown` alone has Ray kill HAProxy at once, and every stream in it.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence

POLL_S = 0.2


def stop_serving(applications: Sequence[str]) -> None:
    """Delete these applications and wait for it, as long as their replicas may take to finish; then end Serve.

    Ray is initialized.
    """
    from ray import serve

    with contextlib.suppress(Exception):  # Serve may be gone already
        for name in applications:
            serve.delete(name, _blocking=False)
        while set(applications) & set(serve.status().applications):
            time.sleep(POLL_S)
    serve.shutdown()


def main() -> int:
    """Stop all applications; 0."""
    import ray
    from ray import serve

    ray.init(address="auto", namespace="serve", log_to_driver=False, logging_level="ERROR")
    applications = list(serve.status().applications)
    stop_serving(applications)
    ray.shutdown()
    print(f"manta: taken down: {', '.join(applications) or 'nothing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
