"""Topology, process groups, stores and joining: which ranks form a member, and how ranks find each other."""
