"""Measurements that a reader can repeat: ``python -m clantune_scale.bench.<name>``."""
