"""Which ranks make a member, and how they find each other: topology, groups, stores, joining."""
