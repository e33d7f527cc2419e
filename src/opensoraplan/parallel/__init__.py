"""Models on several devices, applied from outside: no model knows rank, mesh or world size."""
