"""Faults on purpose: a process that dies, stops or raises at a given place, and a harness that lives through it.

- ``injector``: what happens where; a script calls its ``install`` before it joins.
- ``lives``: ranks of this machine without a launcher; one that starts again does so as a new process of the harness.
"""
