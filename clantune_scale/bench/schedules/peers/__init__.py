"""Other people's methods in the same table, run by their own packages (the extra ``peers``).

``optimizers``: optimizers that set or do without a schedule by themselves, in plain single runs. ``ray_tune``: Ray
Tune's PBT and PB2, which decide over members that train as any clan's here.
"""
