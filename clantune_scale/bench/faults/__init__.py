"""Fault injection, and what a run does after each fault: ``python -m clantune_scale.bench.faults``.

- ``injector``, ``actions``: what is injected, and at which point; a script calls ``install`` before it joins.
- ``processes``: ranks on this machine without a launcher; the harness restarts a rank as a new process.
- ``workload``: what is trained, and each rank's final state.
- ``kills``, ``survivors``, ``numbers``, ``damage``, ``resumes``, ``trackers``: one kind of fault each.
- ``sections``: the kinds of faults, and the engines that each one runs on.
"""
