"""Clans in other people's training frameworks, one module a framework."""
