"""moe_ext inside other libraries; each has a package of its own, imported by its own name."""
