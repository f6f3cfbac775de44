"""Metrics, log lines, throughput and figures of a run."""
