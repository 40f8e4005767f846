"""Grafana's dashboards, written by `python -m scripts.dashboards` to helm/files/dashboards."""
