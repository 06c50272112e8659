"""The planted faults: what a tired hand could write, over all stages, both directions."""
