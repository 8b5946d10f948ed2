"""The demo: four inheritance networks on real digits, trained, asked to forget, measured."""

NETWORKS = ("federated", "data-parallel", "incremental", "transfer")
SCOPES = ("last-layer", "all")  # parameters to dampen
