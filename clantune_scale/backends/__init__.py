"""Engines, each behind the protocols of :mod:`clantune_scale.runtime.engine_protocol`. Only files here import one."""
