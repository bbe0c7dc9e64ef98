"""Problems that nobody wrote by hand: families of tasks, optimizers and schedules, and draws from them.

``registry.register`` adds a family, ``split`` says which may be tuned on, ``generator`` draws problems.
"""
