"""build: what `import_path: deployments.app:build` in a Serve config, or `serve run deployments.app:build`, calls."""

from __future__ import annotations

from typing import Any

import ray
from ray import serve
from ray.serve import Application

from cluster.placement import REPLICA_CPUS, STRATEGY, bundles
from deployments.config import AppConfig, check
from deployments.llm_server import LLMServer

HEALTH_CHECK_PERIOD_S = 1.0
HEALTH_CHECK_TIMEOUT_S = 10.0
MAX_CONSTRUCTOR_TRIES = 3


def build(args: dict[str, Any]) -> Application:
    """The application of one model. Raises ConfigError naming the key, what came and what is allowed."""
    config = check(args)
    if config.device == "auto":
        config = config.replace(device="cuda" if _cluster_gpus() >= config.tensor_parallel_size else "cpu")
    deployment = serve.deployment(
        name="LLMServer",
        max_ongoing_requests=config.ongoing_requests,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        max_constructor_retry_count=MAX_CONSTRUCTOR_TRIES,
        ray_actor_options={"num_cpus": REPLICA_CPUS},
        placement_group_bundles=bundles(config),
        placement_group_strategy=STRATEGY,
        **_scale(config),
    )(LLMServer)
    return deployment.bind(config)


def _scale(config: AppConfig) -> dict[str, Any]:
    if config.autoscaling is None:
        return {"num_replicas": config.num_replicas}
    return {"autoscaling_config": config.autoscaling.model_dump(exclude_none=True)}


def _cluster_gpus() -> float:
    return float(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else 0.0
