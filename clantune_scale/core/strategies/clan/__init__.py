"""``clan``, the default strategy: a line search by members around one centre."""
