"""Processor, memory, disk, network and GPU of the writer's host, by MLflow's own monitor."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any


def start_monitor(run: str, *, uri: str, step: Callable[[], int]) -> Any:
    """Starts MLflow's ``SystemMetricsMonitor`` on a thread of its own; ``finish()`` on what it returns ends it.

    How often it samples is set as MLflow users set it (``MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL`` and its kin). GPUs
    need the package ``nvidia-ml-py``, which MLflow asks for; without it they are left out.

    Args:
        run: id of the MLflow run that gets the metrics.
        uri: tracking URI.
        step: gives the run's optimizer step, which is the step of every other metric too.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    # "Started monitoring system metrics.", in the middle of the user's terminal.
    logging.getLogger("mlflow.system_metrics.system_metrics_monitor").setLevel(logging.WARNING)

    class Monitor(SystemMetricsMonitor):
        def publish_metrics(self, metrics: dict[str, float]) -> None:
            self._logging_step = step()
            super().publish_metrics(metrics)

    monitor = Monitor(run, tracking_uri=uri)
    monitor.start()
    return monitor
