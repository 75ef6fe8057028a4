"""Mesh, sharding rules and process start-up: the only place that knows how arrays lie on devices."""
