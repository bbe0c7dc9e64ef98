"""Faults on purpose, and what comes of them: ``python -m clantune_scale.bench.faults``.

- ``injector``, ``actions``: what happens where; a script calls ``install`` before it joins.
- ``lives``: ranks of this machine without a launcher; one that starts again does so as a new process of the harness.
- ``workload``: what trains, and how a rank stood at its end.
- ``kills``, ``survivors``, ``numbers``, ``damage``, ``resumes``, ``trackers``: a kind of fault each, in ``sections``.
"""
