"""The only files that import an engine, each behind the protocol of ``base``."""
